"""Qwen3-Next: a decoder that mostly forgets, and every few layers looks at everything."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from models.attention import Attention
from models.block import Block
from models.families.family import named
from models.feed_forward import FeedForward
from models.heads import Head, TiedHead
from models.linear_attention.gated_delta import GatedDeltaNet
from models.mixture.experts import Experts
from models.mixture.routers import TopKRouter
from models.norms import RMSNorm
from models.trunk import Trunk
from models.vocabulary import Vocabulary
from partitioning import UserError


def qwen3_next(
    vocabulary: Vocabulary,
    *,
    width: int = 2048,
    layers: int = 48,
    interval: int = 4,
    heads: int = 16,
    kv_heads: int = 2,
    head_width: int | None = 256,
    theta: float = 10_000_000.0,
    rotary: float = 0.25,
    delta_heads: int = 32,
    delta_key_heads: int = 16,
    delta_key_width: int = 128,
    delta_value_width: int = 128,
    convolution: int = 4,
    hidden: int = 5120,
    experts: int = 512,
    top_k: int = 10,
    expert_hidden: int = 512,
    shared: int = 512,
    renormalise: bool = True,
    balance: float = 0.001,
    z: float = 0.0,
    tied: bool = False,
    eps: float = 1e-6,
    dropout: float = 0.0,
    attention: Callable[..., nnx.Module] | None = None,
    delta: Callable[..., nnx.Module] | None = None,
    trunk: Callable[..., Trunk] | None = None,
    rngs: nnx.Rngs,
) -> Trunk:
    """A decoder of Gated DeltaNet layers, every so many one of gated softmax attention, with experts or without.

    Softmax layers have grouped queries, normalised queries and keys, rotary positions in a part of each head and a sigmoid
    gate on its result. Norms, but for those behind the delta rule, learn scale - 1. A token goes to the likeliest experts
    and to a shared one, whose result is gated.

    Args:
      vocabulary: of the tokens.
      width, layers: D and L.
      interval: every so many layers one is of softmax attention, the last of the group.
      heads, kv_heads, head_width: of the softmax layers: H, those with keys and values of their own, and K (None: D / H).
      theta, rotary: base of the rotary frequencies, and the share of a head that is rotated.
      delta_heads, delta_key_heads: of the Gated DeltaNet layers: heads, and those with queries and keys of their own.
      delta_key_width, delta_value_width: of each such head.
      convolution: tokens that their convolutions see.
      hidden: features inside a feed-forward layer, where there are no experts.
      experts: how many there are; 0 for plain feed-forward layers.
      top_k, expert_hidden: experts that a token goes to, and the features inside each.
      shared: features inside the shared expert.
      renormalise: whether the weights of a token's experts are divided by their sum.
      balance, z: coefficients of the side terms, see `Experts`.
      tied: whether the head's table is that of the embeddings.
      eps, dropout: of all norms, and of the branches.
      attention, delta, trunk: the classes to build from, bound to what is left open: `backend`; `negative_eigenvalues`;
        `dtype`, `unroll`, `remat`, ...
      rngs: where the initial weights come from.

    Raises:
      UserError: an interval below 1.

    Source: Qwen3-Next, Qwen team, 2025, as released and in `transformers` 5.
    Differs: without the layers that predict several tokens; a decay begins as in "Gated Delta Networks", Yang et al., 2024.
    """
    if interval < 1:
        raise UserError(f"qwen3_next.interval = {interval}: expected 1 or more")
    norm = partial(RMSNorm, eps=eps, around_one=True)
    forward: Callable[..., nnx.Module] = partial(FeedForward, hidden=hidden, activation="silu", gated=True)
    if experts:
        forward = partial(
            Experts,
            experts=experts,
            top_k=top_k,
            hidden=expert_hidden,
            router=partial(TopKRouter, renormalise=renormalise),
            shared=shared,
            shared_gate=True,
            balance=balance,
            z=z,
        )
    block = partial(Block, feed_forward=forward, norm=norm, dropout=dropout)
    linear = partial(
        delta or GatedDeltaNet,
        heads=delta_heads,
        key_heads=delta_key_heads,
        head_width=delta_key_width,
        value_width=delta_value_width,
        size=convolution,
        norm=partial(RMSNorm, eps=eps),
    )
    softmax = partial(
        attention or Attention,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        theta=theta,
        rotary=rotary,
        qk_norm=norm,
        output_gate=True,
    )
    made = (trunk or Trunk)(
        vocabulary,
        width=width,
        layers=layers,
        pattern=[*[partial(block, mixer=linear)] * (interval - 1), partial(block, mixer=softmax)],
        norm=norm,
        head=TiedHead if tied else Head,
        rngs=rngs,
    )
    sizes: dict[str, Any] = {"vocabulary": vocabulary.size, "width": width, "layers": layers, "interval": interval}
    sizes |= {"heads": heads, "kv_heads": kv_heads, "theta": theta, "rotary": rotary, "hidden": hidden}
    sizes |= {"head_width": width // heads if head_width is None else head_width, "convolution": convolution}
    sizes |= {"delta_heads": delta_heads, "delta_key_heads": delta_key_heads, "delta_key_width": delta_key_width}
    sizes |= {"delta_value_width": delta_value_width, "experts": experts, "top_k": top_k, "shared": shared}
    sizes |= {"expert_hidden": expert_hidden, "renormalise": renormalise, "tied": tied, "eps": eps}
    return named(made, "qwen3_next", sizes)
