"""Lightning attention: TransNormer's mixer, and MiniMax's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.initializers import normal
from models.linear import linear, side_by_side
from models.linear_attention.apply import Backend
from models.linear_attention.decays import Rule, log_decays
from models.linear_attention.mixer import LinearMixer, Parts, joined_heads
from models.norms import RMSNorm
from models.variables import param
from partitioning import UserError

Gate = Literal["plain", "sigmoid"]
GATES: dict[str, Callable[[jax.Array], jax.Array]] = {"plain": lambda x: x, "sigmoid": jax.nn.sigmoid}


class LightningAttention(LinearMixer):
    """Linear attention with a decay for each head and layer, normed over all heads and gated.

    q = silu(x W_q), k = silu(x W_k), v = x W_v;  S_t = lambda S_{t-1} + k_t v_t^T;
    y = (gate(x W_g) * norm(S_t^T q_t)) W_o,  the norm over all heads at once.

    Args:
      width: D.
      heads: H.
      head_width: K, also of the values; D / H by default.
      rule: of the decays lambda, see `log_decays`.
      layers: L of the whole model, which some rules ask for.
      lrpe: whether queries and keys become [x cos(theta p), x sin(theta p)] with learned frequencies theta, p the place in
        the document: a product of two then depends on their distance.
      value_activation: whether values too are silu(x W_v).
      gate: 'plain' multiplies by x W_g itself, 'sigmoid' by its sigmoid.
      norm: a class, called with the features of all heads; RMSNorm without a scale by default.
      backend: 'pallas' is a TPU's kernel.
      rngs: where the initial weights come from.

    Raises:
      UserError: heads that do not divide, or an unknown rule.

    Source: "Scaling TransNormer to 175 Billion Parameters", Qin et al., 2023; the sigmoid gate and active values: "MiniMax-01",
      MiniMax, 2025.
    Differs: nothing known.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 8,
        head_width: int | None = None,
        rule: Rule = "official",
        layers: int,
        lrpe: bool = False,
        value_activation: bool = False,
        gate: Gate = "plain",
        norm: Callable[..., nnx.Module] | None = None,
        backend: Backend = "xla",
        rngs: nnx.Rngs,
    ):
        if head_width is None and width % heads:
            raise UserError(
                f"LightningAttention.heads = {heads} does not divide the width {width}: change one, or set head_width"
            )
        size = width // heads if head_width is None else head_width
        super().__init__(width, heads=heads, key_width=size, value_width=size, rngs=rngs)
        log_decays(rule, heads=heads, layer=0, layers=layers)
        self.backend = backend
        self.rule, self.layers, self.value_activation, self.gating = rule, layers, value_activation, gate
        inner = lambda: param(normal(rngs, (width, heads, size)), ("embed", "heads", "kv"))
        self.query, self.key, self.value, self.gate = inner(), inner(), inner(), inner()
        spread = 10_000.0 ** (-2 / (heads * size) * jnp.arange(heads * size, dtype=jnp.float32))
        self.theta = param(spread.reshape(heads, size), ("heads", "kv")) if lrpe else None
        self.norm: Any = (partial(RMSNorm, scale=False) if norm is None else norm)(heads * size, axis="heads")

    def parts(self, hidden: Float[Array, "B S D"], context: Any) -> tuple[Parts, dict[str, Any]]:
        """See `LinearMixer.parts`."""
        kernels = [p.get_value().astype(hidden.dtype) for p in (self.query, self.key, self.value)]
        q, k, v = side_by_side(hidden, kernels)
        q, k = jax.nn.silu(q), jax.nn.silu(k)
        v = jax.nn.silu(v) if self.value_activation else v
        if self.theta is not None:
            q, k = (turned(x, context.positions, self.theta.get_value()) for x in (q, k))
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        decay = log_decays(self.rule, heads=self.heads, layer=context.layer, layers=self.layers, dtype=wide)
        return (q, k, v, decay[None, None]), {}

    def finish(self, mixed: Float[Array, "B S H V"], hidden: Float[Array, "B S D"]) -> Float[Array, "B S H V"]:
        """See `LinearMixer.finish`."""
        gate = GATES[self.gating](linear(hidden, self.gate.get_value().astype(hidden.dtype)))
        return gate * self.norm(joined_heads(mixed)).reshape(mixed.shape)

    @property
    def state_keys(self) -> int:
        """Twice K with `lrpe`."""
        return self.key_width * (1 if self.theta is None else 2)


def turned(
    x: Float[Array, "B S H K"], positions: Int[Array, "B S"], theta: Float[Array, "H K"]
) -> Float[Array, "B S H 2K"]:
    """[x cos(theta p), x sin(theta p)]: the product of two is sum_c x_c y_c cos(theta_c (p_x - p_y)).

    Source: LRPE: "Linearized Relative Positional Encoding", Qin et al., 2023.
    Differs: nothing known.
    """
    angles = positions[..., None, None].astype(theta.dtype) * theta
    return jnp.concatenate([x * jnp.cos(angles).astype(x.dtype), x * jnp.sin(angles).astype(x.dtype)], axis=-1)
