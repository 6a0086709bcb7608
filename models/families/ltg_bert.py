"""LTG-BERT, the encoder of small corpora."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from models.block import Block
from models.disentangled import DisentangledAttention
from models.families.family import named
from models.feed_forward import FeedForward
from models.heads import TiedHead
from models.initializers import deviating
from models.norms import LayerNorm
from models.relative import RelativePlaces
from models.trunk import Trunk
from models.vocabulary import Vocabulary


def ltg_bert(
    vocabulary: Vocabulary,
    *,
    width: int = 768,
    layers: int = 12,
    heads: int = 12,
    hidden: int = 2048,
    buckets: int = 32,
    longest: int = 512,
    eps: float = 1e-7,
    dropout: float = 0.0,
    attention: Callable[..., nnx.Module] | None = None,
    trunk: Callable[..., Trunk] | None = None,
    rngs: nnx.Rngs,
) -> Trunk:
    """An encoder with disentangled attention, gated feed-forward layers, and more norms than usual, most without weights.

    Norms without weights stand before both branches and inside the feed-forward layer; one with weights stands behind
    attention.

    Args:
      vocabulary: of the tokens.
      width, layers, heads, hidden: D, L, H and the features inside a feed-forward layer.
      buckets, longest: of distances, as in `models.RelativePlaces`.
      eps, dropout: of all norms, and of the branches.
      attention, trunk: the classes to build from, bound to what is left open: `backend`; `dtype`, `unroll`, `remat`, ...
      rngs: where the initial weights come from.

    Source: "Trained on 100 million words and still in shape: BERT meets British National Corpus", Samuel et al., 2023.
    Differs: weights do not begin smaller in deeper layers; no dropout on embeddings, distances and attention weights.
    """
    weighed = partial(LayerNorm, eps=eps)
    norm = partial(weighed, scale=False, bias=False)
    block = partial(
        Block,
        mixer=partial(attention or DisentangledAttention, heads=heads),
        mixer_out_norm=weighed,
        feed_forward=partial(FeedForward, hidden=hidden, activation="gelu_tanh", gated=True, inner_norm=norm),
        norm=norm,
        dropout=dropout,
    )
    made = (trunk or Trunk)(
        vocabulary,
        width=width,
        layers=layers,
        pattern=[block],
        norm=norm,
        relative=partial(RelativePlaces, buckets=buckets, longest=longest, rows=2 * buckets - 1, norm=weighed),
        embedding_norm=True,
        head=partial(TiedHead, transform=True, norm=norm, bias=True),
        rngs=rngs,
    )
    made = deviating(
        made, {"table|mixer/(query|key|value|out)|feed_forward/(inner|gate|outer)|head/dense": (0.4 / width) ** 0.5}
    )
    sizes: dict[str, Any] = {"vocabulary": vocabulary.size, "width": width, "layers": layers, "heads": heads}
    sizes |= {"hidden": hidden, "buckets": buckets, "longest": longest}
    return named(made, "ltg_bert", sizes | {"eps": eps})
