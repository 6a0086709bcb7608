"""What a run does besides training: it describes, prepares, evaluates and restores itself."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from functools import partial

import jax
import numpy as np
import pytest
from held_out import TEXTS, TOKENIZER, records
from running import record

import data
import training
from evaluation import CausalPerplexity, MaskedLikelihood
from models import Attention, Experts, FeedForward, Trunk
from objectives import CausalLM, MaskedLM
from partitioning import UserError, fsdp
from training import screen
from training.judging import judged, lines, open_judges, values_of
from training.programs import keep_programs
from training.progress import Progress
from training.step import Step
from training.store import Store


@pytest.fixture
def said(monkeypatch):
    """What is printed."""
    found = []
    monkeypatch.setattr(screen, "say", found.append)
    return found


def make(**changes):
    """A run of three steps."""
    given = {
        "model": partial(
            Trunk, width=16, layers=2, mixer=partial(Attention, heads=2), feed_forward=partial(FeedForward, hidden=16)
        ),
        "data": records(),
        "objective": MaskedLM(),
        "steps": 3,
        "batch_size": 8,
        "length": 16,
        "optimizer": training.AdamW(learning_rate=0.05),
        "average": training.Ema(decay=0.5),
        "evaluators": [MaskedLikelihood(data=records(), baseline=records(), rate=0.5, length=16, batch_size=8)],
        "rules": fsdp(),
    }
    return training.Run(**{**given, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, its folder, the figures at its end, and what it printed."""
    out = tmp_path_factory.mktemp("run")
    run = make()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        figures = run.train(out)
    return run, out, figures, printed.getvalue()


def test_evaluating_again_gives_the_figures_of_the_end(trained, said):
    run, out, figures, _ = trained
    found = run.evaluate(out)
    assert found == pytest.approx({name: value for name, value in figures.items() if name != "loss"}, rel=1e-6)
    assert {"masked/accuracy", "masked/accuracy/unigram", "masked/bits_per_token", "masked/bits_per_byte"} <= set(found)
    assert said[0] == f"{out}: checkpoint of step 3, averaged parameters"
    assert len(said) == 4
    assert "unigram" in said[1]
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {f"evaluation/{name}" for name in found} <= set().union(*logged)


def test_what_is_judged_are_the_averages(trained):
    """Judged from the whole restored state, as the loop does, the figures are those of the checkpoint's part."""
    run, out, *_ = trained
    plan = run.plan()
    state, _ = Store(plan, str(out / "checkpoints")).restore()
    step, values = Store(plan, str(out / "checkpoints")).values()
    expected = values_of(plan, state)
    assert step == 3
    for name, value in expected["params"].items():
        np.testing.assert_array_equal(values["params"][name], value)
        assert values["params"][name].sharding == plan.shardings.params[name]
    assert any(not np.array_equal(state.params[name], value) for name, value in expected["params"].items())


def test_restored_on_one_device_the_trunk_computes_the_same(trained):
    run, out, *_ = trained
    trunk, tokenizer = run.restore(out)
    assert tokenizer.identity == TOKENIZER.identity
    tokens = jax.numpy.asarray(tokenizer.encode("some text"))[None]
    call = {"segments": tokens * 0 + 1, "positions": jax.numpy.arange(tokens.shape[1])[None]}
    plan = run.plan()
    _, values = Store(plan, str(out / "checkpoints")).values()
    with plan.placement.scope():
        other = plan.trees.models(**values).module("trunk")
    np.testing.assert_allclose(trunk(tokens, **call).hidden, other(tokens, **call).hidden, rtol=1e-5, atol=1e-6)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(trunk.table.get_value())} == {1}


def test_without_an_average_the_last_parameters_are_judged(tmp_path, said):
    experts = partial(make().model, feed_forward=partial(Experts, experts=3, top_k=1, hidden=16))
    judge = CausalPerplexity(data=records(), length=16)
    run = make(model=experts, average=None, objective=CausalLM(), evaluators=[judge], rules=None)
    figures = run.train(tmp_path)
    found = run.evaluate(tmp_path)
    loads = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    numbers = {name: value for name, value in found.items() if name not in loads}
    assert numbers == pytest.approx({k: v for k, v in figures.items() if k != "loss"}, rel=1e-6)
    assert said[0].endswith("checkpoint of step 3")
    # Whom experts' tokens are goes where the other figures go: by expert to the metrics, by layer to the checkpoint too.
    assert sorted(loads) == [f"causal/experts/trunk/layers/{i}/load" for i in range(2)]
    assert any("largest/mean" in line for line in said)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (logged,) = [line for line in lines if "evaluation/causal/perplexity" in line]
    for name, load in loads.items():
        np.testing.assert_allclose(logged[f"evaluation/{name}"], load, rtol=1e-5)
    kept = record(tmp_path, 3)["metadata"]["figures"]
    assert kept == pytest.approx(numbers, rel=1e-6)


