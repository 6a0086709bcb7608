"""Compiles a layer of experts and its gradient for eight TPU chips that are not here: `experts_on_tpus.py ragged travel`.

A process of its own: libtpu refuses XLA's flags for CPUs. Prints what the program sends between the chips that share out
experts, as (kind, bytes, count).
"""

import json
import sys

import jax
import jax.numpy as jnp
from flax import nnx

from models import Experts
from partitioning import Rules, fsdp_expert
from partitioning.collectives import collectives
from partitioning.hlo import parse
from partitioning.topologies import topology

ROWS, LENGTH, WIDTH = 8, 256, 256
RULES = {"travel": fsdp_expert(4), "tensor": fsdp_expert(2, tensor=2)}


def sent(form: str, rules: Rules) -> list[tuple[str, float, float]]:
    """By the gradient of a layer of 16 experts, four a token, in bfloat16."""
    place = rules.place(topology("v5p:2x2x2").devices())
    build = lambda: Experts(WIDTH, experts=16, top_k=4, hidden=512, form=form, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(build))
    shape = lambda of, dtype, sharding: jax.ShapeDtypeStruct(of, dtype, sharding=sharding)
    parameter = lambda x: x.replace(shape(x.shape, x.dtype, place.parameter(x.get_metadata()["axes"], x.shape, "w")))
    state = jax.tree.map(parameter, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    rows = place.rows((ROWS, LENGTH), "rows")
    x, present = shape((ROWS, LENGTH, WIDTH), jnp.bfloat16, rows), shape((ROWS, LENGTH), jnp.bool_, rows)

    def loss(state, x, present):
        out, sides = nnx.merge(graph, state)(x, present)
        return (out.astype(jnp.float32) ** 2).sum() + sides["z"].total

    with place.scope():
        text = jax.jit(jax.grad(loss, (0, 1))).lower(state, x, present).compile().as_text()
    found = collectives(parse(text), place.mesh)
    return [(one.kind, one.bytes, one.count) for one in found if "expert" in one.axes]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(sent(sys.argv[1], RULES[sys.argv[2]])))
