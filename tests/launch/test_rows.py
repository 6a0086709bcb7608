"""The rows that are shown are the rows that the model is given."""

import json
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import optax
import pytest

import data
import models
import objectives
import training
from launch import cli
from launch.rows import batch_of, lines, shown, spelt
from partitioning import UserError

TEXTS = [{"text": f"number {i}:\nwords and words " + "more " * (i % 7)} for i in range(90)]
MODEL = partial(models.Trunk, width=16, layers=1, mixer=partial(models.Attention, heads=2))


def run_of(objective, examples=TEXTS, **options):
    given = {"steps": 3, "batch_size": 8, "length": 48, "data": data.Records(examples=examples)} | options
    optimizer = training.AdamW(learning_rate=1e-3)
    return training.Run(model=MODEL, objective=objective, optimizer=optimizer, **given)


def test_it_is_what_training_sees(tmp_path):
    """A run's own step notes what its objective hid, in two stages; each is what is shown of that step.

    The mixture's weights are schedules: from one source to the other within the first stage.
    """
    noted = {}

    @dataclass(frozen=True, kw_only=True)
    class Noting(objectives.GPTBert):
        """Notes the step, the rows and the tokens."""

        def hide(self, batch, trunk, *, step, key):
            out = super().hide(batch, trunk, step=step, key=key)
            jax.debug.callback(lambda *seen: noted.__setitem__(int(seen[0]), seen[1:]), step, batch["row"], out[1])
            return out

    objective = Noting(ratio=0.5)
    stages = [training.Stage(steps=2), training.Stage(steps=1, length=32, batch_size=16)]
    sources = {"a": data.Records(examples=TEXTS), "b": data.Records(examples=TEXTS[:50])}
    weights = {"a": optax.linear_schedule(1.0, 0.0, 2), "b": optax.linear_schedule(0.0, 1.0, 2)}
    mixed = data.Mixture(sources=sources, weights=weights)
    run = run_of(objective, steps=None, stages=stages, seed=7, data=mixed, log_every=1)
    run.train(tmp_path / "run")
    jax.effects_barrier()
    known = dict(noted)
    logged = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    logged = [line for line in logged if "loss" in line]
    for step in range(3):
        batch, tokenizer, what = batch_of(run, step)
        row, seen = (np.asarray(array) for array in known[step])
        np.testing.assert_array_equal(batch["tokens"], seen[np.argsort(row)])
        assert (batch["source"] == 0).sum() in ((8,), range(1, 8), (0,))[step]
        figures = logged[step]
        given = [
            (np.concatenate([batch_of(run, s)[0]["source"] for s in range(step + 1)]) == index).sum()
            for index in (0, 1)
        ]
        readers = [source.open() for source in sources.values()]
        epochs = [n / reader.rows(length=seen.shape[1]) for n, reader in zip(given, readers, strict=True)]
        assert [figures["epoch/a"], figures["epoch/b"]] == epochs
        assert (batch["hidden"] | (batch["tokens"] != tokenizer.specials.mask)).all()
        assert "hidden by Noting" in what
    with pytest.raises(UserError, match="step 3: the run's last step is 2"):
        batch_of(run, 3)
    both = run_of(objective, data=mixed, controllers=[objectives.ExcessLossMixing()])
    with pytest.raises(UserError, match="the mixture's weights are schedules and the run has controllers"):
        both.plan()


def test_the_segments_are_the_whole_row():
    batch, tokenizer, what = batch_of(run_of(objectives.MaskedLM()), 0)
    for row in range(8):
        found = list(lines(batch, row))
        np.testing.assert_array_equal(
            np.concatenate([line.tokens for line in found]), batch["tokens"][row][batch["segments"][row] > 0]
        )
        assert [line.segment for line in found] == list(range(1, batch["segments"][row].max() + 1))
        for line in found:
            marked = [text for text, kind in spelt(line, tokenizer) if kind == "hidden"]
            assert bool(marked) == bool(line.hidden.any())
    plain, tokenizer, what = batch_of(run_of(objectives.CausalLM()), 0)
    assert "as they are read: what CausalLM may hide" in what
    line = next(lines(plain, 0))
    text = shown(line, tokenizer).plain
    assert text.startswith(f"row 0, segment 1, {len(line.tokens)} tokens: <bos>number")
    assert text.endswith("<eos>")
    assert "⏎" in text


def test_pairs_and_lists_are_named():
    examples = [{"query": f"q{i}", "candidates": [f"one{i}", f"two{i}"], "relevance": [1.0, 0.0]} for i in range(8)]
    batch, tokenizer, _ = batch_of(run_of(objectives.ListNet(), examples), 0)
    found = [
        (line.name, "".join(text for text, kind in spelt(line, tokenizer) if kind == "text"))
        for line in lines(batch, 3)
    ]
    number = found[2][1].removeprefix("q")
    assert found == [
        ("row 3, candidates 0", f"one{number}"),
        ("row 3, candidates 1", f"two{number}"),
        ("row 3, query", f"q{number}"),
    ]


def test_the_command_prints_plain_lines_without_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PALMETTE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("".join(r["text"] + "\n" for r in TEXTS))
    arguments = [
        "configs/masked_lm.gin",
        f"Cached.task = '{tmp_path}/text.txt'",
        "Run.length = 64",
        "Run.evaluators = []",
    ]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["prepare", *arguments])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["data", "show", *arguments, "--rows", "2"])
    out = capsys.readouterr().out
    assert "step 0: 32 rows of 64 tokens, " in out
    assert "\nrow 0, segment 1, " in out
    assert "\nrow 1, segment 1, " in out
    assert "row 2" not in out
    assert "\x1b" not in out
