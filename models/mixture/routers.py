"""Routers: what sends tokens to experts. Each is called with the states, which of them are no padding, and the block's context."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from models.initializers import normal
from models.mixture.routing import Picks, Routing, largest, took
from models.variables import Statistic, observed, param
from partitioning import UserError, constrain


class TopKRouter(nnx.Module):
    """The k likeliest experts by a softmax over all.

    g = softmax(x R), w_e = scale g_e for the k largest; with `renormalise` scale g_e / sum of those k, which is the softmax
    of the k largest logits alone.

    Args:
      width: D.
      experts, top_k: E and k.
      renormalise: whether the k weights are divided by their sum.
      scale: what the weights are multiplied by.
      rngs: where the initial weights come from.

    Raises:
      UserError: top_k larger than the number of experts.

    Source: "Outrageously Large Neural Networks", Shazeer et al., 2017; without renormalising: "OLMoE", Muennighoff et al., 2024.
    Differs: no noise.
    """

    def __init__(
        self,
        width: int,
        *,
        experts: int,
        top_k: int,
        renormalise: bool = False,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.experts, self.top_k = experts, at_most(experts, top_k)
        self.renormalise, self.scale = renormalise, scale
        self.kernel = param(normal(rngs, (width, experts)), ("embed", None))

    def __call__(self, x: Float[Array, "B S D"], present: Bool[Array, "B S"], context: Any = None) -> Routing:
        """Chooses."""
        logits = self.logits(x, present, context)
        shares = jax.nn.softmax(logits)
        weights, chosen = largest(shares, self.top_k)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        # What is hidden from a token is no choice, even where nothing else is left.
        taken = took(chosen, self.experts, logits.dtype) * (logits > -jnp.inf)
        return Routing(chosen, self.scale * weights, taken, shares, logits)

    def logits(self, x: Float[Array, "B S D"], present: Bool[Array, "B S"], context: Any) -> Float[Array, "B S E"]:
        """x R in float32; a kind of router may change them, or hide an expert by -inf."""
        del present, context
        return _logits(x, self.kernel)


class SigmoidRouter(nnx.Module):
    """The k experts of the highest sigmoid scores, kept in balance by a bias that only chooses.

    s = sigmoid(x R). The k largest of s + b among the experts of the `top_groups` groups whose two largest s + b have the
    largest sums; w_e = scale s_e / sum of the k. After each step, c the choices of each expert over its whole batch,
    b_e = b_e + rate sign(mean(c) - c_e).

    Args:
      width: D.
      experts, top_k: E and k.
      groups, top_groups: groups of experts beside each other, and how many of them a token may go to.
      renormalise: whether the k weights are divided by their sum.
      scale: what the weights are multiplied by.
      rate: of the bias; 0 leaves it.
      rngs: where the initial weights come from.

    Raises:
      UserError: more choices than the groups have experts, or experts that do not divide into groups of two or more.

    Source: "DeepSeek-V3 Technical Report", DeepSeek-AI, 2024; the bias: "Auxiliary-Loss-Free Load Balancing Strategy for
      Mixture-of-Experts", Wang et al., 2024.
    Differs: nothing known.
    """

    def __init__(
        self,
        width: int,
        *,
        experts: int,
        top_k: int,
        groups: int = 1,
        top_groups: int = 1,
        renormalise: bool = True,
        scale: float = 1.0,
        rate: float = 0.001,
        rngs: nnx.Rngs,
    ):
        if not 1 <= top_groups <= groups:
            raise UserError(f"SigmoidRouter.top_groups = {top_groups}: expected 1 to SigmoidRouter.groups = {groups}")
        if experts % groups or (groups > 1 and experts < 2 * groups):
            raise UserError(
                f"Experts.experts = {experts} in SigmoidRouter.groups = {groups}: expected groups of one size, 2 or more"
            )
        at_most(experts // groups * top_groups, top_k, of=" in the groups that a token may go to")
        self.experts, self.top_k, self.groups, self.top_groups = experts, top_k, groups, top_groups
        self.renormalise, self.scale, self.rate = renormalise, scale, rate
        self.kernel = param(normal(rngs, (width, experts)), ("embed", None))
        self.bias = Statistic(jnp.zeros((experts,)), axes=(None,))

    def __call__(self, x: Float[Array, "B S D"], present: Bool[Array, "B S"], context: Any = None) -> Routing:
        """Chooses; the bias's cotangent is the number of choices of each expert."""
        logits = _logits(x, self.kernel)
        scores, bias = jax.nn.sigmoid(logits), self.bias.get_value()
        _, chosen = largest(self._allowed(jax.lax.stop_gradient(scores + bias)), self.top_k)
        weights = jnp.take_along_axis(scores, chosen, -1)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        taken = took(chosen, self.experts, logits.dtype)
        counts = (taken * present[..., None]).sum((0, 1))
        weights = observed(weights, {"bias": bias}, {"bias": counts})
        shares = scores / scores.sum(-1, keepdims=True)
        return Routing(chosen, self.scale * weights, taken, shares, logits, jax.lax.stop_gradient(bias))

    def _allowed(self, ranked: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
        """-inf outside the best groups."""
        if self.top_groups == self.groups:
            return ranked
        apart = ranked.reshape(*ranked.shape[:-1], self.groups, -1)
        _, best = largest(largest(apart, 2)[0].sum(-1), self.top_groups)
        among = took(best, self.groups, ranked.dtype)[..., None] > 0
        return jnp.where(among, apart, -jnp.inf).reshape(ranked.shape)

    def observe(self, sums: dict[str, Float[Array, ...]]) -> None:
        """Moves the bias by a step's choices of each expert."""
        counts = sums["bias"]
        step = self.rate * jnp.sign(counts.mean(-1, keepdims=True) - counts)
        self.bias.set_value((self.bias.get_value() + step).astype(self.bias.get_value().dtype))


class WarmUpRouter(TopKRouter):
    """`TopKRouter` whose logits are at first random ones of the same mean and spread.

    l = a x R + (1 - a) (mean + deviation e), e normal, a = min(i / steps, 1) at the i-th step; mean and deviation are running
    ones over the logits of all tokens and experts. Outside training l = x R.

    Args:
      width, experts, top_k, renormalise, scale: as in `TopKRouter`.
      steps: how long the warm-up takes.
      decay: how much of the running means stays at a step, once more than that has been seen.
      rngs: where the initial weights come from.

    Source: "Every FLOP Counts: Scaling a 300B Mixture-of-Experts LING LLM without Premium GPUs", Ling team, 2025.
    Differs: the paper leaves open over what the running statistics go and how fast; here over one layer, by `decay`.
    """

    def __init__(
        self,
        width: int,
        *,
        experts: int,
        top_k: int,
        renormalise: bool = False,
        scale: float = 1.0,
        steps: int = 1000,
        decay: float = 0.9,
        rngs: nnx.Rngs,
    ):
        if steps < 1 or not 0 <= decay < 1:
            raise UserError(
                f"WarmUpRouter.steps = {steps}, decay = {decay}: expected 1 or more, and a number in [0, 1)"
            )
        super().__init__(width, experts=experts, top_k=top_k, renormalise=renormalise, scale=scale, rngs=rngs)
        self.steps, self.decay = steps, decay
        # The name by which `nnx.Module.train` finds it.
        self.deterministic = True
        self.mean = Statistic(jnp.zeros(()), axes=())
        self.mean_square = Statistic(jnp.ones(()), axes=())
        self.updates = Statistic(jnp.zeros(()), axes=())

    def logits(self, x: Float[Array, "B S D"], present: Bool[Array, "B S"], context: Any) -> Float[Array, "B S E"]:
        """Mixed with noise in training; the statistics' cotangents are the sums over logits, of their squares, and of 1."""
        clean = super().logits(x, present, context)
        if self.deterministic:
            return clean
        if context is None or context.keys is None:
            raise UserError(
                "WarmUpRouter draws in training, and this call has no keys: hand some in, or take TopKRouter"
            )
        statistics = {name: getattr(self, name).get_value() for name in ("mean", "mean_square", "updates")}
        mean, square, updates = jax.lax.stop_gradient(tuple(statistics.values()))
        here = present.astype(clean.dtype)[..., None]
        sums = {"mean": (clean * here).sum(), "mean_square": (clean * clean * here).sum()}
        sums["updates"] = here.sum() * self.experts
        clean = observed(clean, statistics, sums)
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, 3), clean.shape[1:], clean.dtype)
        noise = mean + jnp.sqrt(jnp.maximum(square - mean * mean, 0)) * jax.vmap(draw)(context.keys)
        a = jnp.minimum(updates / self.steps, 1)
        return a * clean + (1 - a) * noise

    def observe(self, sums: dict[str, Float[Array, ...]]) -> None:
        """Moves the running means by a step's sums; `updates` counts steps."""
        count, done = sums["updates"], self.updates.get_value()
        stays = jnp.minimum(self.decay, done / (done + 1))
        for name in ("mean", "mean_square"):
            old = getattr(self, name).get_value()
            new = stays * old + (1 - stays) * sums[name] / jnp.maximum(count, 1)
            getattr(self, name).set_value(jnp.where(count > 0, new, old).astype(old.dtype))
        self.updates.set_value(jnp.where(count > 0, done + 1, done))


