"""Compiles the gradient of a trunk for four TPU chips that are not here, by libtpu's compiler: `splash_on_tpus.py splash`;
with `splash cut` rows are cut along their length.

A process of its own: libtpu refuses XLA's flags for CPUs. Prints how many kernels are in the program, and whether an array of
queries by keys is.
"""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
from awkward import VOCABULARY
from flax import nnx
from jax.experimental import topologies

from models import Attention, Block, Causal, FeedForward, RMSNorm, Trunk, Window
from partitioning import Rules, fsdp_sequence, fsdp_tensor


def compile_gradient(backend: str, rules: Rules, length: int) -> str:
    """The optimised program; rows and heads, or rows and their length, are cut over two chips each."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    place = rules.place(chips)
    block = partial(
        Block,
        mixer=partial(Attention, heads=4, kv_heads=2, backend=backend),
        feed_forward=FeedForward,
        norm=RMSNorm,
    )
    build = lambda: Trunk(
        VOCABULARY,
        width=128,
        layers=4,
        pattern=[partial(block, mask=mask) for mask in (Window(100), None)],
        dtype="bfloat16",
        rngs=nnx.Rngs(0),
    )
    graph, state = nnx.split(nnx.eval_shape(build))
    whole = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place.replicated)
    tokens = jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=place.rows((4, length), "tokens"))

    def loss(state, tokens, segments, positions):
        out = nnx.merge(graph, state)(tokens, segments=segments, positions=positions, mask=Causal())
        return out.hidden.astype(jnp.float32).sum()

    with place.scope():
        program = jax.jit(jax.grad(loss)).lower(jax.tree.map(whole, state), tokens, tokens, tokens).compile()
    return program.as_text()


if __name__ == "__main__":
    # A part of a row is a multiple of 128 tokens.
    rules, length = (fsdp_sequence(2), 1024) if "cut" in sys.argv else (fsdp_tensor(2), 1000)
    text = compile_gradient(sys.argv[1], rules, length)
    kernels = text.count('custom_call_target="tpu_custom_call"')
    queries = length // 2 if "cut" in sys.argv else length
    sys.stdout.write(json.dumps({"kernels": kernels, "matrix": f"{queries},{length}]" in text}))
