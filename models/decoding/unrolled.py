"""A model without scans, for fast steps."""

from __future__ import annotations

from typing import TypeVar

import jax
from flax import nnx

from models.encoder_decoder import EncoderDecoder
from models.stack import Stack
from models.trunk import Trunk

Model = TypeVar("Model", Trunk, EncoderDecoder)


def unrolled(model: Model) -> Model:
    """The same model with a block of its own for every layer.

    A scan copies each layer's weights and cache out of the stack in every step, as many bytes as the step reads anyway;
    apart they are read where they lie, and the cache is written in place. The price is a program that grows with depth.

    Args:
      model: it is left as it is; leaves that were not stacked are shared with it, the others copied.
    """
    made = nnx.merge(*nnx.split(model))
    for trunk in (made.encoder, made.decoder) if isinstance(made, EncoderDecoder) else (made,):
        _unroll(trunk.stack)
    return made


def _unroll(stack: Stack) -> None:
    layers = dict(stack.layers)
    for k, block in stack.scanned.items():
        graph, state = nnx.split(block)
        for r in range(stack.repetitions):
            layers[str(int(k) + r * stack.period)] = nnx.merge(graph, jax.tree.map(lambda x, r=r: x[r], state))
    stack.scanned, stack.layers, stack.repetitions = nnx.Dict({}), nnx.Dict(layers), 0
