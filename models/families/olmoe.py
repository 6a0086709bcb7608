"""OLMoE: a decoder of many small experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from models.attention import Attention
from models.block import Block
from models.families.family import named
from models.heads import Head, TiedHead
from models.mixture.experts import Experts
from models.mixture.routers import TopKRouter
from models.norms import RMSNorm
from models.trunk import Trunk
from models.vocabulary import Vocabulary


def olmoe(
    vocabulary: Vocabulary,
    *,
    width: int = 2048,
    layers: int = 16,
    heads: int = 16,
    kv_heads: int | None = None,
    hidden: int = 1024,
    experts: int = 64,
    top_k: int = 8,
    renormalise: bool = False,
    theta: float = 10_000.0,
    tied: bool = False,
    eps: float = 1e-5,
    dropout: float = 0.0,
    attention: Callable[..., nnx.Module] | None = None,
    feed_forward: Callable[..., nnx.Module] | None = None,
    trunk: Callable[..., Trunk] | None = None,
    rngs: nnx.Rngs,
) -> Trunk:
    """A decoder with rotary positions, RMSNorm, and queries and keys normalised over all heads at once.

    Args:
      vocabulary: of the tokens.
      width, layers, heads, hidden: D, L, H and the features inside an expert.
      kv_heads: heads with keys and values of their own; all by default.
      experts, top_k: how many there are, and how many a token goes to.
      renormalise: whether the weights of a token's experts are divided by their sum.
      theta: base of the rotary frequencies.
      tied: whether the head's table is that of the embeddings.
      eps, dropout: of all norms, and of the branches.
      attention, feed_forward, trunk: the classes to build from, bound to what is left open: `backend`; `balance`, `form`;
        `dtype`, `unroll`, `remat`, ...
      rngs: where the initial weights come from.

    Source: "OLMoE: Open Mixture-of-Experts Language Models", Muennighoff et al., 2024.
    Differs: nothing known.
    """
    norm = partial(RMSNorm, eps=eps)
    kv_heads = heads if kv_heads is None else kv_heads
    block = partial(
        Block,
        mixer=partial(
            attention or Attention, heads=heads, kv_heads=kv_heads, theta=theta, qk_norm=norm, qk_norm_over="heads"
        ),
        feed_forward=partial(
            feed_forward or Experts,
            experts=experts,
            top_k=top_k,
            hidden=hidden,
            router=partial(TopKRouter, renormalise=renormalise),
        ),
        norm=norm,
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
    sizes |= {"kv_heads": kv_heads, "hidden": hidden, "experts": experts, "top_k": top_k, "renormalise": renormalise}
    return named(made, "olmoe", sizes | {"theta": theta, "tied": tied, "eps": eps})
