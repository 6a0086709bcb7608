"""A run that was killed and went on is the run that never stopped, bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from awkward import CASES, TRUNK
from running import Toy, assert_same_end, devices, killed_after, metrics, record, tiny

from data import Mixture, Records
from models import Experts, SigmoidRouter
from objectives import ExcessLossMixing
from partitioning import UserError, data, fsdp_expert, fsdp_tensor
from training.ema import Ema
from training.loop import Interrupt
from training.run import Stage

TEXTS = ("the quick brown fox jumps over the lazy dog", "def f(x): return x + 1", "import os, sys", "lorem ipsum dolor")


# Each kind of state and of draw once: two trees, stages, a teacher and a queue, a frozen tree, rewards from the host, statistics,
# chunks, phases. The others in the long run.
KINDS = {
    "mlm",
    "electra",
    "gpt_bert",
    "momentum_queue",
    "dpo",
    "grpo",
    "power_norm",
    "experts",
    "info_nce_chunked",
    "phases",
}
assert set(CASES) > KINDS


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in KINDS else pytest.mark.long) for n in CASES])
def test_resumed_is_never_stopped(name, tmp_path):
    """Parameters, optimizer, buffers, guard and frozen trees of every awkward case; on a mesh, with an average, one."""
    run = tiny(name, average=Ema(decay=0.9) if name == "momentum_queue" else None)
    with devices(2 if name == "momentum_queue" else 1):
        run.train(tmp_path / "whole")
        killed_after(2, tmp_path / "whole", tmp_path / "killed")
        run.data.steps.clear()
        run.train(tmp_path / "killed")
    assert min(run.data.steps) == 2
    assert_same_end(tmp_path / "whole", tmp_path / "killed", 4)
    assert len(metrics(tmp_path / "killed")) == 4
    assert record(tmp_path / "whole", 2)["leaves"] != record(tmp_path / "whole", 4)["leaves"]


def test_stages_resume_on_either_side_of_their_border(tmp_path):
    """Two stages with their own batch, objective and accumulation; a kill in the first, at the border, in the second."""
    clm, mlm = CASES["clm"].objective, CASES["mlm"].objective
    run = tiny(
        "mlm",
        steps=None,
        stages=[Stage(steps=3, objective=clm), Stage(steps=3, objective=mlm, batch_size=16, accumulate=2)],
        checkpoint_every=1,
    )
    with devices(1):
        run.train(tmp_path / "whole")
        for step in (3, 5):
            out = tmp_path / f"killed{step}"
            killed_after(step, tmp_path / "whole", out)
            run.train(out)
            assert_same_end(tmp_path / "whole", out, 6)
    assert "clm" in metrics(tmp_path / "whole")[3]
    assert "mlm" in metrics(tmp_path / "whole")[4]


class Asked(Interrupt):
    """A request to stop that comes while the third step is taken."""

    questions = 0

    @property
    def seen(self):
        self.questions += 1
        return self.questions >= 3


@pytest.mark.parametrize("first", [pytest.param(2, marks=pytest.mark.long), 3, pytest.param(4, marks=pytest.mark.long)])
def test_a_request_to_stop_around_a_stage_border_ends_that_step(first, tmp_path, monkeypatch):
    """Not one step more, whichever stage the step is of; it is saved, and the next start takes the rest."""
    run = tiny(
        "mlm", steps=None, stages=[Stage(steps=first), Stage(steps=6 - first, batch_size=16)], checkpoint_every=6
    )
    with devices(1):
        run.train(tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr("training.loop.Interrupt", Asked)
            run.train(tmp_path / "stopped")
        assert list(metrics(tmp_path / "stopped")) == [1, 2, 3]
        assert (tmp_path / "stopped" / "checkpoints" / "3").is_dir()
        run.train(tmp_path / "stopped")
    assert_same_end(tmp_path / "whole", tmp_path / "stopped", 6)


def mixed():
    """Two sources whose shares a controller moves at every fourth step."""
    documents = {
        "prose": Records(examples=[{"text": TEXTS[0] + str(i)} for i in range(40)]),
        "code": Records(examples=[{"text": TEXTS[1] + str(i)} for i in range(40)]),
    }
    return tiny(
        "mlm",
        data=Mixture(sources=documents, weights={"prose": 0.9, "code": 0.1}),
        steps=20,
        length=16,
        controllers=[ExcessLossMixing(every=4, delay=8, rate=2.0)],
        checkpoint_every=5,
        keep=10,
    )


def test_the_control_log_resumes(tmp_path):
    """Decisions, and sums that wait for the next one, are in the checkpoint: later batches are the same."""
    run = mixed()
    with devices(1):
        run.train(tmp_path / "whole")
        for step in (10,):
            out = tmp_path / f"killed{step}"
            killed_after(step, tmp_path / "whole", out)
            run.train(out)
            assert_same_end(tmp_path / "whole", out, 20)
    log = record(tmp_path / "whole", 20)["metadata"]["control"]
    assert [entry["step"] for entry in log["entries"]] == [12, 16, 20, 24, 28]
    assert [entry["row"] for entry in log["entries"]] == [8 * entry["step"] for entry in log["entries"]]
    shares = [entry["values"]["mixture"]["code"] for entry in log["entries"]]
    assert len(set(shares)) == 5
    # The decision of step 4 takes effect at step 12, and not before.
    reader = run.data.open()
    read = lambda step, control: reader.batch(step, batch_size=8, length=16, seed=0, control=control)["source"]
    from data import ControlEntry

    entries = [ControlEntry(**entry) for entry in log["entries"]]
    for step in range(12):
        np.testing.assert_array_equal(read(step, entries), read(step, ()))
    assert any((read(step, entries) != read(step, ())).any() for step in range(12, 20))


def test_other_devices_see_the_same_batches_and_go_on(tmp_path):
    """One device, then eight on another mesh, then one again: the losses are those of one device throughout."""
    run = tiny("experts", steps=6, batch_size=8)
    with devices(1):
        run.train(tmp_path / "whole")
    killed_after(2, tmp_path / "whole", tmp_path / "moved")
    tiny("experts", steps=4, batch_size=8, rules=fsdp_tensor(2)).train(tmp_path / "moved")
    with devices(1):
        tiny("experts", steps=6, batch_size=8, rules=data()).train(tmp_path / "moved")
    expected, got = metrics(tmp_path / "whole"), metrics(tmp_path / "moved")
    assert expected.keys() == got.keys()
    for step in expected:
        assert got[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5)


@pytest.mark.long
def test_experts_shared_out_resume_here_and_on_another_mesh(tmp_path):
    """Bit for bit where they were, the router's bias too; elsewhere with the same losses."""
    model = partial(TRUNK, layers=1, feed_forward=partial(Experts, experts=8, hidden=8, router=SigmoidRouter))
    run = partial(tiny, "clm", model=model)
    run(rules=fsdp_expert(4)).train(tmp_path / "whole")
    for name, rules in (("here", fsdp_expert(4)), ("there", fsdp_expert(2, sequence=2, tensor=2))):
        killed_after(2, tmp_path / "whole", tmp_path / name)
        run(rules=rules).train(tmp_path / name)
    assert_same_end(tmp_path / "whole", tmp_path / "here", 4)
    moved = [record(tmp_path / "whole", step)["leaves"] for step in (2, 4)]
    (bias,) = {name for name in moved[0] if name.endswith("layers/0/feed_forward/router/bias")}
    assert moved[0][bias] != moved[1][bias]
    expected, got = (metrics(tmp_path / name) for name in ("whole", "there"))
    for step in (3, 4):
        assert got[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5)


