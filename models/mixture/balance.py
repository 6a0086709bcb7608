"""Side terms of a router: that experts are used alike, and that logits stay small."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.side import Side

Over = Literal["choices", "tokens"]
Scope = Literal["batch", "micro_batch", "sequence"]


def load_balance(
    shares: Float[Array, "B S E"],
    taken: Float[Array, "B S E"],
    present: Bool[Array, "B S"],
    *,
    top_k: int,
    over: Over,
    scope: Scope,
    coefficient: float,
) -> Side:
    """E sum_e f_e P_e over tokens that are no padding: f_e how much e was chosen, P_e its mean share; f has no gradient.

    Args:
      shares: probabilities of the experts.
      taken: 1 where a token goes to an expert.
      present: which tokens are no padding.
      top_k: experts a token goes to.
      over: 'choices' has f_e the fraction of all choices, and the term is 1 when all is even; 'tokens' has it the fraction of
        tokens, and the term is k. OLMoE and megablocks divide by choices, `transformers` and MaxText by tokens.
      scope: what f and P are means over: 'batch', the step's whole batch on all devices and in all micro-batches;
        'micro_batch', which depends on how many there are; 'sequence', each row, and the term is the mean over rows.
      coefficient: of the term.

    Source: "Switch Transformers", Fedus et al., 2021; by sequence: "DeepSeek-V3 Technical Report", DeepSeek-AI, 2024; over
      the whole batch: "Demons in the Detail", Qiu et al., 2025.
    Differs: nothing known.
    """
    experts, per = shares.shape[-1], top_k if over == "choices" else 1
    here = present.astype(shares.dtype)[..., None]
    each, counts = (shares * here).sum(1), jax.lax.stop_gradient((taken * here).sum(1))
    tokens = here.sum((1, 2))
    if scope == "batch":
        return Side(each.sum(0) * (experts / per), tokens.sum(), counts.sum(0), coefficient)
    if scope == "micro_batch":
        each, counts, tokens = each.sum(0), counts.sum(0), tokens.sum()
        term = (counts * each).sum() * (experts / per) / jnp.maximum(tokens, 1)
        return Side(term, tokens, coefficient=coefficient)
    term = (counts * each).sum(-1) * (experts / per) / jnp.maximum(tokens, 1) ** 2
    return Side(term.sum(), (tokens > 0).astype(term.dtype).sum(), coefficient=coefficient)


def z_term(logits: Float[Array, "B S E"], present: Bool[Array, "B S"], *, coefficient: float) -> Side:
    """mean logsumexp(logits)^2 over tokens that are no padding.

    Args:
      logits: of the experts.
      present: which tokens are no padding.
      coefficient: of the term.

    Source: "ST-MoE", Zoph et al., 2022.
    Differs: nothing known.
    """
    here = present.astype(logits.dtype)
    return Side((jnp.square(jax.nn.logsumexp(logits, -1)) * here).sum(), here.sum(), coefficient=coefficient)
