"""No output of a family depends on padding, on the other rows, on their order, or on what is packed beside it."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hub_cases import DECODERS, GOLDEN, HERE, TARGETS, TOKENS, VOCABULARY, weight

from models import Causal
from models.families.ltg_bert import ltg_bert
from models.hub.folder import FAMILIES
from models.variables import flatten, replace_values

with np.load(GOLDEN) as file:
    CASES = [name.removesuffix("/config") for name in file.files if name.endswith("/config")]
    CONFIGS = {name: json.loads(str(file[f"{name}/config"])) for name in CASES}
LENGTHS = HERE.sum(1)


def made(name):
    """A model with weights large enough to matter."""
    if name == "ltg_bert":
        make = lambda: ltg_bert(
            VOCABULARY, width=24, layers=3, heads=4, hidden=40, buckets=6, longest=16, rngs=nnx.Rngs(0)
        )
    else:
        family, layout = next(f for f in FAMILIES.values() if CONFIGS[name]["model_type"] in f[1].models)
        make = lambda: family(VOCABULARY, **layout.sizes(CONFIGS[name]), rngs=nnx.Rngs(0))
    model = make()
    values = {path: jnp.asarray(weight(path, leaf.shape)) for path, leaf in flatten(model, nnx.Param).items()}
    replace_values(model, values)
    return model


def run(model, tokens, targets, segments, positions):
    """Final states of every slot."""
    where = {"segments": segments, "positions": positions}
    if model.family.name == "t5":
        return model(tokens, **where, targets=targets, target_segments=segments, target_positions=positions).hidden
    return model(tokens, mask=Causal() if model.family.name in DECODERS else None, **where).hidden


@pytest.mark.parametrize("name", [*CASES, "ltg_bert"])
def test_a_document_is_alone_wherever_it_stands(name):
    """Within 1e-5 of the largest state: in a padded batch, in the batch turned round, by itself, and packed."""
    graph, state = nnx.split(made(name))
    states = jax.jit(lambda *inputs: run(nnx.merge(graph, state), *(jnp.asarray(x) for x in inputs)))
    inputs = (TOKENS, TARGETS, HERE.astype(np.int32), np.where(HERE, np.arange(HERE.shape[1]), 0))
    batch = states(*inputs)
    size = float(jnp.abs(batch[HERE]).max())

    def same(found, row):
        np.testing.assert_allclose(found, batch[row, : LENGTHS[row]], rtol=0, atol=1e-5 * size)

    turned = states(*(x[::-1] for x in inputs))
    for row, length in enumerate(LENGTHS):
        same(turned[len(LENGTHS) - 1 - row, :length], row)
    for row in (0, 1):
        same(states(*(x[row : row + 1, : LENGTHS[row]] for x in inputs))[0], row)
    tokens, targets, segments, positions = (np.concatenate([x[2, :7], x[1, :12]])[None] for x in inputs)
    packed = states(tokens, targets, segments * np.repeat([[2, 1]], [7, 12], axis=1), positions)[0]
    same(packed[:7], 2)
    same(packed[7:], 1)
