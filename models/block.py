"""A block: mixer, feed-forward and where the norms stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.dropout import dropout
from models.masks import Bidirectional, Mask
from models.positions import few, gather
from models.side import Beside
from partitioning import UserError, constrain

Placement = Literal["pre", "post", "sandwich", "scaled", "normed"]
Taps = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What a block is told beside the hidden states.

    Args:
      visible: the mask, lowered, with the segment rule.
      segments, positions: of the tokens in this call.
      before: the document of each row's last token before this call, 0 where there is none; None where all have none.
      layer: the block's index in its stack, from 0 on.
      source: states of the same slots that mixers take keys and values from, or None for the hidden states.
      memory: states of another text, or `remembered`, this layer's keys and values of it; None without cross-attention.
      memory_visible: which of the memory each slot may see.
      bias: added to attention scores, or None.
      relative: what a `relative` module of the trunk has for its mixers, or None.
      cache: this layer's cache entry, or None; `cache_length` tokens are already in it.
      keys: one dropout key for each row, or None.
      at: slots whose states are asked for, or None for all: the mixer's result has these slots alone.
      mask: the call's mask and the block's own, as `visible` was lowered from.
      causal: whether no query ever sees a later key.
      routes: the domain of each row, for routers that go by it, or None.
      tokens: ids of the tokens, where the call was given ids, and how many ids there are (`vocabulary`).
      taps: what else is asked for: `layers`, the block's new states; `attention`, the mixer's weights where it has any;
        `transfer`, see `LinearizedAttention`.
    """

    visible: Bool[Array, "B Q K"]
    segments: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    mask: Mask = field(default_factory=Bidirectional)
    before: Int[Array, B] | None = None
    layer: Any = 0
    source: Float[Array, "B S D"] | None = None
    memory: Float[Array, "B M D"] | None = None
    remembered: Any = None
    memory_visible: Bool[Array, "B Q M"] | None = None
    bias: Float[Array, "#B #H Q K"] | None = None
    relative: Any = None
    cache: Any = None
    cache_length: Int[Array, ""] | None = None
    keys: jax.Array | None = None
    at: Int[Array, "B K"] | None = None
    routes: Int[Array, B] | None = None
    tokens: Int[Array, "B S"] | None = None
    vocabulary: int = field(default=0, metadata={"static": True})
    causal: bool = field(default=False, metadata={"static": True})
    taps: tuple[str, ...] = field(default=(), metadata={"static": True})


