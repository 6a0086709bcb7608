"""A router that is told where to send a row: an expert for each domain."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from models.mixture.routing import Routing, took
from partitioning import UserError
from partitioning.spoiled import spoiled


class DomainRouter(nnx.Module):
    """All tokens of a row go to the expert of the row's domain; nothing is learned, and there are no side terms.

    A call gives the domains as `routes`. Objectives that compare texts, and `MaskedLM`, give the number of a row's source in
    the mixture (`data.Mixture.sources`, in that order), `evaluation.Retrieval` its `route`. A domain that is none of the
    experts' gives NaN.

    Args:
      width: D, for nothing.
      experts, top_k: E, one for each domain, and 1.
      rngs: for nothing.

    Raises:
      UserError: another top_k than 1; a call without routes.

    Source: "Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings", Hallee et al., 2024.
    Differs: the domain stands beside the text, where the paper also puts a token of the domain into it.
    """

    def __init__(self, width: int, *, experts: int, top_k: int, rngs: nnx.Rngs):
        del width, rngs
        if top_k != 1:
            raise UserError(f"Experts.top_k = {top_k} with DomainRouter: expected 1, a row has one domain")
        self.experts = experts

    def __call__(self, x: Float[Array, "B S D"], present: Bool[Array, "B S"], context: Any = None) -> Routing:
        """Takes the row's domain."""
        if context is None or context.routes is None:
            raise UserError(
                "DomainRouter sends each row to the expert of its domain, and this call has no routes: train on a "
                "data.Mixture, whose sources are the domains, with an objective that gives them, such as InfoNCE or MaskedLM"
            )
        wide = jnp.promote_types(x.dtype, jnp.float32)
        routes = jnp.broadcast_to(context.routes[:, None, None], (*present.shape, 1))
        known = (routes >= 0) & (routes < self.experts)
        weights = spoiled(jnp.ones((), wide), ~known)
        chosen = jnp.clip(routes, 0, self.experts - 1)
        return Routing(chosen, weights, took(chosen, self.experts, wide))
