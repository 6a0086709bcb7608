"""A dropless mixture of experts: a dense oracle and a grouped form."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.feed_forward import ACTIVATIONS, Activation, FeedForward
from models.initializers import normal
from models.linear import linear
from models.side import Side, Sides
from models.variables import param
from partitioning import UserError, constrain


class Experts(nnx.Module):
    """Sends each token to its k likeliest experts and drops none.

    y = sum_e g_e(x) (act(x W_e) * (x V_e)) U_e over the top k experts of g = softmax(x R), and behind it a shared expert's
    result, where there is one: (act(x W) * (x V)) U, with a gate sigmoid(x w) times that.

    Side terms, over the tokens that are not padding:
      balance: E sum_e f_e P_e, f_e the fraction of the k choices that went to e, P_e the mean probability; 1 when even.
      z: mean logsumexp(x R)^2.

    Args:
      width: D.
      experts: E.
      top_k: experts a token goes to.
      hidden: features inside one expert.
      activation: as in `FeedForward`.
      renormalise: whether the k weights are divided by their sum.
      shared: features inside an expert that every token goes to; None for none.
      shared_gate: whether the shared expert's result is gated.
      balance, z: coefficients of the side terms, averaged over the layers.
      form: 'grouped' sorts the tokens by expert and multiplies groups; 'dense' runs every expert on every token.
      rngs: where the initial weights come from.

    Raises:
      UserError: top_k larger than the number of experts, or a gate of a shared expert that is not there.

    Source: "OLMoE", Muennighoff et al., 2024; balance term: "Switch Transformers", Fedus et al., 2021; shared expert:
      "DeepSeekMoE", Dai et al., 2024; its gate: Qwen1.5-MoE, 2024.
    Differs: f counts choices (its sum is 1), so `balance` is divided by top_k against OLMoE's released code.
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
        renormalise: bool = False,
        shared: int | None = None,
        shared_gate: bool = False,
        balance: float = 0.01,
        z: float = 0.001,
        form: Literal["grouped", "dense"] = "grouped",
        rngs: nnx.Rngs,
    ):
        if top_k > experts:
            raise UserError(f"Experts.top_k = {top_k} is more than Experts.experts = {experts}")
        if shared_gate and shared is None:
            raise UserError("Experts.shared_gate without Experts.shared: expected the features of a shared expert")
        hidden = width if hidden is None else hidden
        self.experts, self.top_k, self.renormalise, self.form = experts, top_k, renormalise, form
        self.activation, self.balance, self.z = activation, balance, z
        self.router = param(normal(rngs, (width, experts)), ("embed", None))
        self.inner = param(normal(rngs, (experts, width, hidden)), ("expert", "embed", "mlp"))
        self.gate = param(normal(rngs, (experts, width, hidden)), ("expert", "embed", "mlp"))
        self.outer = param(normal(rngs, (experts, hidden, width)), ("expert", "mlp", "embed"))
        plain = partial(FeedForward, activation=activation, gated=True, rngs=rngs)
        self.shared = None if shared is None else plain(width, hidden=shared)
        self.shared_gate = param(normal(rngs, (width,)), ("embed",)) if shared_gate else None

    def __call__(self, x: Float[Array, "B S D"], present: Float[Array, "B S"]) -> tuple[Float[Array, "B S D"], Sides]:
        """Transforms every token; returns the side terms' raw sums over `present` tokens."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        logits = x.astype(wide) @ self.router.get_value()
        probabilities = jax.nn.softmax(logits)
        weights, chosen = jax.lax.top_k(probabilities, self.top_k)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        mix = self._grouped if self.form == "grouped" else self._dense
        out = mix(x.reshape(-1, x.shape[-1]), weights.reshape(-1, self.top_k), chosen.reshape(-1, self.top_k))
        counts = jax.nn.one_hot(chosen, self.experts, dtype=wide).sum(-2)
        seen = present.astype(wide)[..., None]
        tokens = seen.sum()
        sides = {
            "balance": Side(
                total=(probabilities * seen).sum((0, 1)) * (self.experts / self.top_k),
                weight=tokens,
                fixed=jax.lax.stop_gradient((counts * seen).sum((0, 1))),
                coefficient=self.balance,
            ),
            "z": Side(
                total=(jnp.square(jax.nn.logsumexp(logits, -1)) * seen[..., 0]).sum(), weight=tokens, coefficient=self.z
            ),
        }
        out = constrain(out.reshape(x.shape), "batch", "length", "embed")
        return (out if self.shared is None else out + self._for_all(x, present)), sides

    def _for_all(self, x, present):
        """The shared expert's result."""
        assert self.shared is not None
        out, _ = self.shared(x, present)
        if self.shared_gate is None:
            return out
        return out * jax.nn.sigmoid(linear(x, self.shared_gate.get_value().astype(x.dtype)))[..., None]

    def _matrices(self, dtype):
        return [p.get_value().astype(dtype) for p in (self.inner, self.gate, self.outer)]

    def _dense(
        self, x: Float[Array, "N D"], weights: Float[Array, "N k"], chosen: Int[Array, "N k"]
    ) -> Float[Array, "N D"]:
        """Every expert on every token: the oracle."""
        inner, gate, outer = self._matrices(x.dtype)
        act = ACTIVATIONS[self.activation]
        each = jnp.einsum(
            "nef,efd->ned", act(jnp.einsum("nd,edf->nef", x, inner)) * jnp.einsum("nd,edf->nef", x, gate), outer
        )
        share = (jax.nn.one_hot(chosen, self.experts, dtype=weights.dtype) * weights[..., None]).sum(1)
        return jnp.einsum("ne,ned->nd", share.astype(x.dtype), each)

    def _grouped(
        self, x: Float[Array, "N D"], weights: Float[Array, "N k"], chosen: Int[Array, "N k"]
    ) -> Float[Array, "N D"]:
        """Tokens sorted by expert, one grouped product a matrix; the work is k / E of the dense form's."""
        inner, gate, outer = self._matrices(x.dtype)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=self.experts).astype(jnp.int32)
        rows = x[order // self.top_k]
        hidden = ACTIVATIONS[self.activation](jax.lax.ragged_dot(rows, inner, sizes)) * jax.lax.ragged_dot(
            rows, gate, sizes
        )
        each = jax.lax.ragged_dot(hidden, outer, sizes)
        back = jnp.argsort(order)
        return (each[back].reshape(*chosen.shape, -1) * weights[..., None].astype(x.dtype)).sum(1)
