"""ModernBERT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from models.attention import Attention
from models.block import Block
from models.families.family import named
from models.feed_forward import FeedForward
from models.heads import TiedHead
from models.masks import Window
from models.norms import LayerNorm, NoNorm
from models.trunk import Trunk
from models.vocabulary import Vocabulary


def modernbert(
    vocabulary: Vocabulary,
    *,
    width: int = 768,
    layers: int = 22,
    heads: int = 12,
    hidden: int = 1152,
    window: int = 64,
    every: int = 3,
    theta: float = 160_000.0,
    local_theta: float = 10_000.0,
    eps: float = 1e-5,
    dropout: float = 0.0,
    attention: Callable[..., nnx.Module] | None = None,
    trunk: Callable[..., Trunk] | None = None,
    rngs: nnx.Rngs,
) -> Trunk:
    """An encoder with rotary positions, gated feed-forward layers, no biases, and attention that is mostly local.

    Layer i sees everything where `every` divides i, and elsewhere `window` tokens to either side. The first layer's mixer
    has no norm before it: the embeddings have one.

    Args:
      vocabulary: of the tokens.
      width, layers, heads, hidden: D, L, H and the features inside a feed-forward layer.
      window: tokens that a local layer sees to either side.
      every: global layers are this far apart.
      theta, local_theta: bases of the rotary frequencies, of global and of local layers.
      eps, dropout: of all norms, and of the branches.
      attention, trunk: the classes to build from, bound to what is left open: `backend`; `dtype`, `unroll`, `remat`, ...
      rngs: where the initial weights come from.

    Source: "Smarter, Better, Faster, Longer", Warner et al., 2024.
    Differs: no dropout inside attention.
    """
    norm = partial(LayerNorm, eps=eps, bias=False)

    def block(i: int) -> partial[Block]:
        everywhere = i % every == 0
        return partial(
            Block,
            mixer=partial(attention or Attention, heads=heads, theta=theta if everywhere else local_theta),
            feed_forward=partial(FeedForward, hidden=hidden, gated=True),
            norm=norm,
            mixer_norm=NoNorm if i == 0 else None,
            mask=None if everywhere else Window(window, window),
            dropout=dropout,
        )

    made = (trunk or Trunk)(
        vocabulary,
        width=width,
        layers=layers,
        norm=norm,
        head_blocks=[block(0)],
        pattern=[block(i) for i in range(1, every + 1)],
        embedding_norm=True,
        head=partial(TiedHead, transform=True, transform_bias=False, norm=norm, bias=True),
        rngs=rngs,
    )
    sizes: dict[str, Any] = {"vocabulary": vocabulary.size, "width": width, "layers": layers, "heads": heads}
    sizes |= {"hidden": hidden, "window": window, "every": every}
    return named(made, "modernbert", sizes | {"theta": theta, "local_theta": local_theta, "eps": eps})
