"""Traces and programs on request: what is written, and what is refused in a line."""

from __future__ import annotations

import json

import pytest
from running import devices, tiny

from partitioning import UserError
from training.watch import Watch


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run whose steps 2 to 3 are traced and whose program is written."""
    out = tmp_path_factory.mktemp("watched")
    with devices(1):
        tiny("clm").train(out, watch=Watch.of("2:3", True))
    return out


def test_a_trace_that_tensorboard_reads(watched):
    """Where its profile plugin looks for it."""
    (trace,) = watched.glob("profile/plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 1000
    assert b"train_step" in trace.read_bytes()


def test_the_program_and_its_memory(watched):
    text = (watched / "programs" / "step_000000.hlo.txt").read_text()
    assert text.startswith("HloModule jit_train_step")
    sizes = json.loads((watched / "programs" / "step_000000.memory.json").read_text())
    assert sizes["temp_size"] > 0
    assert sizes["argument_size"] > 0
    assert (watched / "programs" / "memory.prof").stat().st_size > 0


@pytest.mark.parametrize("profile", ["10", "a:b", "0:3", "5:4", "-1:3", "1:2:3"])
def test_what_is_no_range_is_refused(profile):
    with pytest.raises(UserError, match=f"--profile {profile}: expected the first and the last step, such as 10:15"):
        Watch.of(profile, False)


def test_steps_that_will_not_be_taken_are_refused(watched, tmp_path):
    """Before anything is compiled, and without a folder left behind."""
    with devices(1):
        with pytest.raises(UserError, match="--profile 3:9: this start takes steps 1 to 4"):
            tiny("clm").train(tmp_path / "new", watch=Watch.of("3:9", False))
        with pytest.raises(UserError, match="--profile 2:3: all 4 steps are done"):
            tiny("clm").train(watched, watch=Watch.of("2:3", False))
        with pytest.raises(UserError, match="--profile 4:5: this start takes steps 5 to 6"):
            tiny("clm", steps=6).train(watched, watch=Watch.of("4:5", False))
    assert not (tmp_path / "new").exists()
