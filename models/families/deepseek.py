"""DeepSeek-V3: latent attention, a few dense layers, and then many small experts kept in balance by a bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from models.block import Block
from models.families.family import named
from models.feed_forward import FeedForward
from models.heads import Head, TiedHead
from models.latent_attention import LatentAttention
from models.mixture.experts import Experts
from models.mixture.routers import SigmoidRouter
from models.norms import RMSNorm
from models.rope_scaling import RopeScaling
from models.trunk import Trunk
from models.vocabulary import Vocabulary
from partitioning import UserError


def deepseek(
    vocabulary: Vocabulary,
    *,
    width: int = 7168,
    layers: int = 61,
    dense: int = 3,
    heads: int = 128,
    query_rank: int | None = 1536,
    rank: int = 512,
    plain: int = 128,
    rotary: int = 64,
    value_width: int = 128,
    hidden: int = 18_432,
    experts: int = 256,
    top_k: int = 8,
    expert_hidden: int = 2048,
    shared: int = 2048,
    groups: int = 8,
    top_groups: int = 4,
    renormalise: bool = True,
    scale: float = 2.5,
    rate: float = 0.001,
    balance: float = 0.0001,
    z: float = 0.0,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
    tied: bool = False,
    eps: float = 1e-6,
    dropout: float = 0.0,
    attention: Callable[..., nnx.Module] | None = None,
    feed_forward: Callable[..., nnx.Module] | None = None,
    trunk: Callable[..., Trunk] | None = None,
    rngs: nnx.Rngs,
) -> Trunk:
    """A decoder of multi-head latent attention whose layers, but for the first ones, have experts and one for every token.

    Args:
      vocabulary: of the tokens.
      width, layers: D and L.
      dense: how many of the first layers have a plain gated feed-forward layer.
      heads: H.
      query_rank, rank, plain, rotary, value_width: of the attention, see `LatentAttention`.
      hidden: features inside a dense layer.
      experts, top_k, expert_hidden: how many there are, how many a token goes to, and the features inside each.
      shared: features inside the expert that every token goes to.
      groups, top_groups, renormalise, scale, rate: of the router, see `SigmoidRouter`.
      balance, z: coefficients of the side terms, see `Experts`.
      theta, scaling: base of the rotary frequencies, and what scales them.
      tied: whether the head's table is that of the embeddings.
      eps, dropout: of the norms of the layers, and of the branches.
      attention, feed_forward, trunk: the classes to build from, bound to what is left open: `backend`; `form`, `capacity`,
        `balance_scope`; `dtype`, `unroll`, `remat`, ...
      rngs: where the initial weights come from.

    Raises:
      UserError: a number of dense layers that is not from 0 to L; what the router refuses.

    Source: "DeepSeek-V3 Technical Report", DeepSeek-AI, 2024.
    Differs: without the layer that predicts a second token; the side term goes over the batch, not each text.
    """
    if not 0 <= dense <= layers:
        raise UserError(f"deepseek.dense = {dense}: expected 0 to deepseek.layers = {layers}")
    norm = partial(RMSNorm, eps=eps)
    mixer = partial(
        attention or LatentAttention,
        heads=heads,
        query_rank=query_rank,
        rank=rank,
        plain=plain,
        rotary=rotary,
        value_width=value_width,
        theta=theta,
        scaling=scaling,
    )
    router = partial(
        SigmoidRouter, groups=groups, top_groups=top_groups, renormalise=renormalise, scale=scale, rate=rate
    )
    sparse = partial(
        feed_forward or Experts,
        experts=experts,
        top_k=top_k,
        hidden=expert_hidden,
        router=router,
        shared=shared,
        balance=balance,
        z=z,
    )
    block = partial(Block, mixer=mixer, norm=norm, dropout=dropout)
    first = partial(block, feed_forward=partial(FeedForward, hidden=hidden, activation="silu", gated=True))
    made = (trunk or Trunk)(
        vocabulary,
        width=width,
        layers=layers,
        head_blocks=[first] * dense,
        pattern=[partial(block, feed_forward=sparse)],
        norm=norm,
        head=TiedHead if tied else Head,
        rngs=rngs,
    )
    sizes: dict[str, Any] = {"vocabulary": vocabulary.size, "width": width, "layers": layers, "dense": dense}
    sizes |= {"heads": heads, "query_rank": query_rank, "rank": rank, "plain": plain, "rotary": rotary}
    sizes |= {"value_width": value_width, "hidden": hidden, "experts": experts, "top_k": top_k}
    sizes |= {"expert_hidden": expert_hidden, "shared": shared, "groups": groups, "top_groups": top_groups}
    sizes |= {"renormalise": renormalise, "scale": scale, "theta": theta, "scaling": scaling, "tied": tied, "eps": eps}
    return named(made, "deepseek", sizes)
