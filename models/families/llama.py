"""Decoders in the manner of Llama: Llama, Mistral, Qwen3 and their kin."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from models.attention import Attention
from models.block import Block, Placement
from models.families.family import named
from models.feed_forward import FeedForward
from models.heads import Head, TiedHead
from models.masks import Window
from models.norms import RMSNorm
from models.rope_scaling import RopeScaling
from models.trunk import Trunk
from models.vocabulary import Vocabulary


def llama(
    vocabulary: Vocabulary,
    *,
    width: int = 2048,
    layers: int = 16,
    heads: int = 32,
    kv_heads: int = 8,
    head_width: int | None = None,
    hidden: int = 8192,
    theta: float = 500_000.0,
    scaling: RopeScaling | None = None,
    window: int | None = None,
    qk_norm: bool = False,
    output_gate: bool = False,
    bias: bool = False,
    tied: bool = True,
    eps: float = 1e-5,
    placement: Placement = "pre",
    dropout: float = 0.0,
    attention: Callable[..., nnx.Module] | None = None,
    trunk: Callable[..., Trunk] | None = None,
    rngs: nnx.Rngs,
) -> Trunk:
    """A decoder with grouped queries, rotary positions, RMSNorm and gated feed-forward layers.

    Qwen3 is the same with `qk_norm`, Mistral with a `window`.

    Args:
      vocabulary: of the tokens.
      width, layers, heads, hidden: D, L, H and the features inside a feed-forward layer.
      kv_heads: heads with keys and values of their own: 1 is multi-query attention, `heads` full attention.
      head_width: K; D / H by default.
      theta, scaling: base of the rotary frequencies, and what scales them.
      window: tokens that a query sees, its own included; None for all.
      qk_norm: whether queries and keys are normalised in each head.
      output_gate: whether heads are gated before the output projection.
      bias: whether attention's projections have biases.
      tied: whether the head's table is that of the embeddings.
      eps, placement, dropout: of all norms, where they stand, and of the branches.
      attention, trunk: the classes to build from, bound to what is left open: `backend`; `dtype`, `unroll`, `remat`, ...
      rngs: where the initial weights come from.

    Source: "The Llama 3 Herd of Models", Grattafiori et al., 2024; "Qwen3 Technical Report", Yang et al., 2025.
    Differs: nothing known.
    """
    norm = partial(RMSNorm, eps=eps)
    block = partial(
        Block,
        mixer=partial(
            attention or Attention,
            heads=heads,
            kv_heads=kv_heads,
            head_width=head_width,
            theta=theta,
            scaling=scaling,
            qk_norm=norm if qk_norm else None,
            output_gate=output_gate,
            bias=bias,
        ),
        feed_forward=partial(FeedForward, hidden=hidden, activation="silu", gated=True),
        norm=norm,
        placement=placement,
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
    sizes |= {"kv_heads": kv_heads, "hidden": hidden, "theta": theta}
    sizes |= {"head_width": width // heads if head_width is None else head_width}
    sizes |= {"scaling": scaling, "window": window, "qk_norm": qk_norm, "bias": bias}
    plain = placement == "pre" and not output_gate
    return named(made, "llama", sizes | {"tied": tied, "eps": eps, "plain": plain})
