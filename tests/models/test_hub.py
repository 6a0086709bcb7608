"""Families against `transformers`, by the logits that it gave once (make_hub_golden.py) for weights of known names."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from flax import nnx
from hub_cases import GOLDEN, HERE, VOCABULARY, imported, logits, weight
from safetensors.numpy import load_file, save_file

from models.hub.folder import FAMILIES, Folder, export
from models.stack import unstack
from models.variables import Buffer, flatten, replace_values

with np.load(GOLDEN) as file:
    CASES = {
        name.removesuffix("/config"): json.loads(str(file[name])) for name in file.files if name.endswith("/config")
    }
    LOGITS = {name: file[f"{name}/logits"] for name in CASES}


def written(name, folder):
    """A case's folder, with the weights under their names."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CASES[name]))
    opened = Folder.open(folder)
    trunk = nnx.eval_shape(lambda: opened.trunk(VOCABULARY, rngs=nnx.Rngs(0)))
    shapes = {name: leaf.shape for name, leaf in jax.eval_shape(unstack, flatten(trunk, nnx.Variable)).items()}
    layout = FAMILIES[opened.family][1]
    arrays = {}
    for tensor in layout.tensors(trunk.family, shapes[layout.table][0]):
        shape = tensor.go(*(np.zeros(shapes[leaf], np.float32) for leaf in tensor.leaves)).shape
        arrays[tensor.name] = weight(tensor.name, shape)
    save_file(arrays, folder / "model.safetensors")
    return folder


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """Its name, and its folder."""
    return request.param, written(request.param, tmp_path)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
def test_logits_are_those_of_transformers(case, scan):
    """Rows of unequal length, within 1e-4 of the largest."""
    name, folder = case
    trunk, _ = imported(folder, scan=scan)
    found = np.asarray(nnx.jit(logits)(trunk))
    np.testing.assert_allclose(found[HERE], LOGITS[name][HERE], rtol=0, atol=1e-4 * max(1, np.abs(LOGITS[name]).max()))


def test_biases_of_routers_choose_experts_and_go_out_again(tmp_path):
    """They are buffers here. The golden logits are of biases that are not 0: with zeros they are others."""
    folder = written("deepseek", tmp_path / "in")
    trunk, found = imported(folder)
    biases = flatten(trunk, Buffer)
    assert biases
    out = export(tmp_path / "out", trunk, found)
    names = [name for name in load_file(folder / "model.safetensors") if name.endswith("e_score_correction_bias")]
    assert len(names) == 2
    for name in names:
        np.testing.assert_array_equal(load_file(out / "model.safetensors")[name], weight(name, (8,)))
    replace_values(trunk, {name: 0 * value for name, value in biases.items()})
    assert np.abs(np.asarray(nnx.jit(logits)(trunk))[HERE] - LOGITS["deepseek"][HERE]).max() > 0.01
