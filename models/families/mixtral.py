"""Mixtral: a decoder in the manner of Mistral whose feed-forward layers are experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from models.attention import Attention
from models.block import Block
from models.families.family import named
from models.heads import Head, TiedHead
from models.masks import Window
from models.mixture.experts import Experts
from models.mixture.routers import TopKRouter
from models.norms import RMSNorm
from models.trunk import Trunk
from models.vocabulary import Vocabulary


def mixtral(
    vocabulary: Vocabulary,
    *,
    width: int = 4096,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int = 8,
    head_width: int | None = None,
    hidden: int = 14_336,
    experts: int = 8,
    top_k: int = 2,
    theta: float = 1_000_000.0,
    window: int | None = None,
    tied: bool = False,
    eps: float = 1e-5,
    dropout: float = 0.0,
    attention: Callable[..., nnx.Module] | None = None,
    feed_forward: Callable[..., nnx.Module] | None = None,
    trunk: Callable[..., Trunk] | None = None,
    rngs: nnx.Rngs,
) -> Trunk:
    """A decoder with grouped queries, rotary positions, RMSNorm and a few large experts.

    Args:
      vocabulary: of the tokens.
      width, layers, heads, hidden: D, L, H and the features inside an expert.
      kv_heads: heads with keys and values of their own.
      head_width: K; D / H by default.
      experts, top_k: how many there are, and how many a token goes to, weighted by their renormalised probabilities.
      theta: base of the rotary frequencies.
      window: tokens that a query sees, its own included; None for all.
      tied: whether the head's table is that of the embeddings.
      eps, dropout: of all norms, and of the branches.
      attention, feed_forward, trunk: the classes to build from, bound to what is left open: `backend`; `balance`, `form`;
        `dtype`, `unroll`, `remat`, ...
      rngs: where the initial weights come from.

    Source: "Mixtral of Experts", Jiang et al., 2024.
    Differs: nothing known.
    """
    norm = partial(RMSNorm, eps=eps)
    block = partial(
        Block,
        mixer=partial(attention or Attention, heads=heads, kv_heads=kv_heads, head_width=head_width, theta=theta),
        feed_forward=partial(
            feed_forward or Experts,
            experts=experts,
            top_k=top_k,
            hidden=hidden,
            router=partial(TopKRouter, renormalise=True),
        ),
        norm=norm,
        mask=None if window is None else Window(window - 1),
        dropout=dropout,
    )
    made = (trunk or Trunk)(
        vocabulary,
        width=width,
        layers=layers,
        pattern=[block],
        norm=norm,
        head=TiedHead if tied else Head,
        rngs=rngs,
    )
    sizes: dict[str, Any] = {"vocabulary": vocabulary.size, "width": width, "layers": layers, "heads": heads}
    sizes |= {"kv_heads": kv_heads, "head_width": width // heads if head_width is None else head_width}
    sizes |= {"hidden": hidden, "experts": experts, "top_k": top_k, "theta": theta, "window": window}
    return named(made, "mixtral", sizes | {"tied": tied, "eps": eps})