class Block(nnx.Module):
    """One layer of a trunk, f its mixer, its cross-attention where it has one, and its feed-forward layer, in this order.

    pre:      x = x + f(norm(x))
    post:     x = norm(x + f(x))
    sandwich: x = x + norm'(f(norm(x)))
    scaled:   x = x + f(norm(x) / sqrt(l)), l the layer's number from 1 on
    normed:   y = norm(x), x = y + f(y)

    With factors (a, b) the sums are a x + b f(..).

    Args:
      width: D.
      mixer, feed_forward, norm: classes, or functions, called with the width (and `rngs`, for the first two). A norm and a
        feed-forward layer are called with the states and which tokens are no padding; a feed-forward layer that counts
        tokens with the context too.
      mixer_norm: another norm for the mixer, where it differs from `norm`.
      mixer_out_norm: a norm of the mixer's result, where the placement has none or another.
      cross: class of the attention to a memory, called as the mixer is; None for none.
      placement: where the norms stand, see above.
      mixer_factors, feed_forward_factors: a and b of the sums after the mixer and after the feed-forward layer.
      mask: what this block allows, on top of the call's mask; None for no limit of its own.
      dropout: probability that a feature of a branch is zeroed.
      rngs: where the initial weights come from.

    Source: post: "Attention Is All You Need", Vaswani et al., 2017; pre: "On Layer Normalization in the Transformer
      Architecture", Xiong et al., 2020; sandwich: "CogView", Ding et al., 2021; scaled: "The Curse of Depth in Large
      Language Models", Sun et al., 2025; normed, with factors: "MiniMax-01", MiniMax, 2025. Mix-LN ("Mix-LN", Li et al.,
      2024) is a trunk whose first blocks are post.
    Differs: nothing known.
    """

    def __init__(
        self,
        width: int,
        *,
        mixer: Callable[..., nnx.Module],
        feed_forward: Callable[..., nnx.Module],
        norm: Callable[..., nnx.Module],
        mixer_norm: Callable[..., nnx.Module] | None = None,
        mixer_out_norm: Callable[..., nnx.Module] | None = None,
        cross: Callable[..., nnx.Module] | None = None,
        placement: Placement = "pre",
        mixer_factors: tuple[float, float] = (1.0, 1.0),
        feed_forward_factors: tuple[float, float] = (1.0, 1.0),
        mask: Mask | None = None,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if not 0 <= dropout < 1:
            raise UserError(f"dropout = {dropout}: expected a probability in [0, 1)")
        self.placement, self.mask, self.dropout = placement, nnx.static(mask), dropout
        self.mixer_factors, self.feed_forward_factors = mixer_factors, feed_forward_factors
        self.mixer: Any = mixer(width, rngs=rngs)
        self.mixer_norm = (norm if mixer_norm is None else mixer_norm)(width)
        self.cross: Any = None if cross is None else cross(width, rngs=rngs)
        self.cross_norm = None if cross is None else norm(width)
        self.feed_forward: Any = feed_forward(width, rngs=rngs)
        self.feed_forward_norm = norm(width)
        out_norm = norm if placement == "sandwich" else None
        mixer_out_norm = out_norm if mixer_out_norm is None else mixer_out_norm
        self.mixer_out_norm = None if mixer_out_norm is None else mixer_out_norm(width)
        self.cross_out_norm = None if out_norm is None or cross is None else out_norm(width)
        self.feed_forward_out_norm = None if out_norm is None else out_norm(width)

    def __call__(self, x: Float[Array, "B S D"], context: Context) -> tuple[Float[Array, "B S D"], Beside, Any, Taps]:
        """Returns the new states (at `context.at`, where it is given), what stands beside, the new cache entry and the taps."""
        if context.at is not None and self.feed_forward.counts_tokens:
            x, *rest = self(x, replace(context, at=None))
            return gather(x, context.at), *rest
        here = (lambda x: x) if context.at is None else partial(gather, at=context.at)
        present = here(context.segments) > 0
        fold = lambda n: None if context.keys is None else jax.vmap(lambda k: jax.random.fold_in(k, n))(context.keys)
        scale = jax.lax.rsqrt(context.layer + 1.0).astype(x.dtype) if self.placement == "scaled" else 1

        def add(skip, branch, norm, out_norm, n, seen, factors=(1.0, 1.0)):
            """A branch gives its result first, then what else there is to hand on."""
            read = x if self.placement == "post" else scale * norm(x, seen)
            out, *rest = branch(read)
            out = dropout(out if out_norm is None else out_norm(out, present), self.dropout, fold(n))
            y = _times(factors[0], skip(read if self.placement == "normed" else x)) + _times(factors[1], out)
            y = norm(y, present) if self.placement == "post" else y
            with few(context.at):
                return constrain(y, "batch", "length", "embed"), *rest

        mix = partial(self.mixer, context=context)
        x, cache, taps = add(
            here, mix, self.mixer_norm, self.mixer_out_norm, 0, context.segments > 0, self.mixer_factors
        )
        same = lambda x: x
        if self.cross is not None:
            assert context.memory_visible is not None
            read = partial(self._read, context=context, visible=here(context.memory_visible))
            x, found = add(same, read, self.cross_norm, self.cross_out_norm, 2, present)
            taps = taps | found
        with few(context.at):
            forward = partial(self.feed_forward, present=present)
            if self.feed_forward.counts_tokens:
                forward = partial(forward, context=context)
            x, sides = add(
                same, forward, self.feed_forward_norm, self.feed_forward_out_norm, 1, present, self.feed_forward_factors
            )
        return x, sides, cache, taps | ({"layers": x} if "layers" in context.taps else {})

    def _read(self, x: Float[Array, "B Q D"], context: Context, visible: Bool[Array, "B Q M"]) -> Any:
        """Attention to the memory, and its weights as `cross_attention`, if asked for."""
        remembered = self.cross.remember(context.memory) if context.remembered is None else context.remembered
        wanted = ("attention",) if "cross_attention" in context.taps else ()
        with few(context.at):
            out, taps = self.cross.read(x, remembered, visible, wanted)
        return out, {f"cross_{name}": weights for name, weights in taps.items()}


def _times(factor: float, x: Array) -> Array:
    return x if factor == 1 else factor * x
