"""Tokens and FLOPs so far, over all starts of a run; and what it ran on."""

import json

import jax
import numpy as np
import pytest
from running import killed_after, metrics, tiny

from training.environment import environments
from training.loop import step_flops
from training.spent import FLOPS, TOKENS, Spent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps that logs each third and saves each second."""
    out = tmp_path_factory.mktemp("spent") / "run"
    run = tiny("mlm", log_every=3)
    run.train(out)
    return run, out


def test_they_are_what_the_steps_read_and_cost(whole):
    run, out = whole
    read = [np.count_nonzero(run.data.make(step * run.batch_size, run.batch_size)["segments"]) for step in range(4)]
    plan = run.plan()
    each = step_flops(plan, plan.stages[0]).flops
    assert each > 0
    logged = metrics(out)
    assert [logged[step][TOKENS] for step in (1, 3, 4)] == [sum(read[:n]) for n in (1, 3, 4)]
    assert [logged[step][FLOPS] for step in (1, 3, 4)] == pytest.approx([n * each for n in (1, 3, 4)])


def test_a_resumed_run_counts_on(whole, tmp_path):
    """From a checkpoint between two log steps, to the same totals; each start is on record."""
    run, out = whole
    killed_after(2, out, tmp_path / "run")
    run.train(tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(out)
    starts = environments(tmp_path / "run")
    assert [start["step"] for start in starts] == [0, 2]
    assert starts[1]["devices"]["count"] == len(jax.devices())
    assert starts[1]["packages"]["jax"] == jax.__version__
    assert starts[1]["host"]["cores"] >= 1


def test_a_run_that_never_counted_says_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 2, "loss": 1.0}) + "\n")
    spent = Spent(tmp_path, 2)
    spent.add(10, 1.0)
    assert spent.figures() == {}
