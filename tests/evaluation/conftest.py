"""A small model around which evaluators are opened, without a run."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from held_out import TOKENIZER, VOCABULARY

from models import Attention, FeedForward, Trunk
from models.variables import Buffer, flatten, rebuild
from objectives import Models
from partitioning import data as data_parallel


@pytest.fixture(scope="session")
def trunk():
    """Two layers, with weights far enough from their start that predictions differ."""
    make = partial(
        Trunk, width=16, layers=2, mixer=partial(Attention, heads=2), feed_forward=partial(FeedForward, hidden=16)
    )
    module = make(VOCABULARY, rngs=nnx.Rngs(0))
    for name, leaf in nnx.to_flat_state(nnx.state(module)):
        leaf.set_value(leaf.get_value() * (1.0 if "norm" in "/".join(map(str, name)) else 10.0))
    return module


@pytest.fixture(scope="session")
def judge(trunk):
    """Judges the trunk by an evaluator on so many devices."""
    return judging(trunk)


def judging(trunk):
    """Judges a trunk by an evaluator on so many devices."""
    graph, abstract = nnx.split(trunk)

    def run(evaluator, devices=1, scale=1.0, tokenizer=TOKENIZER):
        placement = data_parallel().place(jax.devices()[:devices])

        def models(params, frozen, buffers):
            return Models({"trunk": rebuild(graph, abstract, params | frozen | buffers)})

        params = {name: scale * jnp.asarray(np.asarray(x)) for name, x in flatten(trunk, nnx.Param).items()}
        buffers = {name: jnp.asarray(np.asarray(x)) for name, x in flatten(trunk, Buffer).items()}
        params, buffers = jax.device_put((params, buffers), placement.replicated)
        opened = evaluator.open(models=models, placement=placement, tokenizer=tokenizer)
        return opened({"params": params, "frozen": {}, "buffers": buffers})

    return run


@pytest.fixture(scope="session")
def rows():
    """Every row that an evaluator reads, one by one, as the readers give them."""

    def read(source, length):
        reader = source.open()
        count = reader.rows(length=length)
        return [
            {k: v[0] for k, v in reader.batch(i, batch_size=1, length=length, seed=0).items()} for i in range(count)
        ]

    return read
