"""A mixture of experts: a router, the experts it sends tokens to, and what it asks to have added to the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from models.feed_forward import Activation, FeedForward
from models.initializers import normal
from models.linear import linear
from models.mixture.balance import Over, Scope, load_balance, z_term
from models.mixture.dispatch import Form, capacity, dropless, picked
from models.mixture.routers import TopKRouter
from models.mixture.routing import Picks, Routing, took
from models.side import Beside, Tally
from models.variables import param
from partitioning import UserError, constrain


class Experts(nnx.Module):
    """Sends each token to a few experts.

    y = sum_e w_e (act(x W_e) * (x V_e)) U_e over the experts e that the router chose, with its weights w; and behind it a
    shared expert's result, where there is one: (act(x W) * (x V)) U, with a gate sigmoid(x w) times that.

    Side terms, over the tokens that are not padding: `balance` and `z`, see `load_balance` and `z_term`, of routers that
    learn. A tally of the experts: how often each was chosen, by the form 'capacity' how many of these choices found no room,
    and the bias of a router that has one.

    Args:
      width: D.
      experts: E.
      top_k: experts a token goes to.
      hidden: features inside one expert; D by default.
      activation: as in `FeedForward`.
      router: what chooses, a class called with the width, `experts`, `top_k` and `rngs`; `TopKRouter` by default.
      shared: features inside an expert that every token goes to; None for none.
      shared_gate: whether the shared expert's result is gated.
      balance, z: coefficients of the side terms, averaged over the layers.
      balance_over, balance_scope: `over` and `scope` of the balance term, see `load_balance`.
      form: how experts are run. 'blocks' multiplies the sorted tokens by blocks, 'ragged' by `ragged_dot`; 'dense' runs all
        experts on all tokens; these drop none. 'capacity' gives each expert as many tokens at most, later ones of the batch
        are dropped, and rows are not independent. None is 'ragged' on a TPU and 'blocks' elsewhere. Where experts choose,
        all take as many tokens, and the form is not asked. Whether experts come to tokens or tokens to experts the rules
        say: see `partitioning.fsdp_expert`.
      capacity: of the form 'capacity', and of no other, an expert's most tokens over those it has when all have as many.
      rngs: where the initial weights come from.

    Raises:
      UserError: what the router refuses, a gate of a shared expert that is not there, a capacity without its form or the form
        without it, or a form where experts choose.

    Source: "Outrageously Large Neural Networks", Shazeer et al., 2017; blocks: "MegaBlocks", Gale et al., 2022; capacity:
      "GShard", Lepikhin et al., 2020; shared expert: "DeepSeekMoE", Dai et al., 2024; its gate: Qwen1.5-MoE, 2024.
    Differs: nothing known.
    """

    counts_tokens = True

    def __init__(
        self,
        width: int,
        *,
        experts: int = 8,
        top_k: int = 2,
        hidden: int | None = None,
        activation: Activation = "silu",
        router: Callable[..., nnx.Module] | None = None,
        shared: int | None = None,
        shared_gate: bool = False,
        balance: float = 0.01,
        balance_over: Over = "choices",
        balance_scope: Scope = "batch",
        z: float = 0.001,
        form: Form | None = None,
        capacity: float | None = None,
        rngs: nnx.Rngs,
    ):
        if shared_gate and shared is None:
            raise UserError("Experts.shared_gate without Experts.shared: expected the features of a shared expert")
        if (form == "capacity") != (capacity is not None):
            raise UserError(
                f"Experts.form = {form!r} with Experts.capacity = {capacity}: expected the form 'capacity' and a number, or neither"
            )
        hidden = width if hidden is None else hidden
        self.top_k, self.form, self.capacity, self.activation = top_k, form, capacity, activation
        self.balance, self.balance_over, self.balance_scope, self.z = balance, balance_over, balance_scope, z
        self.router: Any = (router or TopKRouter)(width, experts=experts, top_k=top_k, rngs=rngs)
        self.inner = param(normal(rngs, (experts, width, hidden)), ("expert", "embed", "mlp"))
        self.gate = param(normal(rngs, (experts, width, hidden)), ("expert", "embed", "mlp"))
        self.outer = param(normal(rngs, (experts, hidden, width)), ("expert", "mlp", "embed"))
        plain = partial(FeedForward, activation=activation, gated=True, rngs=rngs)
        self.shared = None if shared is None else plain(width, hidden=shared)
        self.shared_gate = param(normal(rngs, (width,)), ("embed",)) if shared_gate else None

    @property
    def couples_rows(self) -> str:
        """What would make rows independent, where they are not."""
        return "Experts.form = 'blocks'" if self.form == "capacity" else ""

    def __call__(
        self, x: Float[Array, "B S D"], present: Bool[Array, "B S"], context: Any = None
    ) -> tuple[Float[Array, "B S D"], Beside]:
        """Transforms every token; returns the side terms' and the tally's raw sums over `present` tokens.

        Args:
          x: states.
          present: which tokens are no padding.
          context: the block's, for routers that go by token ids, draw, or must know the mask.
        """
        routing: Routing | Picks = self.router(x, present, context)
        out, dropped = self._routed(x, routing, present)
        here = jax.lax.stop_gradient(routing.taken * present[..., None])
        sides: Beside = {"experts": Tally(here.sum((0, 1)), dropped, routing.bias, jnp.ones(()))}
        if routing.shares is not None:
            sides["balance"] = load_balance(
                routing.shares,
                routing.taken,
                present,
                top_k=self.top_k,
                over=self.balance_over,
                scope=self.balance_scope,
                coefficient=self.balance,
            )
        if routing.logits is not None:
            sides["z"] = z_term(routing.logits, present, coefficient=self.z)
        out = constrain(out, "batch", "length", "embed")
        return (out if self.shared is None else out + self._for_all(x, present)), sides

    def _routed(self, x: Float[Array, "B S D"], routing: Routing | Picks, present: Bool[Array, "B S"]) -> Any:
        """The chosen experts' result, and how many choices of each were dropped, where some may be."""
        inner, gate, outer = (p.get_value().astype(x.dtype) for p in (self.inner, self.gate, self.outer))
        matrices = (inner, gate, outer)
        if isinstance(routing, Picks):
            if self.form is not None:
                raise UserError(
                    f"Experts.form = {self.form!r}: experts that choose all take as many tokens, leave it out"
                )
            return picked(self.activation, x, routing.weights, routing.slots, matrices), None
        weights, chosen = routing.weights, routing.chosen
        if self.capacity is None:
            return dropless(self.form, self.activation, x, weights, chosen, matrices), None
        out, kept = capacity(self.capacity, self.activation, x, weights, chosen, present, matrices)
        lost = took(chosen, routing.taken.shape[-1], routing.taken.dtype, ~kept & present[..., None])
        return out, (lost * routing.taken).sum((0, 1))

    def _for_all(self, x, present):
        """The shared expert's result."""
        assert self.shared is not None
        out, _ = self.shared(x, present)
        if self.shared_gate is None:
            return out
        return out * jax.nn.sigmoid(linear(x, self.shared_gate.get_value().astype(x.dtype)))[..., None]