class ExpertChoice(nnx.Module):
    """Experts choose: each takes the C tokens of a row that want it most.

    g = softmax(x R) over the experts; expert e takes the C tokens of the largest g_e, C = top_k S / E rounded up, with the
    weights g_e. A token may have many experts, or none.

    Which tokens an expert takes depends on all of the row, later tokens and other documents in it included: a mask that hides
    a token from one that it sees (causal, a prefix, a permutation) and decoding are refused, and documents packed in one row
    are not independent.

    Args:
      width: D.
      experts, top_k: E, and how many experts a token has on average.
      rngs: where the initial weights come from.

    Raises:
      UserError: top_k larger than the number of experts; a call under such a mask, or with a cache.

    Source: "Mixture-of-Experts with Expert Choice Routing", Zhou et al., 2022.
    Differs: experts choose among the tokens of a row, not of the batch, so that rows are independent.
    """

    warning = (
        "models.ExpertChoice: documents packed in one row are not independent, their tokens compete for experts; "
        "data.Cached.pack = False reads one a row"
    )

    def __init__(self, width: int, *, experts: int, top_k: int, rngs: nnx.Rngs):
        self.experts, self.top_k = experts, at_most(experts, top_k)
        self.kernel = param(normal(rngs, (width, experts)), ("embed", None))

    def __call__(self, x: Float[Array, "B S D"], present: Bool[Array, "B S"], context: Any = None) -> Picks:
        """Chooses; padding is taken last, and has no weight."""
        if context is not None and (not context.mask.mutual or context.cache is not None):
            raise UserError(
                "ExpertChoice lets experts see the whole row, later tokens too: a causal mask, or one that hides what comes "
                "later in another order, and decoding cannot be kept; use another router, or an objective whose mask hides nothing"
            )
        logits = _logits(x, self.kernel)
        shares = jax.nn.softmax(logits)
        size = x.shape[1]
        wanted = jnp.where(present[..., None], shares, 0).swapaxes(1, 2)
        most = min(math.ceil(self.top_k * size / self.experts), size)
        weights, slots = largest(wanted, most, ("batch",))
        taken = jax.nn.one_hot(slots, size, dtype=logits.dtype).sum(2).swapaxes(1, 2)
        return Picks(slots, weights, jax.lax.stop_gradient(taken), shares, logits)


def at_most(experts: int, top_k: int, of: str = "") -> int:
    """top_k, where there are as many experts.

    Raises:
      UserError: there are fewer, or top_k is below 1.
    """
    if top_k < 1:
        raise UserError(f"Experts.top_k = {top_k}: expected 1 or more")
    if top_k > experts:
        raise UserError(f"Experts.top_k = {top_k} is more than the {experts} experts{of}")
    return top_k


def _logits(x, kernel):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return constrain(x.astype(wide) @ kernel.get_value().astype(wide), "batch", "length", None)
