"""Runs that differ in their seed or their rates share what is compiled, and do what each would do alone."""

import json

import jax
import numpy as np
import optax
import pytest
from running import assert_same_end, devices, metrics, record, tiny

from evaluation.reading import named
from partitioning import data
from training.loop import follow
from training.optimizers import AdamW
from training.plan import Plan
from training.run import Stage
from training.watch import Watch


@pytest.mark.parametrize("seed", [0, 7, (1 << 31) + 5, (1 << 32) - 1])
def test_a_traced_seed_gives_the_key_of_a_plain_one(seed):
    words = lambda seed: jax.random.key_data(jax.random.key(seed))
    np.testing.assert_array_equal(jax.jit(words)(np.uint32(seed)), words(seed))


def test_one_plan_trains_every_seed_as_its_own(tmp_path, monkeypatch):
    """Bit for bit: initial values, the order of the data, every draw. One program for all."""
    compiled, compile_ = [], Plan.compile
    monkeypatch.setattr(Plan, "compile", lambda self, stage: compiled.append(1) or compile_(self, stage))
    first, second = 1, 3_000_000_000
    with devices(1):
        plan = tiny("mlm", seed=first, rules=data()).plan()
        for seed in (first, second):
            follow(plan.with_seed(seed), tmp_path / f"shared{seed}")
        assert len(compiled) == 1
        tiny("mlm", seed=second, rules=data()).train(tmp_path / "own")
    assert_same_end(tmp_path / "own", tmp_path / f"shared{second}", 4)
    losses = [[row["loss"] for row in metrics(tmp_path / f"shared{seed}").values()] for seed in (first, second)]
    assert losses[0] != losses[1]
    assert record(tmp_path / f"shared{first}", 4) != record(tmp_path / f"shared{second}", 4)


def test_runs_that_differ_in_their_rate_have_one_program(tmp_path):
    """A number or another, a schedule or another: what is compiled is the same to the letter, and what is trained is not."""
    pairs = (
        (AdamW(learning_rate=0.01), AdamW(learning_rate=0.02)),
        (
            AdamW(learning_rate=optax.cosine_decay_schedule(0.01, 4)),
            AdamW(learning_rate=optax.linear_schedule(0.0, 0.03, 4)),
        ),
    )
    with devices(1):
        for index, pair in enumerate(pairs):
            ends = []
            for optimizer, steps in zip(pair, (4, 6), strict=True):
                run = tiny("mlm", optimizer=optimizer, steps=steps, rules=data())
                plan = run.plan()
                ends.append(plan.lower(plan.stages[0]).as_text())
                if index:
                    follow(plan, tmp_path / str(steps))
                    logged = {step: row["learning_rate"] for step, row in metrics(tmp_path / str(steps)).items()}
                    own = [float(optimizer.rates(step - 1)["learning_rate"]) for step in logged]
                    assert list(logged.values()) == pytest.approx(own, rel=1e-6)
            assert ends[0] == ends[1]
    assert metrics(tmp_path / "4")[4]["loss"] != metrics(tmp_path / "6")[4]["loss"]


def test_each_stage_has_its_own_rates(tmp_path):
    run = tiny(
        "mlm",
        steps=None,
        rules=data(),
        stages=[
            Stage(steps=2, optimizer=AdamW(learning_rate=0.01)),
            Stage(steps=2, optimizer=AdamW(learning_rate=0.5)),
        ],
    )
    with devices(1):
        run.train(tmp_path)
    assert [row["learning_rate"] for row in metrics(tmp_path).values()] == pytest.approx([0.01, 0.01, 0.5, 0.5])


class Told:
    """An evaluator whose figures of each example are known."""

    def open(self, **_):
        return lambda values: named("told", {"score": 0.4}, examples={"score": np.array([0.5, 1 / 3])})


def test_examples_are_written_at_the_end_of_a_run_that_is_asked_for_them(tmp_path):
    with devices(1):
        plan = tiny("mlm", evaluators=(Told(),), evaluate_every=2, rules=data()).plan()
        follow(plan, tmp_path / "plain")
        assert not (tmp_path / "plain" / "examples.json").exists()
        figures = follow(plan.with_seed(0), tmp_path / "asked", watch=Watch(examples=True))
    assert json.loads((tmp_path / "asked" / "examples.json").read_text()) == {"told": {"score": [0.5, 0.333333]}}
    assert figures["told/score"] == 0.4
