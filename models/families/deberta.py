"""DeBERTa, versions 2 and 3."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from models.disentangled import DisentangledAttention
from models.families.family import named
from models.feed_forward import Activation, FeedForward
from models.heads import TiedHead
from models.norms import LayerNorm
from models.relative import RelativePlaces
from models.trunk import Trunk
from models.vocabulary import Vocabulary


def deberta(
    vocabulary: Vocabulary,
    *,
    width: int = 768,
    layers: int = 12,
    heads: int = 12,
    hidden: int = 3072,
    buckets: int = 256,
    longest: int = 512,
    types: int = 0,
    activation: Activation = "gelu",
    eps: float = 1e-7,
    dropout: float = 0.0,
    attention: Callable[..., nnx.Module] | None = None,
    trunk: Callable[..., Trunk] | None = None,
    rngs: nnx.Rngs,
) -> Trunk:
    """An encoder whose attention scores content and distances apart, built otherwise as BERT.

    Args:
      vocabulary: of the tokens.
      width, layers, heads, hidden: D, L, H and the features inside a feed-forward layer.
      buckets, longest: of distances, as in `models.RelativePlaces`.
      types: kinds of tokens, for pairs of texts; 0 for none.
      activation, eps, dropout: of the feed-forward layers, of all norms, and of the branches.
      attention, trunk: the classes to build from, bound to what is left open: `backend`; `dtype`, `unroll`, `remat`, ...
      rngs: where the initial weights come from.

    Source: "DeBERTa: Decoding-enhanced BERT with Disentangled Attention", He et al., 2021; "DeBERTaV3", He et al., 2023.
    Differs: no absolute positions before the head, as in the released models; no dropout on embeddings, distances and
      attention weights.
    """
    norm = partial(LayerNorm, eps=eps)
    made = (trunk or Trunk)(
        vocabulary,
        width=width,
        layers=layers,
        mixer=partial(attention or DisentangledAttention, heads=heads),
        feed_forward=partial(FeedForward, hidden=hidden, activation=activation, bias=True),
        norm=norm,
        placement="post",
        dropout=dropout,
        relative=partial(RelativePlaces, buckets=buckets, longest=longest, norm=norm),
        types=types,
        embedding_norm=True,
        final_norm=False,
        head=partial(TiedHead, transform=True, activation=activation, norm=norm, bias=True),
        rngs=rngs,
    )
    sizes: dict[str, Any] = {"vocabulary": vocabulary.size, "width": width, "layers": layers, "heads": heads}
    sizes |= {"hidden": hidden, "buckets": buckets, "longest": longest, "types": types}
    return named(made, "deberta", sizes | {"activation": activation, "eps": eps})
