"""The training step: one pure function from (state, batch) to (state, metrics)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from models.side import Tallies
from objectives.base import SHARED, Batch, Loss, Models, Objective
from objectives.draws import draws
from training.ema import Ema
from training.guard import Guard, chosen
from training.metrics import group_norms
from training.optimizers import Optimizer
from training.state import State
from training.trees import Trees

Stats = dict[str, Array]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What a stage's step is made of.

    Args:
      trees: the modules.
      objective: the loss.
      optimizer: the rule for gradients.
      stage: which of the run's it is, whose rates the state has.
      batch_size: rows in a step.
      accumulate: micro-batches in a step.
      clip: largest global norm of a gradient, or None.
      guard, average: see `Guard` and `Ema`; None for none.
      sources: how many sources the data mixes, 0 for none; statistics are kept for each.
    """

    trees: Trees
    objective: Objective
    optimizer: Optimizer
    stage: int
    batch_size: int
    accumulate: int = 1
    clip: float | None = 1.0
    guard: Guard | None = None
    average: Ema | None = None
    sources: int = 0

    def __call__(self, state: State, batch: Batch) -> tuple[State, dict[str, Any]]:
        """Takes one optimizer step; meant for `jax.jit` with the state donated.

        Returns:
          The new state, and `metrics` to report beside the raw `sums` that controllers read and the models' `tallies`.
        """
        key = draws(jax.random.key(state.seed), state.step, batch["row"], self.batch_size)
        models = self.trees.models(state.params, state.frozen, state.buffers)
        batch = jax.lax.stop_gradient(self.objective.prepare(models, batch, step=state.step, key=key))

        gradients, observed, stats, rows, tallies = self.gradients(state, batch)
        norm = optax.tree.norm(gradients)
        if self.clip is not None:
            shrink = jnp.minimum(1.0, self.clip / jnp.maximum(norm, 1e-30))
            gradients = jax.tree.map(lambda g: g * shrink.astype(g.dtype), gradients)
        rule = self.optimizer.tabled(state.rates[self.stage])
        tx = rule({name: self.trees.axes[name] for name in state.params})
        updates, optimizer = tx.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)

        models = self.trees.models(params, state.frozen, state.buffers)
        self.trees.observe(models, observed)
        self.objective.after_step(models, rows, stats, step=state.step)
        average = state.average
        if self.average is not None and average is not None:
            average = self.average.update(average, params, state.step)
        new = replace(state, params=params, buffers=self.trees.buffers(models), optimizer=optimizer, average=average)

        metrics = {
            **reduced(stats),
            "gradient_norm": norm,
            **{f"norms/parameters/{k}": v for k, v in group_norms(params).items()},
            **{f"norms/gradients/{k}": v for k, v in group_norms(gradients).items()},
            **{f"norms/updates/{k}": v for k, v in group_norms(updates).items()},
        }
        guard = state.guard
        if self.guard is not None:
            ok, guard = self.guard(state.guard, stats["loss"], norm)
            # A skipped step leaves everything as it was, buffers too; only the step count and the guard move.
            new = chosen(ok, new, state)
            # Nor do controllers hear of it: one sum that is not finite would stay in theirs. No token chose anything.
            stats, tallies = jax.tree.map(lambda value: jnp.where(ok, value, 0), (stats, tallies))
            metrics |= {"skipped": guard["skipped"], "skipped_in_a_row": guard["run"]}
        metrics |= rule.rates(state.step)
        out = {"metrics": metrics, "sums": stats, "tallies": tallies}
        return replace(new, step=state.step + 1, frozen=state.frozen, guard=guard), out

    def forward(self, state: State, batch: Batch) -> Loss:
        """The loss of the first micro-batch, as the step's own call has it; traced before step 0, for what it refuses."""
        key = draws(jax.random.key(state.seed), state.step, batch["row"], self.batch_size)
        models = self.trees.models(state.params, state.frozen, state.buffers)
        batch = self.objective.prepare(models, batch, step=state.step, key=key)
        part = {k: v if k.startswith(SHARED) else self._parts(v)[0] for k, v in batch.items()}
        return self._call(state, state.params, {}, part)[0]

    def _call(self, state: State, params: Any, statistics: Any, part: Batch) -> tuple[Loss, Models]:
        models = self.trees.models(params, state.frozen, state.buffers | statistics, training=True)
        key = draws(jax.random.key(state.seed), state.step, part["row"], self.batch_size)
        return self.objective(models, part, step=state.step, key=key), models

    def gradients(
        self, state: State, batch: Batch
    ) -> tuple[dict[str, Array], dict[str, Array], Stats, dict[str, Array], Tallies]:
        """Gradients of the loss, sums for the modules' statistics, the sums of its terms, what the calls returned by row, and
        the models' tallies.

        With several micro-batches a first scan sums the terms' weights, which do not depend on parameters, so that the
        compiler drops the model from it; a second accumulates one gradient. Both sums of a ratio are then over the
        whole batch, and the result is the big batch's.
        """

        statistics = {name: value for name, value in state.buffers.items() if name in self.trees.statistics}

        call = partial(self._call, state)

        def weights(part: Batch) -> Stats:
            loss, models = call(state.params, statistics, part)
            return divisors(loss, models)

        def value(params: Any, statistics: Any, part: Batch, over: Stats | None) -> tuple[Float[Array, ""], Any]:
            loss, models = call(params, statistics, part)
            own = divisors(loss, models)
            total = weighed(loss, models, own if over is None else over)
            stats = {**sums(loss, models, part, self.sources), **own, "loss": total}
            return total, jax.lax.stop_gradient(((stats, dict(models.tallies)), dict(loss.rows)))

        # A statistic's cotangent is what its module asked to be summed.
        grad = partial(jax.grad(value, argnums=(0, 1), has_aux=True), state.params, statistics)
        if self.accumulate == 1:
            (gradients, observed), ((stats, tallies), rows) = grad(batch, None)
            return gradients, observed, stats, rows, tallies
        shared = {k: v for k, v in batch.items() if k.startswith(SHARED)}
        parts = {k: self._parts(v) for k, v in batch.items() if k not in shared}
        add = lambda a, b: jax.tree.map(jnp.add, a, b)
        zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
        first = {k: v[0] for k, v in parts.items()}
        start = zeros(jax.eval_shape(weights, first | shared))
        over, _ = jax.lax.scan(lambda total, part: (add(total, weights(part | shared)), None), start, parts)

        def accumulate(carry: Any, part: Batch) -> tuple[Any, Any]:
            gradients, (kept, rows) = grad(part | shared, over)
            return add(carry, (gradients, kept)), rows

        shapes = jax.eval_shape(lambda part: grad(part, over), first | shared)
        start = zeros((shapes[0], shapes[1][0]))
        ((gradients, observed), (stats, tallies)), rows = jax.lax.scan(accumulate, start, parts)
        return gradients, observed, stats, {name: self._whole(x) for name, x in rows.items()}, tallies

    def _parts(self, x: Array) -> Array:
        """[B, ...] -> [k, B/k, ...], each micro-batch every k-th row: a blocked split would move rows between devices."""
        return x.reshape(x.shape[0] // self.accumulate, self.accumulate, *x.shape[1:]).swapaxes(0, 1)

    def _whole(self, x: Array) -> Array:
        """The inverse of `_parts`."""
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _sides(models: Models) -> dict[str, Any]:
    return {f"side/{call}/{name}": side for call, sides in models.sides.items() for name, side in sides.items()}


def divisors(loss: Loss, models: Models) -> Stats:
    """What must be summed over the whole batch before a gradient: weights, and sums without a gradient."""
    out = {f"{name}/weight": jnp.asarray(term.weight) for name, term in loss.terms.items()}
    for name, side in _sides(models).items():
        out[f"{name}/weight"] = side.weight
        if side.fixed is not None:
            out[f"{name}/fixed"] = side.fixed
    return jax.lax.stop_gradient(out)


def weighed(loss: Loss, models: Models, over: Mapping[str, Array]) -> Float[Array, ""]:
    """The loss of these rows, given the divisors of the whole batch; summed over micro-batches it is the batch's."""
    # An empty term is 0 / 0 and counts as 0.
    safe = lambda w: jnp.where(w == 0, 1, w)
    total: Any = 0.0
    for name, term in loss.terms.items():
        if not (isinstance(term.coefficient, (int, float)) and term.coefficient == 0):
            total = total + term.coefficient * term.total / safe(over[f"{name}/weight"])
    for name, side in _sides(models).items():
        if side.coefficient:
            divide = lambda x, w: x / safe(w).reshape(w.shape + (1,) * (x.ndim - w.ndim))
            part = divide(side.total, over[f"{name}/weight"])
            if side.fixed is not None:
                part = part * divide(over[f"{name}/fixed"], over[f"{name}/weight"])
            total = total + side.coefficient * part.sum()
    return total


def sums(loss: Loss, models: Models, batch: Batch, sources: int) -> Stats:
    """Totals of all terms, and of a mixture those of each source."""
    out = {f"{name}/total": term.total for name, term in loss.terms.items()}
    out |= {f"{name}/total": side.total for name, side in _sides(models).items()}
    if sources:
        for name, term in loss.terms.items():
            if term.rows is not None:
                by_source = lambda x: jax.ops.segment_sum(x, batch["source"], sources)
                out[f"source/{name}/total"], out[f"source/{name}/weight"] = map(by_source, term.rows)
    return out


def reduced(stats: Stats) -> Stats:
    """Ratios of the sums, for reporting: one number a term, a side term averaged over its layers."""
    out = {"loss": stats["loss"]}
    layers: dict[str, list[Array]] = {}
    for name in sorted(name.removesuffix("/total") for name in stats if name.endswith("/total")):
        total, weight = stats[f"{name}/total"], stats[f"{name}/weight"]
        over = jnp.where(weight == 0, 1, weight).reshape(weight.shape + (1,) * (total.ndim - weight.ndim))
        ratio = total / over
        if name.startswith("side/"):
            ratio = (ratio * stats[f"{name}/fixed"] / over).sum(-1) if f"{name}/fixed" in stats else ratio
            _, call, *_, kind = name.split("/")
            layers.setdefault(f"side/{call}/{kind}", []).append(ratio.reshape(-1))
        elif name.startswith("source/"):
            out |= {f"{name}/{i}": ratio[i] for i in range(ratio.shape[0])}
        else:
            out[name] = ratio
    return out | {name: jnp.concatenate(parts).mean() for name, parts in layers.items()}