def test_a_checkpoint_does_not_know_how_its_stack_was_scanned(tmp_path):
    """Layers go by index: a scanned run goes on unscanned, with the same leaves and the same losses."""
    run = tiny("experts")
    with devices(1):
        run.train(tmp_path / "whole")
        killed_after(2, tmp_path / "whole", tmp_path / "other")
        tiny("experts", model=partial(CASES["experts"].model, scan=False)).train(tmp_path / "other")
    expected, got = (record(tmp_path / name, 4)["leaves"] for name in ("whole", "other"))
    assert {name: leaf["shape"] for name, leaf in expected.items()} == {n: leaf["shape"] for n, leaf in got.items()}
    assert not any("scanned" in name for name in expected)
    for step, row in metrics(tmp_path / "whole").items():
        assert metrics(tmp_path / "other")[step]["loss"] == pytest.approx(row["loss"], rel=1e-5)


def test_what_cannot_go_on_says_why(tmp_path):
    """Another model's checkpoint, other data's, a lost or foreign frozen tree: one line each, and nothing is written."""
    run, out = tiny("dpo"), tmp_path / "run"
    with devices(1):
        run.train(out)
        before = sorted(path.name for path in (out / "checkpoints").iterdir())
        wider = {"model": lambda *args, **kwargs: TRUNK(*args, **{**kwargs, "width": 24})}
        with pytest.raises(
            UserError, match=r"another model: 'optimizer/0/mu/trunk/final_norm/scale' is \(16,\) in it and \(24,\)"
        ):
            tiny("dpo", steps=6, **wider).train(out)
        with pytest.raises(UserError, match=r"trained on other data .*data\[0\].task: toy there, other here"):
            tiny("dpo", steps=6, data=Toy(CASES["dpo"].batch, name="other")).train(out)
        reference = next((out / "checkpoints" / "frozen").iterdir())
        shutil.move(reference, tmp_path / "kept")
        with pytest.raises(UserError, match=r"frozen tree .* is missing"):
            tiny("dpo", steps=6).train(out)
        shutil.move(tmp_path / "kept", reference)
        kept = json.dumps(record(out, 4))
        tiny("dpo", steps=6).train(out)
    assert json.dumps(record(out, 4)) == kept
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == sorted([*before, "6"])


@dataclass(frozen=True)
class Figures:
    """An evaluator whose figures are given."""

    values: tuple[float, ...]

    def open(self, **_):
        """Gives them one after the other."""
        left = list(self.values)
        return lambda values: {"figure": left.pop(0)}


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    """Also when the run was stopped in between: figures are in the checkpoints."""
    how = {"checkpoint_every": 1, "evaluate_every": 1, "keep": 2, "keep_best": ("figure", "min")}
    with devices(1):
        tiny("clm", steps=4, evaluators=[Figures((0.5, 0.9, 0.1, 0.4))], **how).train(tmp_path)
        tiny("clm", steps=6, evaluators=[Figures((float("nan"), 0.6))], **how).train(tmp_path)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()) == [3, 5, 6]
    assert record(tmp_path, 6)["metadata"]["figures"] == {"figure": 0.6}


def test_a_best_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="keep_best needs figures"):
        tiny("clm", keep_best=("figure", "min"))
    run = tiny("clm", evaluators=[Figures((0.5, 0.9, 0.1))], evaluate_every=2, keep_best=("figures", "min"))
    with devices(1), pytest.raises(UserError, match="no figure 'figures': use one of figure"):
        run.train(tmp_path)
