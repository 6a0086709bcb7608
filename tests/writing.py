"""Small models that continue texts, and what they would write if every token took full passes over the text so far."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import (
    Attention,
    Block,
    Causal,
    Chunk,
    Experts,
    FeedForward,
    Head,
    LearnedPositions,
    RMSNorm,
    Trunk,
    Vocabulary,
    Window,
    llama,
)
from models.decoding import Prompts

VOCABULARY = Vocabulary(size=13, pad=0, bos=1, eos=2, mask=3, cls=4, sep=5)
BLOCK = partial(Block, mixer=partial(Attention, heads=2), feed_forward=partial(FeedForward, hidden=8), norm=RMSNorm)
PLAIN = partial(
    Trunk,
    width=8,
    layers=3,
    mixer=partial(Attention, heads=2),
    feed_forward=partial(FeedForward, hidden=8),
    # A tied table that is as large as this would mostly score a token against itself.
    head=Head,
    vocab_multiple=8,
    dtype="float64",
)
GROUPED = partial(Attention, heads=4, kv_heads=2, head_width=4)
WRITERS = {
    "plain": PLAIN,
    "windows": partial(PLAIN, layers=5, pattern=[partial(BLOCK, mask=Window(1)), partial(BLOCK, mask=Chunk(3))]),
    "learned positions": partial(
        PLAIN, positions=partial(LearnedPositions, longest=16), mixer=partial(Attention, heads=2, theta=None)
    ),
    "experts": partial(
        PLAIN, pattern=[partial(BLOCK, feed_forward=partial(Experts, experts=4, hidden=4), mixer=GROUPED)]
    ),
    "llama": partial(
        llama,
        width=8,
        layers=4,
        heads=4,
        kv_heads=2,
        hidden=12,
        window=4,
        qk_norm=True,
        output_gate=True,
        tied=False,
        trunk=partial(Trunk, dtype="float64", vocab_multiple=8),
    ),
}


def writer(name="plain", vocabulary=VOCABULARY, size=0.5):
    """A trunk whose weights are large enough that every token before moves the next."""
    made = nnx.eval_shape(lambda: WRITERS[name](vocabulary, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(made)
    draw = np.random.default_rng(4)
    fill = lambda x: jnp.asarray(size * draw.standard_normal(x.shape))
    return nnx.merge(graph, jax.tree.map(fill, state))


def prompts(*sizes, width=None, seed=4):
    """One document a row, of these sizes; what stands in the padding is no padding token."""
    draw = np.random.default_rng(seed)
    width = max(sizes) if width is None else width
    tokens = draw.integers(6, VOCABULARY.size, (len(sizes), width)).astype(np.int32)
    return Prompts(jnp.asarray(tokens), jnp.asarray(np.arange(width) < np.array(sizes)[:, None], jnp.int32))


def full_passes(trunk, length):
    """A function from ids to the states and logits at all of them, in one uncached pass over a row of `length` slots."""
    graph, state = nnx.split(trunk)

    @jax.jit
    def run(state, tokens, size):
        model = nnx.merge(graph, state)
        here = jnp.arange(length) < size
        out = model(
            tokens, segments=here[None].astype(jnp.int32), positions=jnp.arange(length)[None] * here, mask=Causal()
        )
        return out.hidden[0], model.scores(out.hidden[0]).logits()

    def passed(ids):
        row = np.zeros((1, length), np.int32)
        row[0, : len(ids)] = ids
        hidden, logits = run(state, jnp.asarray(row), len(ids))
        return np.asarray(hidden)[: len(ids)], np.asarray(logits)[: len(ids)]

    return passed


def texts(found):
    """The ids of each prompt."""
    return [list(np.asarray(t)[np.asarray(s) > 0]) for t, s in zip(found.tokens, found.segments, strict=True)]


def log_softmax(x):
    """In numpy, over the last dimension."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
