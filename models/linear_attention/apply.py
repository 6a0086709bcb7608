"""One call for all forms of linear attention: by chunks, token by token where there is one token a row, and by devices where
rows are cut along their length."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxtyping import Array, Bool, Float

from models.linear_attention.decayed import decayed
from models.linear_attention.delta import delta
from models.linear_attention.gated import gated
from models.linear_attention.recurrence import delta_recurrence, recurrence
from models.linear_attention.sequence import passed
from partitioning import is_cut

Form = Literal["decayed", "gated", "delta"]
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
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H K V"]]:
    """Outputs, and the state behind the last token.

    Args:
      form: 'decayed', 'gated' or 'delta', see the functions of these names.
      parts: their arguments before `resets`.
      resets: where a document begins.
      state: before the first token.
    """
    if resets.shape[1] == 1:
        return RECURRENT[form](*parts, resets, state)
    if is_cut("length"):
        return passed(form, parts, resets, state)
    return CHUNKED[form](*parts, resets, state)
