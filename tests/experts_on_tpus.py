"""Compiles a layer of experts and its gradient for TPU chips that are not here: `experts_on_tpus.py ragged travel`.

A process of its own: libtpu refuses XLA's flags for CPUs. Prints what the program sends between the devices that share out
experts, as (kind, bytes, count); with `--text` the program.
"""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from models import Experts
from partitioning import fsdp, fsdp_expert
from partitioning.collectives import collectives
from partitioning.hlo import parse
from partitioning.topologies import topology

ROWS, LENGTH, WIDTH, EXPERTS, TOP_K = 8, 256, 256, 16, 4


def compiled(form, rules):
    """The optimised gradient of a layer by its weights and states, in bfloat16, and the mesh."""
    place = rules.place(topology("v5p:2x2x2").devices())
    build = lambda: Experts(WIDTH, experts=EXPERTS, top_k=TOP_K, hidden=512, form=form, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(build))
    shaped = lambda x, at, dtype=None: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=at)
    whole = jax.tree.map(lambda x: x.replace(shaped(x.get_value(), place.parameter(x.get_metadata()["axes"], x.shape, "w"))), state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    x = jnp.zeros((ROWS, LENGTH, WIDTH), jnp.bfloat16)
    x = shaped(x, place.rows(x.shape, "x"))
    present = shaped(jnp.ones((ROWS, LENGTH), bool), place.rows((ROWS, LENGTH), "present"))

    def loss(state, x, present):
        out, sides = nnx.merge(graph, state)(x, present)
        return (out.astype(jnp.float32) ** 2).sum() + sides["z"].total

    with place.scope():
        return jax.jit(jax.grad(loss, (0, 1))).lower(whole, x, present).compile(), place.mesh


if __name__ == "__main__":
    rules = {"travel": fsdp_expert(4), "gather": fsdp(), "tensor": fsdp_expert(2, tensor=2)}[sys.argv[2]]
    program, mesh = compiled(sys.argv[1], rules)
    text = program.as_text()
    if "--text" in sys.argv:
        sys.stdout.write(text)
    else:
        sent = [(one.kind, one.bytes, one.count) for one in collectives(parse(text), mesh) if "expert" in one.axes]
        sys.stdout.write(json.dumps(sent))
