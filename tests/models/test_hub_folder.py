"""Folders in the Hugging Face layout that are wrong, and trunks that the layout does not have: one line each."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from models import Llama3Scaling, Trunk, Vocabulary, bert, llama
from models.hub.folder import Folder, export
from models.stack import unstack
from models.variables import flatten
from partitioning import UserError

VOCABULARY = Vocabulary(size=21, pad=0, bos=1, eos=2, mask=-1, cls=-1, sep=-1)
SIZES = {"width": 8, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 12}


def small_llama(**changes):
    """The same weights at each call."""
    return llama(VOCABULARY, **SIZES, **changes, rngs=nnx.Rngs(0))


def arrays(trunk):
    """A trunk's parameters by index."""
    return {name: np.asarray(value) for name, value in unstack(flatten(trunk, nnx.Param)).items()}


def load(folder, trunk=None):
    trunk = small_llama() if trunk is None else trunk
    return Folder.open(folder).load(trunk, {name: value.shape for name, value in arrays(trunk).items()})


@pytest.fixture
def folder(tmp_path):
    """A small Llama."""
    trunk = small_llama()
    return export(tmp_path / "model", trunk, arrays(trunk))


def rewrite(folder, **changes):
    """The folder with some tensors replaced, or taken away by None."""
    path = folder / "model.safetensors"
    found = load_file(path) | changes
    save_file({name: value for name, value in found.items() if value is not None}, path)


def test_what_was_written_is_read(folder):
    found, left = load(folder)
    expected = arrays(small_llama())
    assert not left
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Rows past the vocabulary stand for no token.
        cut = slice(VOCABULARY.size) if name == "table" else slice(None)
        np.testing.assert_array_equal(found[name][cut], value[cut])
        assert name != "table" or not found[name][VOCABULARY.size :].any()


def test_a_tensor_without_a_place_is_named(folder):
    rewrite(folder, **{"score.weight": np.ones((2, 8), np.float32), "lm_head.weight": np.ones((21, 8), np.float32)})
    # The head is tied: what was written out beside the embeddings only repeats them.
    assert load(folder)[1] == ["score.weight"]


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NORM = np.ones(8, np.float32)
WRONG = {
    "unknown kind": (lambda f: edit(f, model_type="mamba"), r"model_type = 'mamba': expected one of bert, .*llama"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "key missing": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        "num_attention_heads is missing",
    ),
    "another size": (lambda f: edit(f, intermediate_size=16), "hidden is 16 there and 12 here"),
    "too few tokens": (lambda f: edit(f, vocab_size=20), "20 tokens, the data's tokenizer 21"),
    "variant": (lambda f: edit(f, hidden_act="gelu"), "hidden_act = 'gelu': expected 'silu'"),
    "scaling": (lambda f: edit(f, rope_parameters={"rope_type": "dynamic"}), "rope_type = 'dynamic': expected default"),
    "missing shard": (lambda f: shard(f, "model-1.safetensors"), "model-1.safetensors: no such file: a shard"),
    "a way out": (
        lambda f: shard(f, "../model.safetensors"),
        "names the file '../model.safetensors': expected one beside",
    ),
    "missing tensor": (
        lambda f: rewrite(f, **{"model.norm.weight": None}),
        "1 tensors are missing, first 'model.norm.weight'",
    ),
    "wrong shape": (
        lambda f: rewrite(f, **{"model.norm.weight": np.ones(9, np.float32)}),
        r"tensor model.norm.weight has shape \[9\], expected \[8\]",
    ),
    "cut short": (cut, "is no whole safetensors file"),
    "header cut short": (header, "is no whole safetensors file"),
    "pickled": (pickled, r"pickled \(pytorch_model.bin\), and nothing is unpickled here: convert"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_folder_is_one_line(folder, wrong):
    spoil, words = WRONG[wrong]
    spoil(folder)
    with pytest.raises(UserError, match=words) as raised:
        load(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_trunks_that_do_not_fit(folder, tmp_path):
    other = bert(VOCABULARY, width=8, layers=1, heads=2, hidden=8, longest=8, rngs=nnx.Rngs(0))
    with pytest.raises(
        UserError, match=r"holds a llama, the trunk is a bert: expected training\.Run\.model = @models\.llama"
    ):
        load(folder, other)
    plain = Trunk(VOCABULARY, width=8, layers=1, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="of no family"):
        load(folder, plain)
    with pytest.raises(UserError, match="of no family, and `transformers` does not have its architecture"):
        export(tmp_path / "plain", plain, arrays(plain))
    gated = small_llama(output_gate=True)
    with pytest.raises(UserError, match="none that `transformers` has"):
        export(tmp_path / "gated", gated, arrays(gated))
    with pytest.raises(UserError, match="is there already"):
        export(folder, small_llama(), arrays(small_llama()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_failed_export_leaves_nothing(tmp_path):
    trunk = small_llama()
    with pytest.raises(TypeError):
        export(tmp_path / "model", trunk, arrays(trunk), extra={"tokenizer.json": 3})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scaling", [None, Llama3Scaling(factor=2.0, longest=16)])
def test_an_exported_scaling_comes_back(tmp_path, scaling):
    trunk = small_llama(scaling=scaling, tied=False, qk_norm=True)
    export(tmp_path / "model", trunk, arrays(trunk))
    opened = Folder.open(tmp_path / "model")
    assert opened.sizes["scaling"] == scaling
    graph = nnx.split(opened.trunk(VOCABULARY, rngs=nnx.Rngs(0)))[0]
    assert jax.tree.structure(graph) == jax.tree.structure(nnx.split(trunk)[0])
