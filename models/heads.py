"""Heads: from hidden states to scores over the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.feed_forward import ACTIVATIONS, Activation
from models.few_rows import FEW, by_kernel, table
from models.initializers import normal
from models.linear import linear
from models.norms import LayerNorm
from models.variables import param
from models.vocabulary import Vocabulary


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """Scores over the vocabulary that are not multiplied out: hidden W^T + bias.

    A loss over many tokens takes them in this form and never holds `[tokens, vocab]` at once.

    Args:
      hidden: `[..., D]`.
      table: W, with rows past `size` that stand for no token.
      bias: one number a row of `table`, or None.
      size: tokens in the vocabulary.
    """

    hidden: Float[Array, "*B D"]
    table: Float[Array, "V D"]
    bias: Float[Array, V] | None
    size: int = field(metadata={"static": True})

    def logits(self) -> Float[Array, "*B size"]:
        """All scores, in float32 at least."""
        wide = jnp.promote_types(self.hidden.dtype, jnp.float32)
        product = partial(jnp.einsum, preferred_element_type=wide)
        states = math.prod(self.hidden.shape[:-1])
        flat = self.hidden.reshape(states, self.hidden.shape[-1])
        if by_kernel(flat, self.table):
            logits = table(flat, self.table).reshape(*self.hidden.shape[:-1], -1)
        elif states <= FEW:
            # As the second side XLA for CPU would pack the table anew for them.
            by_token = product("vd,...d->v...", self.table, self.hidden)
            # Behind a barrier, or the compiler turns the product round again; for one state there is nothing to turn.
            by_token = by_token if states == 1 else jax.lax.optimization_barrier(by_token)
            logits = jnp.moveaxis(by_token, 0, -1)
        else:
            logits = product("...d,vd->...v", self.hidden, self.table)
        logits = logits if self.bias is None else logits + self.bias
        return logits[..., : self.size]

    def tempered(self, temperature: float) -> Scores:
        """The scores divided by a temperature."""
        bias = None if self.bias is None else self.bias / temperature
        return replace(self, hidden=self.hidden / jnp.asarray(temperature, self.hidden.dtype), bias=bias)


class Head(nnx.Module):
    """Scores against a table of the head's own.

    Args:
      width: D.
      vocabulary: of the trunk.
      multiple: rows of the table are padded to a multiple of this.
      rngs: where the initial weights come from.
    """

    def __init__(self, width: int, vocabulary: Vocabulary, *, multiple: int = 128, rngs: nnx.Rngs):
        self.size = vocabulary.size
        self.table = param(normal(rngs, (vocabulary.padded(multiple), width)), ("vocab", "embed"))

    def __call__(self, hidden: Float[Array, "*B D"], table: Float[Array, "V D"]) -> Scores:
        """The scores of `hidden`; the embeddings are not looked at."""
        return Scores(hidden, self.table.get_value().astype(hidden.dtype), None, self.size)


class NormHead(Head):
    """Scores against a table of the head's own whose vectors have length 1: scores do not grow with the table.

    token:   s_v = h . W_v / (|W_v| + eps), a vector for each token;
    feature: s_v = sum_d h_d W_vd / (|W_:d| + eps), a vector over the vocabulary for each feature.

    Norms are taken in float32, over the tokens that there are: rows that pad the table are none.

    Args:
      width: D.
      vocabulary: of the trunk.
      axis: what a vector is of. The paper's text reads as 'token', and Baichuan 2 does that; the released code of Ling
        does 'feature'.
      eps: added to a norm.
      multiple: rows of the table are padded to a multiple of this.
      rngs: where the initial weights come from.

    Source: "Every FLOP Counts: Scaling a 300B Mixture-of-Experts LING LLM without Premium GPUs", Ling team, 2025; by token:
      "Baichuan 2: Open Large-scale Language Models", Yang et al., 2023.
    Differs: as in the released code of each, the gradient goes through the norms of 'token' and not through those of 'feature';
      Baichuan 2 has the larger of norm and eps. The table itself is left as it is, also behind training.
    """

    def __init__(
        self,
        width: int,
        vocabulary: Vocabulary,
        *,
        axis: Literal["token", "feature"] = "token",
        eps: float = 1e-7,
        multiple: int = 128,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, vocabulary, multiple=multiple, rngs=rngs)
        self.axis, self.eps = axis, eps

    def __call__(self, hidden: Float[Array, "*B D"], table: Float[Array, "V D"]) -> Scores:
        """The scores of `hidden`; the embeddings are not looked at."""
        own: Any = self.table.get_value()
        own = own.astype(jnp.promote_types(own.dtype, jnp.float32))
        if self.axis == "token":
            norms = _lengths(own, -1)
        else:
            here = (jnp.arange(own.shape[0]) < self.size)[:, None]
            norms = jax.lax.stop_gradient(_lengths(jnp.where(here, own, 0), 0))
        return Scores(hidden, (own / (norms + self.eps)).astype(hidden.dtype), None, self.size)


def _lengths(table: Float[Array, "V D"], axis: int) -> Array:
    """Of vectors; that of one of zeros has the gradient 0."""
    squares = jnp.square(table).sum(axis, keepdims=True)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


class TiedHead(nnx.Module):
    """Scores against the token embeddings, which are handed in at call time: scale * f(hidden) W^T + bias.

    Args:
      width: D.
      vocabulary: of the trunk.
      multiple: rows of the table are padded to a multiple of this.
      transform: whether states first go through a dense layer, an activation and a LayerNorm, as in BERT.
      activation: of the transform.
      norm: of the transform, a class called with the width; LayerNorm by default.
      transform_bias: whether the transform has a bias.
      bias: whether each token has a bias.
      scale: what scores are multiplied by.
      rngs: where the initial weights come from.

    Source: "BERT", Devlin et al., 2019; tying: "Using the Output Embedding", Press and Wolf, 2017.
    Differs: nothing known.
    """

    def __init__(
        self,
        width: int,
        vocabulary: Vocabulary,
        *,
        multiple: int = 128,
        transform: bool = False,
        activation: Activation = "gelu",
        norm: Callable[..., nnx.Module] | None = None,
        transform_bias: bool = True,
        bias: bool = False,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.size, self.activation, self.scale = vocabulary.size, activation, scale
        rows = vocabulary.padded(multiple)
        self.dense = param(normal(rngs, (width, width)), ("embed", "mlp")) if transform else None
        self.dense_bias = param(jnp.zeros((width,)), ("mlp",)) if transform and transform_bias else None
        self.norm: Any = (LayerNorm if norm is None else norm)(width) if transform else None
        self.bias = param(jnp.zeros((rows,)), ("vocab",)) if bias else None

    def __call__(self, hidden: Float[Array, "*B D"], table: Float[Array, "V D"]) -> Scores:
        """The scores of `hidden` against the rows of `table`."""
        cast = lambda p: p.get_value().astype(hidden.dtype)
        if self.dense is not None and self.norm is not None:
            hidden = linear(hidden, cast(self.dense))
            hidden = hidden if self.dense_bias is None else hidden + cast(self.dense_bias)
            hidden = self.norm(ACTIVATIONS[self.activation](hidden))
        bias: Any = None if self.bias is None else self.bias.get_value()
        return Scores(hidden * self.scale, table.astype(hidden.dtype), bias, self.size)
