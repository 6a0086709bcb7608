"""BERT and RoBERTa."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from models.attention import Attention
from models.families.family import named
from models.feed_forward import Activation, FeedForward
from models.heads import TiedHead
from models.norms import LayerNorm
from models.positions import LearnedPositions
from models.trunk import Trunk
from models.vocabulary import Vocabulary


def bert(
    vocabulary: Vocabulary,
    *,
    width: int = 768,
    layers: int = 12,
    heads: int = 12,
    hidden: int = 3072,
    longest: int = 512,
    types: int = 2,
    offset: int = 0,
    activation: Activation = "gelu",
    eps: float = 1e-12,
    dropout: float = 0.0,
    attention: Callable[..., nnx.Module] | None = None,
    trunk: Callable[..., Trunk] | None = None,
    rngs: nnx.Rngs,
) -> Trunk:
    """An encoder with learned positions, norms behind each branch, biases, and a transform before the tied head.

    RoBERTa is the same with types = 1, offset = 2 and eps = 1e-5.

    Args:
      vocabulary: of the tokens.
      width, layers, heads, hidden: D, L, H and the features inside a feed-forward layer.
      longest: tokens in the longest row.
      types: kinds of tokens, for pairs of texts.
      offset: unread rows at the head of the table of positions.
      activation, eps, dropout: of the feed-forward layers, of all norms, and of the branches.
      attention, trunk: the classes to build from, bound to what is left open: `backend`; `dtype`, `unroll`, `remat`, ...
      rngs: where the initial weights come from.

    Source: "BERT", Devlin et al., 2019; "RoBERTa", Liu et al., 2019.
    Differs: no dropout on embeddings and attention weights.
    """
    norm = partial(LayerNorm, eps=eps)
    made = (trunk or Trunk)(
        vocabulary,
        width=width,
        layers=layers,
        mixer=partial(attention or Attention, heads=heads, theta=None, bias=True),
        feed_forward=partial(FeedForward, hidden=hidden, activation=activation, bias=True),
        norm=norm,
        placement="post",
        dropout=dropout,
        positions=partial(LearnedPositions, longest=longest, offset=offset),
        types=types,
        embedding_norm=True,
        final_norm=False,
        head=partial(TiedHead, transform=True, activation=activation, norm=norm, bias=True),
        rngs=rngs,
    )
    sizes: dict[str, Any] = {
        "vocabulary": vocabulary.size,
        "width": width,
        "layers": layers,
        "heads": heads,
        "hidden": hidden,
    }
    sizes |= {"longest": longest, "types": types}
    return named(made, "bert", sizes | {"offset": offset, "activation": activation, "eps": eps})
