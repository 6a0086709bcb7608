"""MiniMax: lightning and softmax attention by turns, over experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from flax import nnx

from models.attention import Attention
from models.block import Block
from models.families.family import named
from models.heads import Head, TiedHead
from models.linear_attention.lightning import LightningAttention
from models.masks import Window
from models.mixture.experts import Experts
from models.mixture.routers import TopKRouter
from models.norms import RMSNorm
from models.trunk import Trunk
from models.vocabulary import Vocabulary

Kind = Literal["linear", "softmax"]


def minimax(
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
    pattern: Sequence[Kind] = ("softmax", "linear"),
    theta: float = 1_000_000.0,
    window: int | None = None,
    linear_factors: tuple[float, float] = (1.0, 1.0),
    softmax_factors: tuple[float, float] = (1.0, 1.0),
    feed_forward_factors: tuple[float, float] = (1.0, 1.0),
    tied: bool = False,
    eps: float = 1e-5,
    dropout: float = 0.0,
    attention: Callable[..., nnx.Module] | None = None,
    lightning: Callable[..., nnx.Module] | None = None,
    feed_forward: Callable[..., nnx.Module] | None = None,
    trunk: Callable[..., Trunk] | None = None,
    rngs: nnx.Rngs,
) -> Trunk:
    """A decoder that mixes linear and softmax layers by a pattern; what a layer adds to is its normed input.

    A layer is y = norm(x), x = a y + b mixer(y), then the same with the experts.

    Args:
      vocabulary: of the tokens.
      width, layers, heads, hidden: D, L, H and the features inside an expert.
      kv_heads: heads of the softmax layers with keys and values of their own.
      head_width: K; D / H by default.
      experts, top_k: how many there are, and how many a token goes to, weighted by their renormalised probabilities.
      pattern: kinds of layers, repeated; the released 456B model has seven linear ones before each softmax one.
      theta: base of the softmax layers' rotary frequencies.
      window: tokens that a query of the softmax layers sees; None for all.
      linear_factors, softmax_factors, feed_forward_factors: a and b after each.
      tied: whether the head's table is that of the embeddings.
      eps, dropout: of all norms, and of the branches.
      attention, lightning, feed_forward, trunk: the classes to build from, bound to what is left open; `FeedForward` in
        place of `Experts` makes a dense model.
      rngs: where the initial weights come from.

    Source: "MiniMax-01: Scaling Foundation Models with Lightning Attention", MiniMax, 2025.
    Differs: rotary frequencies turn whole heads, as in `transformers`; the released weights turn half of each.
    """
    norm = partial(RMSNorm, eps=eps)
    size = width // heads if head_width is None else head_width
    linear = partial(
        lightning or LightningAttention,
        heads=heads, head_width=size, rule="minimax", layers=layers, value_activation=True, gate="sigmoid", norm=RMSNorm,
    )  # fmt: skip
    softmax = partial(attention or Attention, heads=heads, kv_heads=kv_heads, head_width=size, theta=theta)
    router = partial(TopKRouter, renormalise=True)
    block = partial(
        Block,
        feed_forward=feed_forward or partial(Experts, experts=experts, top_k=top_k, hidden=hidden, router=router),
        norm=norm,
        placement="normed",
        feed_forward_factors=feed_forward_factors,
        dropout=dropout,
    )
    kinds = {
        "linear": partial(block, mixer=linear, mixer_factors=linear_factors),
        "softmax": partial(
            block,
            mixer=softmax,
            mixer_factors=softmax_factors,
            mask=None if window is None else Window(window - 1),
        ),
    }
    made = (trunk or Trunk)(
        vocabulary,
        width=width,
        layers=layers,
        pattern=[kinds[kind] for kind in pattern],
        norm=norm,
        head=TiedHead if tied else Head,
        rngs=rngs,
    )
    sizes: dict[str, Any] = {"vocabulary": vocabulary.size, "width": width, "layers": layers, "heads": heads}
    sizes |= {"kv_heads": kv_heads, "head_width": size, "hidden": hidden, "experts": experts, "top_k": top_k}
    sizes |= {"pattern": tuple(pattern), "theta": theta, "window": window, "linear_factors": tuple(linear_factors)}
    sizes |= {"softmax_factors": tuple(softmax_factors), "feed_forward_factors": tuple(feed_forward_factors)}
    return named(made, "minimax", sizes | {"tied": tied, "eps": eps, "plain": feed_forward is None})
