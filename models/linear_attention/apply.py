"""One call for all forms of linear attention: by chunks, token by token where there is one token a row, and by devices where
rows are cut along their length."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.linear_attention.decayed import decayed
from models.linear_attention.delta import delta
from models.linear_attention.gated import gated
from models.linear_attention.recurrence import delta_recurrence, recurrence
from models.linear_attention.sequence import passed
from partitioning import UserError, is_cut, on_each_device, platform

Form = Literal["decayed", "gated", "delta"]
Backend = Literal["xla", "pallas"]
CHUNKED: dict[str, Callable[..., Any]] = {"decayed": decayed, "gated": gated, "delta": delta}
RECURRENT: dict[str, Callable[..., Any]] = {
    "decayed": lambda q, k, v, log_decay, *rest: recurrence(q, k, v, log_decay[..., None], *rest),
    "gated": recurrence,
    "delta": delta_recurrence,
}


def apply(
    form: Form,
    parts: Sequence[Float[Array, "..."]],
    resets: Bool[Array, "B S"],
    present: Bool[Array, "B S"],
    state: Float[Array, "B H K V"],
    backend: Backend = "xla",
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H K V"]]:
    """Outputs, and the state behind the last token.

    Args:
      form: 'decayed', 'gated' or 'delta', see the functions of these names.
      parts: their arguments before `resets`; a gate may be given once for all tokens.
      resets: where a document begins.
      present: which tokens are there; the others leave the state as it is.
      state: before the first token.
      backend: 'pallas' is a TPU's kernel for 'decayed'.

    Raises:
      UserError: a kernel where there is no TPU, for another form, or for rows that are cut along their length.
    """
    q, k, v, *gates = parts
    shown = lambda x: jnp.where(present.reshape(*present.shape, *(1,) * (x.ndim - 2)), x, 0)
    each = [shown(jnp.broadcast_to(x, (*present.shape, *x.shape[2:]))) for x in (k, *gates)]
    every = (q, each[0], v, *each[1:])
    if resets.shape[1] == 1:
        return RECURRENT[form](*every, resets, state)
    if backend == "pallas":
        return _by_kernel(form, every, resets, state)
    if form == "decayed":
        # A decay that is the same for all tokens stays so: there is a faster way.
        every = (q, each[0], v, *gates)
    if is_cut("length"):
        return passed(form, every, resets, present, state)
    return CHUNKED[form](*every, resets, state, **({"present": present} if form == "decayed" else {}))


def _by_kernel(form: Form, parts: Sequence[Any], resets: Any, state: Any) -> Any:
    for what, true in (
        ("without a TPU", platform() != "tpu"),
        (f"the form '{form}'", form != "decayed"),
        ("rows that are cut along their length", is_cut("length")),
    ):
        if true:
            raise UserError(f"linear attention's backend = 'pallas' cannot compute {what}: use 'xla'")
    # Imported late: where there is no TPU nobody waits for it.
    from models.linear_attention.pallas import kernel

    row, whole = ("batch", "length", "heads", None), ("batch", "heads", None, None)
    q, k, v, log_decay = parts
    arrays = [(q, row), (k, row), (v, row), (log_decay, row[:3]), (resets, row[:2]), (state, whole)]
    return on_each_device(kernel, arrays, [(v.shape, row), (state.shape, whole)])
