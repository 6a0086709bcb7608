"""Small models of the families that other layouts have: weights by name, a batch, and how ours are made of them."""

from __future__ import annotations

import zlib
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import Bidirectional, Causal, Trunk, Vocabulary
from models.hub.folder import Folder
from models.stack import layer_names, restack, unstack
from models.variables import flatten, replace_values

GOLDEN = Path(__file__).parent / "models" / "hub_golden.npz"
V, S = 83, 19
# Families that read from left to right.
DECODERS = ("deepseek", "llama", "minimax", "mixtral", "olmoe", "qwen3_next", "transnormer")
VOCABULARY = Vocabulary(size=V, pad=1, bos=0, eos=2, mask=4, cls=5, sep=6)
DRAW = np.random.default_rng(0)
# Rows of unequal length.
HERE = np.arange(S) < np.array([S, 12, 7])[:, None]
TOKENS = np.where(HERE, DRAW.integers(7, V, (3, S)), 1)
PULL = DRAW.standard_normal((3, S, V)).astype(np.float32) * HERE[..., None]
TARGETS = np.where(HERE, DRAW.integers(7, V, (3, S)), 1)
WHERE = {"segments": HERE.astype(np.int32), "positions": np.where(HERE, np.arange(S), 0)}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor that its name and shape decide, large enough to matter; scales of norms are about 1."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    scale = len(shape) == 1 and "norm" in name.lower() and name.endswith(("weight", "scale"))
    return draw * np.float32(0.3 if len(shape) > 1 else 0.1) + np.float32(scale)


def imported(folder, vocabulary=VOCABULARY, **options):
    """Our trunk with a folder's weights."""
    opened = Folder.open(folder)
    trunk = opened.trunk(vocabulary, rngs=nnx.Rngs(0), trunk=partial(Trunk, **options))
    shapes = flatten(trunk, nnx.Variable)
    names = layer_names(shapes)
    found, left = opened.load(trunk, {k: v.shape for k, v in unstack(shapes).items()})
    assert not left
    assert found.keys() == unstack(shapes).keys()
    replace_values(trunk, restack({k: jnp.asarray(v) for k, v in found.items()}, names))
    return trunk, found


def logits(trunk):
    """Scores of the batch; a decoder reads from left to right, an encoder-decoder writes the targets."""
    if trunk.family.name == "t5":
        where = {"target_segments": WHERE["segments"], "target_positions": WHERE["positions"]}
        return trunk.scores(trunk(TOKENS, targets=TARGETS, **WHERE, **where).hidden).logits()
    mask = Causal() if trunk.family.name in DECODERS else Bidirectional()
    return trunk.scores(trunk(TOKENS, mask=mask, **WHERE).hidden).logits()
