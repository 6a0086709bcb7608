"""Masks beside the same relations in numpy, and a tiny float64 trunk on which every influence shows."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from awkward import VOCABULARY
from flax import nnx

from models import (
    Attention,
    Bidirectional,
    Block,
    ByRow,
    Causal,
    Chunk,
    Experts,
    FeedForward,
    Matrix,
    Permutation,
    Prefix,
    RMSNorm,
    Sentinel,
    Trunk,
    Window,
)
from models.masks import Tokens

S, D = 11, 8
# Two documents and two slots of padding, the same in every row.
SEGMENTS = np.array([1] * 5 + [2] * 4 + [0] * 2, np.int32)
POSITIONS = np.array([*range(5), *range(4), 0, 0], np.int32)
DRAW = np.random.default_rng(0)
ORDER = DRAW.permutation(S).astype(np.int32)
RANDOM = DRAW.random((S, S)) < 0.4
INSIDE = (POSITIONS < 3) & (SEGMENTS == 1)
QUERY, KEY = np.arange(S)[:, None], np.arange(S)[None, :]
PLACE, THERE = POSITIONS[:, None], POSITIONS[None, :]

# Each mask beside the same relation in numpy, without the segment rule.
MASKS = {
    "encoder": (Bidirectional(), np.ones((S, S), bool)),
    "causal": (Causal(), KEY <= QUERY),
    "prefix": (Prefix(INSIDE[None]), (KEY <= QUERY) | INSIDE[None, :]),
    "window": (Window(2, 1), (THERE - PLACE <= 1) & (PLACE - THERE <= 2)),
    "window behind": (Window(1), (THERE - PLACE <= 0) & (PLACE - THERE <= 1)),
    "chunk": (Chunk(2), THERE // 2 == PLACE // 2),
    "sentinel": (Sentinel(1), (THERE < 1) | (PLACE < 1)),
    "permutation": (Permutation(ORDER[None]), ORDER[None, :] <= ORDER[:, None]),
    "matrix": (Matrix(RANDOM[None]), RANDOM),
    "causal & chunk": (Causal() & Chunk(3), (KEY <= QUERY) & (THERE // 3 == PLACE // 3)),
    "window | sentinel": (Window(1, 1) | Sentinel(2), (abs(THERE - PLACE) <= 1) | (THERE < 2) | (PLACE < 2)),
    "(causal & window) | chunk": (
        (Causal() & Window(2)) | Chunk(2),
        ((KEY <= QUERY) & (abs(THERE - PLACE) <= 2) & (THERE <= PLACE)) | (THERE // 2 == PLACE // 2),
    ),
}
SAME = (SEGMENTS[:, None] == SEGMENTS[None, :]) & (SEGMENTS[None, :] > 0)
TOKENS = Tokens(jnp.arange(S), jnp.asarray(SEGMENTS[None]), jnp.asarray(POSITIONS[None]))


def one_a_row(masks):
    """A mask under which row i has the i-th mask: two modes in one batch, as often as needed."""
    whole = masks[-1]
    for i in reversed(range(len(masks) - 1)):
        whole = ByRow(jnp.arange(len(masks)) == i, masks[i], whole)
    return whole


ALL = one_a_row([mask for mask, _ in MASKS.values()])
ROWS = len(MASKS)
WHERE = {
    "segments": jnp.asarray(np.tile(SEGMENTS, (ROWS, 1))),
    "positions": jnp.asarray(np.tile(POSITIONS, (ROWS, 1))),
}
# Plain layers are scanned three times; the pattern twice, with one layer left over.
PATTERNS: dict[str, list] = {"plain": [None], "patterned": [Window(1, 1), Chunk(3)]}
LAYERS = {"plain": 3, "patterned": 5}


def trunk(pattern="plain", backend="xla", scan=True, feed_forward=None, remat="none"):
    """A tiny float64 trunk whose weights are large enough that every influence shows."""
    block = partial(
        Block,
        mixer=partial(Attention, heads=2, backend=backend),
        feed_forward=partial(FeedForward, hidden=8) if feed_forward is None else feed_forward,
        norm=RMSNorm,
    )
    made = nnx.eval_shape(
        lambda: Trunk(
            VOCABULARY,
            width=D,
            layers=LAYERS[pattern],
            pattern=[partial(block, mask=mask) for mask in PATTERNS[pattern]],
            dtype="float64",
            scan=scan,
            remat=remat,
            rngs=nnx.Rngs(0),
        )
    )
    graph, state = nnx.split(made)
    draw = np.random.default_rng(1)
    fill = lambda x: jnp.asarray(0.5 * draw.standard_normal(x.shape))
    return graph, jax.tree.map(fill, state)


def call(graph, state, mask=ALL, where=WHERE, **inputs):
    """Hidden states."""
    return nnx.merge(graph, state)(mask=mask, **where, **inputs).hidden


def joined(path):
    """A path as one name."""
    return "/".join(map(str, path))


def flat(state):
    """A state's arrays by name."""
    return {joined(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def closure(pattern, relation):
    """reach[q, k]: whether input k can move output q, over all layers, by products of boolean matrices."""
    masks = PATTERNS[pattern]
    reach = np.eye(S, dtype=bool)
    for i in range(LAYERS[pattern]):
        own = masks[i % len(masks)]
        allowed = relation & SAME
        if own is not None:
            allowed = allowed & np.asarray(own.allowed(TOKENS, TOKENS))[0]
        # The residual carries a token to itself even where it sees nothing.
        reach = (allowed | np.eye(S, dtype=bool)) @ reach
    return reach


FORMS = {
    "attention": None,
    "blocks": partial(Experts, experts=4, hidden=4),
    "dense": partial(Experts, experts=4, hidden=4, form="dense"),
}