def test_what_cannot_be_evaluated(trained, tmp_path, said):
    run, out, *_ = trained
    with pytest.raises(UserError, match="no checkpoint in"):
        run.evaluate(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"bind training\.Run\.evaluators"):
        dataclasses.replace(run, evaluators=()).evaluate(out)
    with pytest.raises(UserError, match="trained on other data"):
        dataclasses.replace(run, data=records(TEXTS[:3])).restore(out)
    twice = dataclasses.replace(run, evaluators=[*run.evaluators, *run.evaluators])
    plan = twice.plan()
    _, values = Store(plan, str(out / "checkpoints")).values()
    with pytest.raises(UserError, match="two evaluators give the figure 'masked/accuracy'"):
        judged(open_judges(plan), values)


def test_baselines_stand_beside_what_they_are_compared_with():
    assert lines({"a/accuracy": 0.5, "a/bits": 2.0, "a/accuracy/unigram": 0.25}) == [
        "a/accuracy    0.5000   unigram   0.2500",
        "a/bits        2.0000",
    ]


def test_a_description_counts_what_the_state_holds(said):
    run = make(stages=[training.Stage(steps=2), training.Stage(steps=4, length=8, accumulate=1)], steps=None)
    run.describe()
    plan = run.plan()
    state = plan.init()
    text = "\n".join(said)
    leaves = jax.tree.leaves(state)
    here = sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards if shard.device == jax.devices()[0])
    whole = sum(x.nbytes for x in leaves)
    assert f"{whole / 1024:.1f} KiB, {here / 1024:.1f} KiB on each device" in text
    for name, leaf in state.params.items():
        row = next(line for line in said if line.startswith(name + " "))
        assert str(leaf.shape) in row
        assert str(leaf.sharding.spec) in row
    trained = next(line for line in said if line.startswith("trunk "))
    assert f"{sum(x.size for x in state.params.values()):,}" in trained
    assert any(line.split() == ["0-2", "MaskedLM", "16", "8", "256"] for line in said)
    assert any(line.split() == ["2-6", "MaskedLM", "8", "8", "256"] for line in said)


def test_all_that_a_run_reads_is_prepared_once(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS * 40))
    (tmp_path / "other.txt").write_text("\n\n".join(TEXTS * 30))
    cached = partial(data.Cached, folder=str(tmp_path / "cache"))
    text, other = cached(task=str(tmp_path / "text.txt")), cached(task=str(tmp_path / "other.txt"))
    held_out = cached(task=str(tmp_path / "text.txt"), split="validation")
    run = make(
        data=text,
        stages=[training.Stage(steps=1), training.Stage(steps=1, data=other)],
        steps=None,
        evaluators=[MaskedLikelihood(data=held_out, baseline=text)],
    )
    with pytest.raises(UserError, match="not prepared"):
        run.plan()
    told = []
    folders = run.prepare(report=told.append)
    assert [folder.split("/")[-1] for folder in folders] == ["text-bytes", "other-bytes"]
    assert [line for line in told if line.endswith("prepared")] == [f"{folder}: prepared" for folder in folders]
    assert run.plan().steps == 2
    told.clear()
    assert run.prepare(report=told.append) == folders
    assert told == [f"{folder}: already prepared" for folder in folders]


def test_programs_are_kept_where_the_user_has_not_chosen(monkeypatch, tmp_path):
    set_to = {}
    monkeypatch.setattr(jax.config, "update", set_to.__setitem__)
    monkeypatch.setenv("PALMETTE_CACHE", str(tmp_path))
    # The session has chosen a place.
    keep_programs()
    assert set_to == {}
    with jax._src.config.compilation_cache_dir(None):
        with jax._src.config.enable_compilation_cache(False):
            keep_programs()
        assert set_to == {}
        keep_programs()
    assert set_to == {"jax_compilation_cache_dir": str(tmp_path / "xla")}


def test_mfu_and_its_formula_are_shown(trained):
    *_, printed = trained
    assert printed.count("MFU = model FLOPs / (seconds x devices x peak) = ") == 1
    assert "/ (seconds of a step x 8 x " in printed
    assert "MFU " in next(line for line in printed.splitlines() if line.startswith("step 3/3"))


def test_debugged_steps_are_those_of_the_program_and_each_is_told_before_the_next(tmp_path, monkeypatch):
    small = {
        "model": partial(make().model, layers=1),
        "objective": CausalLM(),
        "steps": 2,
        "average": None,
        "evaluators": [],
        "rules": None,
    }
    compiled = make(**small).train(tmp_path / "compiled")
    order = []
    step, update = Step.__call__, Progress.update
    monkeypatch.setattr(Step, "__call__", lambda *a: order.append("step") or step(*a))
    monkeypatch.setattr(Progress, "update", lambda *a, **k: order.append("told") or update(*a, **k))
    debugged = make(**small).train(tmp_path / "debugged", debug=True)
    assert debugged["loss"] == pytest.approx(compiled["loss"], rel=1e-5)
    assert order[-4:] == ["step", "told", "step", "told"]
