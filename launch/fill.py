"""Fills the masks of a text with a trained bidirectional trunk."""

import dataclasses
import functools
from typing import Any

import numpy as np

from partitioning.errors import UserError

MARK = "[MASK]"
STRETCH = 64


@dataclasses.dataclass(frozen=True)
class Guess:
    """A token's text and its probability."""

    text: str
    probability: float


def check_text(text: str) -> None:
    """Raise UserError where a text has no mask to fill."""
    if MARK not in text:
        raise UserError(f"{text!r}: nothing to fill, expected {MARK} in it")


def fill(trunk: Any, tokenizer: Any, text: str, *, count: int = 3) -> list[list[Guess]]:
    """The likeliest tokens at each mask of `text`, each mask judged with the others still masked.

    Arguments:
        trunk: a `models.Trunk`.
        tokenizer: encodes text to ids without specials, and decodes.
        text: holds one or more `[MASK]`, one a token.
        count: guesses a mask.

    Errors: UserError where the text has no mask.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    check_text(text)
    tokens, holes = _encode(tokenizer, text)
    # Texts of about one length share a compiled program.
    length = -(-len(tokens) // STRETCH) * STRETCH
    row = np.full((1, length), tokenizer.specials.pad, np.int32)
    row[0, : len(tokens)] = tokens
    segments = (np.arange(length) < len(tokens)).astype(np.int32)[None]
    positions = np.where(segments > 0, np.arange(length, dtype=np.int32), 0)
    logits = _program()(*nnx.split(trunk), row, segments, positions)[0, np.asarray(holes)]
    # A special token is no answer.
    specials = np.array(sorted(dataclasses.asdict(tokenizer.specials).values()))
    chances = jax.nn.softmax(logits.astype(jnp.float32).at[:, specials].set(-jnp.inf), axis=-1)
    values, ids = jax.lax.top_k(chances, min(count, chances.shape[-1]))
    return [
        [Guess(tokenizer.decode(np.array([i])), float(p)) for i, p in zip(row_ids, row_values, strict=True)]
        for row_ids, row_values in zip(np.asarray(ids), np.asarray(values), strict=True)
    ]


@functools.cache
def _program() -> Any:
    """The scores of every place of a row, compiled; a trunk comes as its graph (static) and its arrays."""
    import jax
    from flax import nnx

    def run(graph: Any, state: Any, tokens: Any, segments: Any, positions: Any) -> Any:
        trunk = nnx.merge(graph, state)
        return trunk.scores(trunk(tokens, segments=segments, positions=positions).hidden).logits()

    return jax.jit(run, static_argnums=0)


def _encode(tokenizer: Any, text: str) -> tuple[np.ndarray, list[int]]:
    first, *rest = _parts(tokenizer, text)
    tokens = [int(t) for t in tokenizer.encode(first)]
    holes = []
    for part in rest:
        holes.append(len(tokens))
        tokens += [tokenizer.specials.mask, *(int(t) for t in tokenizer.encode(part))]
    return np.array(tokens, np.int32), holes


def _parts(tokenizer: Any, text: str) -> list[str]:
    """The text between masks. Where pieces begin with their space (` the` is one), the space before a mask is the mask's."""
    parts = text.split(MARK)
    if len(tokenizer.encode(" the")) > 1:
        return parts
    return [*(part.removesuffix(" ") for part in parts[:-1]), parts[-1]]


def show(trunk: Any, tokenizer: Any, text: str, *, count: int = 3) -> str:
    """The text with its likeliest fillings, then one line a mask with all guesses and their chances."""
    found = fill(trunk, tokenizer, text, count=count)
    filled, *rest = _parts(tokenizer, text)
    for guesses, part in zip(found, rest, strict=True):
        filled += guesses[0].text + part
    lines = [filled]
    for number, guesses in enumerate(found, 1):
        chances = ", ".join(f"{guess.text!r} {guess.probability:.1%}" for guess in guesses)
        lines.append(f"  {number}: {chances}")
    return "\n".join(lines)
