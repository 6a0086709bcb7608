"""TransNormerLLM: a decoder of lightning attention and simple gated linear units."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from models.block import Block
from models.families.family import named
from models.feed_forward import FeedForward
from models.heads import Head, TiedHead
from models.linear_attention.decays import Rule
from models.linear_attention.lightning import LightningAttention
from models.norms import RMSNorm
from models.trunk import Trunk
from models.vocabulary import Vocabulary


def transnormer(
    vocabulary: Vocabulary,
    *,
    width: int = 1024,
    layers: int = 24,
    heads: int = 8,
    hidden: int = 2816,
    rule: Rule = "official",
    lrpe: bool = True,
    tied: bool = False,
    embedding_scale: bool = True,
    eps: float = 1e-6,
    dropout: float = 0.0,
    attention: Callable[..., nnx.Module] | None = None,
    trunk: Callable[..., Trunk] | None = None,
    rngs: nnx.Rngs,
) -> Trunk:
    """A decoder whose layers are x += GLA(norm(x)), x += SGLU(norm(x)), with norms that have no scale.

    GLA is `LightningAttention`; SGLU(x) = ((x W) * (x V)) U, without an activation. The first layer alone knows places, by
    LRPE; every layer has a decay for each head.

    Args:
      vocabulary: of the tokens.
      width, layers, heads, hidden: D, L, H and the features inside a feed-forward layer.
      rule: of the decays, see `models.linear_attention.decays.log_decays`.
      lrpe: whether the first layer has LRPE.
      tied: whether the head's table is that of the embeddings.
      embedding_scale: whether embeddings are multiplied by sqrt(D); the released 7B's are not.
      eps, dropout: of all norms, and of the branches.
      attention, trunk: the classes to build from, bound to what is left open: `dtype`, `unroll`, `remat`, ...
      rngs: where the initial weights come from.

    Source: "Scaling TransNormer to 175 Billion Parameters", Qin et al., 2023.
    Differs: nothing known.
    """
    norm = partial(RMSNorm, eps=eps, scale=False)
    mixer = partial(attention or LightningAttention, heads=heads, rule=rule, layers=layers, norm=norm)
    block = partial(
        Block,
        feed_forward=partial(FeedForward, hidden=hidden, activation="none", gated=True),
        norm=norm,
        dropout=dropout,
    )
    made = (trunk or Trunk)(
        vocabulary,
        width=width,
        layers=layers,
        pattern=[partial(block, mixer=mixer)],
        head_blocks=[partial(block, mixer=partial(mixer, lrpe=True))] if lrpe else [],
        norm=norm,
        embedding_scale=embedding_scale,
        head=TiedHead if tied else Head,
        rngs=rngs,
    )
    sizes: dict[str, Any] = {"vocabulary": vocabulary.size, "width": width, "layers": layers, "heads": heads}
    return named(made, "transnormer", sizes | {"hidden": hidden, "rule": rule, "lrpe": lrpe, "tied": tied, "eps": eps})
