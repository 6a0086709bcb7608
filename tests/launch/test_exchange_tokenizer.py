"""Tokenizers out with a model and in again: the same ids, the same specials, and data prepared with them."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import tokenizers as library
from running import devices, tiny
from tokenizers import decoders, models, pre_tokenizers, trainers

import data
from data.hub_tokenizers import around, files_of, spec_of
from launch import config
from launch.exchange import exported, imported
from models import bert
from objectives import MaskedLM, RandomTokens

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", "[unused2]"]
LINES = [f"Return the {w} of a list, if {i} is é or not." for i in range(30) for w in ("value", "key", "name")]
TEXTS = [*LINES[:3], "", " a  b\n\tc", "[MASK] and [CLS] as text", "日本 😀"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tokenizer.json with a BERT's specials: no [BOS], no [EOS], and tokens that are unused."""
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def write(folder, tokenizer):
    folder.mkdir(exist_ok=True)
    for name, text in files_of(tokenizer).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_specials_that_a_folder_lacks_get_tokens_nothing_was_trained_on(file):
    spec = spec_of(file.parent)
    assert spec.specials["eos"] == "[unused1]"
    assert spec.specials["bos"] == "[unused2]"
    assert around(spec) == ("cls", "sep")
    assert len(set(vars(spec.load().specials).values())) == 6


def test_a_token_that_two_specials_share_is_the_first_s(file, tmp_path):
    """As Llama's padding; and what the folder says goes before the usual spelling."""
    (tmp_path / "tokenizer.json").write_bytes(file.read_bytes())
    said = {"eos_token": {"content": "[SEP]"}, "pad_token": "[SEP]", "bos_token": "[CLS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    spec = spec_of(tmp_path)
    named = {"eos": "[SEP]", "bos": "[CLS]", "mask": "[MASK]", "pad": "[PAD]", "cls": "[unused1]", "sep": "[unused2]"}
    assert spec.specials == named
    assert around(spec) == ("bos", "eos")


def test_out_and_in_again_is_the_same_tokenizer(file, tmp_path):
    first = spec_of(file.parent).load()
    again = spec_of(write(tmp_path / "out", first)).load()
    assert again.identity == first.identity
    for text in TEXTS:
        np.testing.assert_array_equal(again.encode(text), first.encode(text))
    assert files_of(data.Bytes()) is None
    assert spec_of(tmp_path) is None


def test_a_model_takes_its_tokenizer_along(file, tmp_path):
    """Out of a run and into a config, whose data `prepare` then tokenises with it, for the same weights."""
    spec = spec_of(file.parent)
    sizes = {"width": 16, "layers": 1, "heads": 2, "hidden": 16, "longest": 16}
    rows = data.Records(examples=[{"text": line} for line in LINES], tokenizer=spec)
    objective = MaskedLM(select=RandomTokens(rate=0.3))
    run = tiny(model=partial(bert, **sizes), data=rows, objective=objective, steps=1, rules=None)
    with devices(1):
        run.train(tmp_path / "run")
        (said,) = exported(run, tmp_path / "run", tmp_path / "hf")
        assert "with its tokenizer" in said
        assert any(
            "`palmette prepare` will use it" in line for line in imported(tmp_path / "hf", tmp_path / "part.gin")
        )
        (tmp_path / "text.txt").write_text("\n".join(LINES))
        (tmp_path / "rest.gin").write_text(
            "from __gin__ import dynamic_registration\nimport data\nimport objectives\nimport training\n"
            f"training.Run.data = @data.Cached()\ndata.Cached.task = '{tmp_path / 'text.txt'}'\n"
            f"data.Cached.folder = '{tmp_path / 'cache'}'\n"
            "training.Run.objective = @objectives.MaskedLM()\n"
            "objectives.MaskedLM.select = @objectives.RandomTokens()\nobjectives.RandomTokens.rate = 0.3\n"
            "training.Run.steps = 1\ntraining.Run.batch_size = 2\ntraining.Run.length = 16\n"
            "training.Run.optimizer = @training.AdamW()\ntraining.AdamW.learning_rate = 0.1\n"
        )
        second = config.load([str(tmp_path / "part.gin"), str(tmp_path / "rest.gin")]).value
        second.prepare()
        plan = second.plan()
        assert plan.tokenizer.identity == spec.load().identity
        assert (second.data.begin, second.data.end) == ("cls", "sep")
        state, trained = plan.init(), run.restore(tmp_path / "run")[0]
        np.testing.assert_array_equal(state.params["trunk/table"][:300], trained.table.get_value()[:300])


@pytest.mark.long
def test_transformers_gives_the_same_ids(file, tmp_path):
    """And the same ids of specials. A text that spells one is text to us, and the token to `transformers`."""
    from transformers import AutoTokenizer

    ours = spec_of(file.parent).load()
    folder = write(tmp_path / "out", ours)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        if "[MASK]" not in text:
            assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text).tolist()
    assert theirs.decode(ours.encode(TEXTS[-1])) == TEXTS[-1]
    for name, i in vars(ours.specials).items():
        assert getattr(theirs, f"{name}_token_id") == i
