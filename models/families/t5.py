"""T5 and its successors: T5 1.1, mT5, Flan-T5."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from models.attention import Attention
from models.block import Block
from models.cross_attention import CrossAttention
from models.encoder_decoder import EncoderDecoder
from models.families.family import named
from models.feed_forward import Activation, FeedForward
from models.heads import Head, TiedHead
from models.initializers import deviating
from models.norms import RMSNorm
from models.relative import RelativeBias
from models.trunk import Trunk
from models.vocabulary import Vocabulary


def t5(
    vocabulary: Vocabulary,
    *,
    width: int = 768,
    layers: int = 12,
    decoder_layers: int | None = None,
    heads: int = 12,
    head_width: int = 64,
    hidden: int = 3072,
    activation: Activation = "relu",
    gated: bool = False,
    buckets: int = 32,
    longest: int = 128,
    tied: bool = True,
    eps: float = 1e-6,
    dropout: float = 0.0,
    attention: Callable[..., nnx.Module] | None = None,
    cross: Callable[..., nnx.Module] | None = None,
    trunk: Callable[..., Trunk] | None = None,
    rngs: nnx.Rngs,
) -> EncoderDecoder:
    """An encoder-decoder with a relative-position bias that all layers of a side share, RMSNorm and no biases else.

    T5 1.1, mT5 and Flan-T5 are the same with `gated`, activation = 'gelu_tanh' and not `tied`.

    Args:
      vocabulary: of the tokens.
      width, layers, heads, head_width, hidden: D, L of the encoder, H, K and the features inside a feed-forward layer.
      decoder_layers: L of the decoder; that of the encoder by default.
      activation, gated: of the feed-forward layers.
      buckets, longest: of distances, as in `models.RelativeBias`.
      tied: whether the head's table is that of the embeddings, its scores then divided by sqrt(D).
      eps, dropout: of all norms, and of the branches.
      attention, cross, trunk: the classes to build from, bound to what is left open: `backend`; `dtype`, `unroll`, ...
      rngs: where the initial weights come from.

    Source: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", Raffel et al., 2020; gates:
      "GLU Variants Improve Transformer", Shazeer, 2020.
    Differs: no dropout on embeddings, inside feed-forward layers and on attention weights.
    """
    norm = partial(RMSNorm, eps=eps)
    decoder_layers = layers if decoder_layers is None else decoder_layers
    shape: dict[str, Any] = {"heads": heads, "head_width": head_width, "scale": 1.0}

    def side(vocabulary: Vocabulary, *, layers: int, reads: bool, **options: Any) -> Trunk:
        block = partial(
            Block,
            mixer=partial(attention or Attention, theta=None, **shape),
            cross=partial(cross or CrossAttention, **shape) if reads else None,
            feed_forward=partial(FeedForward, hidden=hidden, activation=activation, gated=gated),
            norm=norm,
            dropout=dropout,
        )
        return (trunk or Trunk)(
            vocabulary,
            width=width,
            layers=layers,
            pattern=[block],
            norm=norm,
            relative=partial(RelativeBias, heads=heads, buckets=buckets, longest=longest, two_sided=not reads),
            head=partial(TiedHead, scale=width**-0.5) if tied else Head,
            **options,
        )

    made = EncoderDecoder(
        vocabulary,
        encoder=partial(side, layers=layers, reads=False),
        decoder=partial(side, layers=decoder_layers, reads=True),
        rngs=rngs,
    )
    inner = heads * head_width
    made = deviating(
        made,
        {
            "encoder/table": 1.0,
            "(mixer|cross)/query": (width * head_width) ** -0.5,
            "(mixer|cross)/out": inner**-0.5,
            "feed_forward/outer": hidden**-0.5,
            "(mixer|cross)/(key|value)|feed_forward/(inner|gate)|relative/table|head/table": width**-0.5,
        },
    )
    sizes: dict[str, Any] = {"vocabulary": vocabulary.size, "width": width, "layers": layers, "heads": heads}
    sizes |= {"decoder_layers": decoder_layers, "head_width": head_width, "hidden": hidden, "activation": activation}
    sizes |= {"gated": gated, "buckets": buckets, "longest": longest, "tied": tied}
    return named(made, "t5", sizes | {"eps": eps})
