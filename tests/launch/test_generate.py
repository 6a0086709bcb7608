"""The command that goes on with prompts: what it prints, and what it refuses in one line."""

import dataclasses
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hub_cases import weight
from writing import VOCABULARY, writer

from launch import cli, verbs
from launch.generate import Options, check_room, cut, encoded, generate, reads
from models import LearnedPositions, Trunk, t5
from models.decoding import (
    Beam,
    Contrastive,
    Greedy,
    MinP,
    Prompts,
    Sampler,
    Stop,
    TopK,
    TopP,
    TrunkDecoder,
    decoder_of,
)
from models.decoding import generate as generated
from models.variables import flatten, replace_values
from partitioning.errors import UserError


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


class Letters:
    """A token a letter: a is 6; specials are nothing."""

    specials = VOCABULARY

    def encode(self, text):
        return np.array([ord(c) - ord("a") + 6 for c in text], np.int32)

    def decode(self, ids):
        return "".join(chr(int(i) - 6 + ord("a")) for i in ids if i >= 6)


@dataclasses.dataclass(frozen=True)
class Learned:
    """An objective."""

    continues: str | None


def run(continues="causal", begin="bos"):
    """A run of one stage whose rows have 12 tokens."""
    data = types.SimpleNamespace(begin=begin, end="sep")
    part = types.SimpleNamespace(objective=Learned(continues), data=data, length=12)
    return types.SimpleNamespace(parts=lambda: [part], restore=lambda folder: (writer(), Letters()))


def palmette(monkeypatch, *arguments, value=None):
    """Exit status."""
    saved = types.SimpleNamespace(value=run() if value is None else value)
    monkeypatch.setattr(verbs, "_saved", lambda folder, allow_import: saved)
    with pytest.raises(SystemExit) as done:
        cli.main(["generate", "folder", *arguments])
    return done.value.code


def test_what_is_printed(monkeypatch, capsys, tmp_path):
    """Prompts and continuations, as the loop gives them, and tokens a second; prompts from a file are the same."""
    (tmp_path / "prompts").write_text("abc\nf\n")
    assert palmette(monkeypatch, "abc", "f", "--tokens", "6") == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [[1, 6, 7, 8], [1, 11, 0, 0]]
    prompts = Prompts(jnp.asarray(rows), jnp.asarray(np.array(rows) > 0, jnp.int32))
    stop = Stop(length=6, ends=(2, 5))
    found = generated(TrunkDecoder(writer()), prompts, Greedy(), stop, jax.random.split(jax.random.key(0), 2))
    texts = [Letters().decode(row) for row in np.where(found.drawn, found.tokens, 0)]
    assert printed[:2] == ["abc" + texts[0], "f" + texts[1]]
    wrote = int(found.drawn[:, 1:].sum())
    assert printed[2].startswith("read 6 tokens at ")
    assert f"wrote {wrote} at " in printed[2]
    assert palmette(monkeypatch, "--prompts", str(tmp_path / "prompts"), "--tokens", "6") == 0
    assert capsys.readouterr().out.splitlines()[:2] == printed[:2]


def test_an_encoder_decoder_answers(monkeypatch, capsys):
    """Its text alone is printed, as the loop gives it; the prompt may fill the capacity that the text has for itself."""
    model = two_sided()
    value = run()
    value.restore = lambda folder: (model, Letters())
    assert palmette(monkeypatch, "abcdef", "f", "--tokens", "5", "--capacity", "7", value=value) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [[1, 6, 7, 8, 9, 10, 11], [1, 11, 0, 0, 0, 0, 0]]
    prompts = Prompts(jnp.asarray(rows), jnp.asarray(np.array(rows) > 0, jnp.int32))
    keys = jax.random.split(jax.random.key(0), 2)
    found = generated(decoder_of(model), prompts, Greedy(), Stop(length=5, ends=(2, 5)), keys)
    assert printed[:2] == [Letters().decode(row) for row in np.where(found.drawn, found.tokens, 0)]
    assert any(printed[:2])
    assert palmette(monkeypatch, "abcdefg", "--tokens", "5", "--capacity", "7", value=value) == 2
    assert "prompt 1 has 8 tokens" in capsys.readouterr().err


