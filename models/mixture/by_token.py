"""Routers that go by the token's id: hash routing, and MaskMoE's mask of experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.mixture.routers import TopKRouter, at_most
from models.mixture.routing import Routing, took
from models.variables import Buffer, buffer
from models.vocabulary import of_trunk
from partitioning import UserError


class HashRouter(nnx.Module):
    """Each token id has k experts for good, drawn in each layer anew; nothing is learned.

    Args:
      width: D, for nothing.
      experts, top_k: E and k; each of the k has weight 1 / k.
      vocabulary: how many ids there are; None for the trunk's.
      rngs: where the draw comes from.

    Raises:
      UserError: top_k larger than the number of experts, or another vocabulary than the trunk's; a call without token ids.

    Source: "Hash Layers For Large Sparse Models", Roller et al., 2021.
    Differs: k experts add up, where the paper's several hashes each give a part of one expert's matrices.
    """

    def __init__(self, width: int, *, experts: int, top_k: int, vocabulary: int | None = None, rngs: nnx.Rngs):
        del width
        trunk = of_trunk()
        if vocabulary is None:
            if trunk is None:
                raise UserError("HashRouter.vocabulary: expected how many ids there are, outside a trunk")
            vocabulary = trunk.size
        check_rows(vocabulary, "HashRouter", None if trunk is None else trunk.size)
        self.experts, self.top_k = experts, at_most(experts, top_k)
        drawn = jax.random.uniform(rngs.params(), (vocabulary, experts))
        self.table = buffer(jax.lax.top_k(drawn, top_k)[1])

    def __call__(self, x: Float[Array, "B S D"], present: Bool[Array, "B S"], context: Any = None) -> Routing:
        """Looks up."""
        del present
        chosen = jnp.take(self.table.get_value(), ids(context, self.table, "HashRouter"), axis=0)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return Routing(chosen, jnp.full(chosen.shape, 1 / self.top_k, wide), took(chosen, self.experts, wide))


class MaskedRouter(TopKRouter):
    """`TopKRouter` in which a token sees some experts only, by its id and for good: rare ids one, frequent ones several.

    Logits of the others are -inf. Which experts an id sees is drawn in each layer anew.

    Args:
      width, experts, top_k, renormalise, scale: as in `TopKRouter`.
      frequencies: how often each id occurs, one number an id; or the path of a .npy file of them; None for those of the text
        that the run trains on, of several stages the first one's, of a mixture by its weights at the start. Ids that are no
        text, such as a mask's, never occur, and are rare.
      share: ids are frequent, the most frequent first, until they make up this share of the text.
      frequent, rare: experts that a frequent and a rare id sees; all, and one, by default.
      rngs: where the initial weights and the draw come from.

    Raises:
      UserError: numbers of experts out of range, no frequencies in the file, none that the trunk's text could give, or those of
        another vocabulary; a call without token ids.

    Source: "MaskMoE: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts", Su et al., 2024.
    Differs: the paper cuts the vocabulary at a frequency, here at a share of the text.
    """

    def __init__(
        self,
        width: int,
        *,
        experts: int,
        top_k: int,
        renormalise: bool = False,
        scale: float = 1.0,
        frequencies: str | Sequence[float] | None = None,
        share: float = 0.9,
        frequent: int | None = None,
        rare: int = 1,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, experts=experts, top_k=top_k, renormalise=renormalise, scale=scale, rngs=rngs)
        frequent = experts if frequent is None else frequent
        if not 1 <= rare <= frequent <= experts:
            raise UserError(
                f"MaskedRouter.rare = {rare}, frequent = {frequent}: expected 1 <= rare <= frequent <= the {experts} experts"
            )
        many = jnp.where(jnp.asarray(is_frequent(read(frequencies), share)), frequent, rare)
        drawn = jax.random.uniform(rngs.params(), (len(many), experts))
        order = jnp.argsort(jnp.argsort(drawn, axis=-1), axis=-1)
        self.visible = buffer(order < many[:, None])

    def logits(self, x: Float[Array, "B S D"], present: Bool[Array, "B S"], context: Any) -> Float[Array, "B S E"]:
        """-inf where an expert is hidden from the token."""
        seen = jnp.take(self.visible.get_value(), ids(context, self.visible, "MaskedRouter"), axis=0)
        return jnp.where(seen, super().logits(x, present, context), -jnp.inf)


def is_frequent(counts: Float[np.ndarray, V], share: float) -> Bool[np.ndarray, V]:
    """Which ids are the most frequent, until they make up a share of all.

    Args:
      counts: of each id.
      share: 0 to 1.

    Raises:
      UserError: a share out of range.
    """
    if not 0 <= share <= 1:
        raise UserError(f"MaskedRouter.share = {share}: expected a number in [0, 1]")
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    found = np.zeros(len(counts), bool)
    # Ids that never occur are rare, whatever the share.
    found[order] = (before < share * counts.sum()) & (counts[order] > 0)
    return found


def read(frequencies: str | Sequence[float] | None) -> Float[np.ndarray, V]:
    """Numbers by id, from a .npy file where a path is given, and the trunk's where nothing is.

    Raises:
      UserError: no such file, no row of numbers in it, or of another vocabulary than the trunk's.
    """
    name, trunk = "MaskedRouter.frequencies", of_trunk()
    if frequencies is None:
        if trunk is None or trunk.frequencies is None:
            raise UserError(f"{name}: expected a count for each token id, where no run's text gives them")
        return trunk.frequencies()
    if isinstance(frequencies, str):
        name = f"{name} = {frequencies!r}"
        try:
            found = np.load(Path(frequencies).expanduser(), allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: cannot be read: {error}") from None
    else:
        found = np.asarray(frequencies)
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iuf" or (found < 0).any():
        raise UserError(f"{name}: expected a count for each token id, an array of one dimension")
    check_rows(len(found), "MaskedRouter", None if trunk is None else trunk.size)
    return found.astype(np.float64)


def ids(context: Any, table: Buffer, router: str) -> Int[Array, "B S"]:
    """The call's token ids.

    Raises:
      UserError: it has none, or the table is of another vocabulary.
    """
    if context is None or context.tokens is None:
        raise UserError(f"{router} goes by token ids, and this call has embeddings: call the trunk with tokens")
    check_rows(table.get_value().shape[0], router, context.vocabulary)
    return context.tokens


def check_rows(rows: int, router: str, vocabulary: int | None) -> None:
    """Whether a table is of a trunk's vocabulary, where that is known.

    Raises:
      UserError: it is of another.
    """
    if vocabulary is not None and rows != vocabulary:
        raise UserError(
            f"{router}'s table is of another vocabulary: it has {rows} ids, the trunk's vocabulary has {vocabulary}"
        )
