"""What all mixers of linear attention share: the state in the cache, borders of documents, padding, and what they refuse."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.initializers import normal
from models.linear import linear
from models.linear_attention.apply import Backend, Form, apply
from models.masks import Both, Causal, Mask
from models.positions import borders, few, gather
from models.variables import param
from partitioning import UserError, constrain

Parts = tuple[Float[Array, "B S H *K"], ...]


class LinearMixer(nnx.Module):
    """Base of the mixers whose memory of a text is a state S of fixed size for each head.

    A mixer says what its keys, values and gates are (`parts`) and what becomes of what the queries read (`finish`). Here a
    document begins with an empty state, padding leaves the state as it is, and a cache holds the state of the tokens so far.

    Args:
      width: D.
      heads: H.
      key_width, value_width: K and V of each head.
      rngs: where the initial weights come from.

    Raises:
      UserError: in a call, whatever a state cannot express: a mask other than `Causal`, a bias, keys from elsewhere.
    """

    needs_causal = True
    form: Form = "decayed"
    # How `form` is computed; mixers with a decay a head let it be chosen.
    backend: Backend = "xla"

    def __init__(self, width: int, *, heads: int, key_width: int, value_width: int, rngs: nnx.Rngs):
        self.heads, self.key_width, self.value_width = heads, key_width, value_width
        self.out = param(normal(rngs, (heads, value_width, width)), ("heads", "kv", "embed"))

    @abstractmethod
    def parts(self, hidden: Float[Array, "B S D"], context: Any) -> tuple[Parts, dict[str, Any]]:
        """Queries, keys, values and gates, as `form`'s function takes them, and what else the cache has to keep.

        A gate that is the same for all tokens is [1, 1, H].

        `context.cache` has what was kept of earlier tokens; without one the text begins here.
        """

    @abstractmethod
    def finish(self, mixed: Float[Array, "B S H V"], hidden: Float[Array, "B S D"]) -> Float[Array, "B S H V"]:
        """What goes into the output projection, of what the queries read; gates see the hidden states."""

    def __call__(
        self, hidden: Float[Array, "B S D"], context: Any
    ) -> tuple[Float[Array, "B S D"], Any, dict[str, Array]]:
        """Mixes tokens; returns the result (at `context.at`, where it is given), the new cache entry and no taps."""
        check_linear(type(self).__name__, context)
        (q, k, v, *gates), kept = self.parts(hidden, context)
        tokens = lambda x: ("batch", "length") if x.shape[:2] == hidden.shape[:2] else (None, None)
        cut = lambda x: constrain(x, *tokens(x), "heads", *("kv",) * (x.ndim - 3))
        parts = [cut(x) for x in (q, k, v, *gates)]
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        if context.cache is None:
            state = jnp.zeros((len(hidden), self.heads, k.shape[-1], v.shape[-1]), wide)
        else:
            state = context.cache["state"]
        state = constrain(state, "batch", "heads", "kv", None)
        begins = borders(context.segments, context.before)
        mixed, state = apply(self.form, parts, begins, context.segments > 0, state, self.backend)
        cache = None if context.cache is None else kept | {"state": state}
        if context.at is not None:
            mixed, hidden = gather(mixed, context.at), gather(hidden, context.at)
        with few(context.at):
            mixed = constrain(self.finish(mixed, hidden), "batch", "length", "heads", "kv")
            kernel = self.out.get_value().astype(hidden.dtype)
            out = linear(mixed.reshape(*mixed.shape[:2], -1), kernel.reshape(-1, kernel.shape[-1]))
        return out, cache, {}

    def empty_cache(self, rows: int, capacity: int, dtype: Any) -> dict[str, Any]:
        """A state of nothing; its size does not depend on `capacity`."""
        del capacity
        wide = jnp.promote_types(dtype, jnp.float32)
        return {"state": jnp.zeros((rows, self.heads, self.state_keys, self.value_width), wide)}

    @property
    def state_keys(self) -> int:
        """Features of a key as the state has them."""
        return self.key_width


def check_linear(name: str, context: Any) -> None:
    """Refuses what no state can express.

    Args:
      name: of the mixer.
      context: of its call.

    Raises:
      UserError: a mask other than `Causal`, a bias, or keys from elsewhere.
    """
    if not reads_from_left(context.mask):
        raise UserError(
            f"{name} reads from left to right and cannot compute {_named(context.mask)}: use the mask Causal, or softmax "
            f"attention in this layer"
        )
    for what, given in (("a bias on scores", context.bias), ("keys from other states", context.source)):
        if given is not None:
            raise UserError(f"{name} cannot compute {what}: use softmax attention in this layer")


def reads_from_left(mask: Mask) -> bool:
    """Whether a token sees all that stands before it in its document, and nothing else."""
    if isinstance(mask, Both):
        return reads_from_left(mask.left) and reads_from_left(mask.right)
    return isinstance(mask, Causal)


def _named(mask: Mask) -> str:
    if isinstance(mask, Both):
        return _named(mask.right if reads_from_left(mask.left) else mask.left)
    return f"the mask {type(mask).__name__}"


def joined_heads(x: Float[Array, "B S H V"]) -> Float[Array, "B S HV"]:
    """All heads of a token as one vector."""
    return x.reshape(*x.shape[:2], -1)
