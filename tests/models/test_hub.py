"""Families against `transformers`, by the logits that it gave once (make_hub_golden.py) for weights of known names."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from flax import nnx
from hub_cases import GOLDEN, HERE, VOCABULARY, imported, logits, weight
from safetensors.numpy import save_file

from models.hub.folder import FAMILIES, Folder
from models.stack import unstack
from models.variables import Statistic, flatten
from partitioning import UserError

with np.load(GOLDEN) as file:
    CASES = {
        name.removesuffix("/config"): json.loads(str(file[name])) for name in file.files if name.endswith("/config")
    }
    LOGITS = {name: file[f"{name}/logits"] for name in CASES}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """Its name, and a folder with the weights under their names."""
    (tmp_path / "config.json").write_text(json.dumps(CASES[request.param]))
    opened = Folder.open(tmp_path)
    trunk = nnx.eval_shape(lambda: opened.trunk(VOCABULARY, rngs=nnx.Rngs(0)))
    shapes = {name: leaf.shape for name, leaf in jax.eval_shape(unstack, flatten(trunk, nnx.Param)).items()}
    layout = FAMILIES[opened.family][1]
    arrays = {}
    for tensor in layout.tensors(trunk.family, shapes[layout.table][0]):
        shape = tensor.go(*(np.zeros(shapes[leaf], np.float32) for leaf in tensor.leaves)).shape
        arrays[tensor.name] = weight(tensor.name, shape)
    save_file(arrays, tmp_path / "model.safetensors")
    return request.param, tmp_path


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
def test_logits_are_those_of_transformers(case, scan):
    """Rows of unequal length, within 1e-4 of the largest."""
    name, folder = case
    trunk, _ = imported(folder, scan=scan)
    found = np.asarray(nnx.jit(logits)(trunk))
    np.testing.assert_allclose(found[HERE], LOGITS[name][HERE], rtol=0, atol=1e-4 * max(1, np.abs(LOGITS[name]).max()))


def test_biases_of_routers_that_have_moved_are_refused(tmp_path):
    """They are no parameters here: neither read as if they were 0, nor left out of what is written."""
    (tmp_path / "config.json").write_text(json.dumps(CASES["deepseek"]))
    opened = Folder.open(tmp_path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    save_file({name: np.full(8, 0.5, np.float32)}, tmp_path / "model.safetensors")
    trunk = opened.trunk(VOCABULARY, rngs=nnx.Rngs(0))
    shapes = {path: leaf.shape for path, leaf in unstack(flatten(trunk, nnx.Param)).items()}
    with pytest.raises(UserError, match=r"gate\.e_score_correction_bias is not 0 everywhere"):
        opened.load(trunk, shapes)
    save_file({name: np.zeros(8, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tensors are missing"):
        opened.load(trunk, shapes)
    layout = FAMILIES["deepseek"][1]
    layout.config(trunk)
    for _, bias in nnx.to_flat_state(nnx.state(trunk, Statistic)):
        bias.set_value(bias.get_value() + 1)
    with pytest.raises(UserError, match="biases have moved from 0"):
        layout.config(trunk)