def two_sided():
    """A small T5 whose weights matter."""
    sizes = {"width": 8, "layers": 2, "heads": 2, "head_width": 4, "hidden": 12, "buckets": 8, "longest": 8}
    made = t5(VOCABULARY, **sizes, tied=False, trunk=partial(Trunk, vocab_multiple=8), rngs=nnx.Rngs(0))
    values = {name: jnp.asarray(weight("d" + name, leaf.shape)) for name, leaf in flatten(made, nnx.Param).items()}
    replace_values(made, values)
    return made


def test_a_seed_and_a_stop_string():
    """The same draw again by the same seed, another by another; the text is cut before the string."""
    ids, ends = encoded(Letters(), run().parts()[0].data, ["abc"])
    np.testing.assert_array_equal(ids[0], [1, 6, 7, 8])
    assert ends == (2, 5)
    draw = lambda seed, stops=(): generate(
        writer(), Letters(), ids, options=Options(temperature=5.0, seed=seed), tokens=12, ends=(), stops=stops
    )
    (text,) = draw(1).texts
    assert draw(1, stops=(text[3:5], text[2:4])).texts == [cut(text, [text[3:5], text[2:4]])]
    assert draw(2).texts != [text]
    assert cut("abcabd", ["c", "ab"]) == ""
    assert cut("abcabd", ["x", "ca"]) == "ab"


@pytest.mark.parametrize(
    ("options", "strategy"),
    [
        ({}, Greedy()),
        ({"temperature": 0.5}, Sampler(temperature=0.5)),
        (
            {"top_k": 4, "top_p": 0.9, "min_p": 0.1, "seed": 3},
            Sampler(filters=(TopK(k=4), TopP(p=0.9), MinP(p=0.1))),
        ),
        ({"beams": 3}, Beam(beams=3)),
        ({"contrastive": 0.6}, Contrastive(alpha=0.6, candidates=4)),
        ({"contrastive": 0.6, "top_k": 7}, Contrastive(alpha=0.6, candidates=7)),
    ],
    ids=str,
)
def test_options(options, strategy):
    """Each is a strategy."""
    assert Options(**options).strategy() == strategy


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["abc", "--beams", "3", "--top-k", "4"], "--beams and --top-k"),
        (["abc", "--beams", "3", "--seed", "4"], "--beams and --seed"),
        (["abc", "--contrastive", "0.5", "--min-p", "0.1"], "--contrastive and --min-p"),
        (["abc", "--seed", "1"], "--seed alone"),
        (["abc", "--top-p", "1.5"], "--top-p"),
        (["abc", "--temperature", "0"], "--temperature"),
        ([], "neither an argument nor --prompts"),
        (["abc", "--prompts", "x"], "both arguments and --prompts"),
        (["--prompts", "there/is/none"], "there/is/none: cannot be read"),
        (["abc", "a" * 8, "--tokens", "4"], "prompt 2 has 9 tokens, and 4 more do not fit into 12"),
    ],
    ids=str,
)
def test_refused(monkeypatch, capsys, arguments, told):
    """One line that names the option, status 2."""
    assert palmette(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_run_that_reads_both_ways_is_refused(monkeypatch, capsys):
    """By what it learned; a prefix objective reads prompts in both directions."""
    assert palmette(monkeypatch, "abc", value=run(None)) == 2
    assert "folder: its objective Learned trains no left-to-right model" in capsys.readouterr().err
    assert [reads(run(how), "folder") for how in ("causal", "prefix")] == [False, True]


def test_room():
    """What does not fit, learned positions that end before, and a prompt of nothing."""
    check_room(writer(), [np.arange(8)], 4, 12)
    with pytest.raises(UserError, match="prompt 1 has 9 tokens, and 4 more"):
        check_room(writer(), [np.arange(9)], 4, 12)
    learned = writer("learned positions")
    assert isinstance(learned.positions, LearnedPositions)
    with pytest.raises(UserError, match="--capacity 20: the run's learned positions end at 16"):
        check_room(learned, [np.arange(3)], 4, 20)
    with pytest.raises(UserError, match="prompt 2 is empty"):
        encoded(Letters(), run(begin=None).parts()[0].data, ["a", ""])
