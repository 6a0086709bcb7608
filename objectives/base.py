"""What an objective is: the contract between a method and the trainer.

An objective is a frozen dataclass. The trainer calls `companions` once, and in every step `prepare` (the whole batch, no
gradient), the objective itself (a micro-batch, differentiated) and `after_step` (buffers). It knows no objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.side import Sides, Tallies
from models.trunk import Output, Trunk
from objectives.draws import Draws
from partitioning import UserError

Batch = dict[str, Any]
Schedule = Callable[[Any], Any]
# Batch fields under this name belong to the whole batch: micro-batches share them instead of taking every k-th row.
SHARED = "shared/"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Term:
    """coefficient * sum(total) / sum(weight), the sums over rows, micro-batches and devices.

    Args:
      total: a sum over this micro-batch's rows.
      weight: what it is divided by; never depends on parameters.
      coefficient: 0 for a metric; may be traced (a schedule of the step).
      rows: (total, weight) of each row, `[b]` each, for statistics by source; carries no gradient.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    coefficient: Any = 1.0
    rows: tuple[Float[Array, b], Float[Array, b]] | None = None

    def scaled(self, coefficient: Any) -> Term:
        """The same term with its coefficient multiplied."""
        return Term(self.total, self.weight, self.coefficient * coefficient, self.rows)


def metric(total: Any, weight: Any) -> Term:
    """A term with coefficient 0: reported, never optimised."""
    return Term(jax.lax.stop_gradient(jnp.asarray(total)), jnp.asarray(weight), 0.0)


@dataclass(frozen=True)
class Loss:
    """Named terms of one micro-batch.

    Args:
      terms: by name.
      rows: values by row, `[b, ...]`, that `after_step` gets for the whole batch in the batch's order.
    """

    terms: Mapping[str, Term]
    rows: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Companion:
    """A tree beside the trunk.

    Args:
      module: the module, built inside `companions`.
      train: whether its parameters have gradients. A tree that is not trained is frozen: no optimizer state, saved once.
        A teacher that moves is a module whose parameters are buffers (`models.variables.as_buffers`).
      freeze: regular expressions over parameter paths; parameters that match are frozen in a trained tree.
      init_from: a run's folder whose trunk gives the values, or a model's in the Hugging Face layout; None for the
        module's own.
      reinitialise: regular expressions over parameter paths, layers by index; parameters that match are not taken from
        `init_from`.
    """

    module: nnx.Module
    train: bool = True
    freeze: tuple[str, ...] = ()
    init_from: str | None = None
    reinitialise: tuple[str, ...] = ()


class Models:
    """The trees of a run by name (`models.trunk`, `models.generator`), and the side terms and tallies that their calls returned.

    The step reads `sides` and `tallies` after an objective has run, so no objective knows of experts.
    """

    trunk: Any

    def __init__(self, modules: Mapping[str, nnx.Module]):
        self._modules = dict(modules)
        self.sides: dict[str, Sides] = {}
        self.tallies: Tallies = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._modules:
            raise AttributeError(f"no tree {name!r}: this run has {', '.join(self._modules)}")
        return _Recorded(self, name, self._modules[name])

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def module(self, name: str) -> nnx.Module:
        """The bare module of a tree."""
        return self._modules[name]


class _Recorded:
    """A tree whose calls leave their side terms with the models."""

    def __init__(self, models: Models, name: str, module: nnx.Module):
        self._models, self._name, self._module = models, name, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._module(*args, **kwargs)
        if isinstance(out, Output) and (out.aux or out.tallies):
            calls = sum(name == self._name or name.startswith(f"{self._name}#") for name in self._models.sides)
            call = self._name if not calls else f"{self._name}#{calls}"
            self._models.sides[call] = out.aux
            self._models.tallies |= {f"{call}/{name}": tally for name, tally in out.tallies.items()}
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of all objectives: a frozen dataclass of what is selected, how it is corrupted and what is penalised.

    Class attributes:
      couples_rows: whether a row's loss depends on the other rows of the same call. Such an objective refuses
        accumulation; one that couples rows in `prepare` does not set it.
      continues: how a trunk that learns this reads the text that it goes on with: 'causal', or 'prefix', where the text's
        tokens all see each other; None where it learns no continuation.
    """

    @property
    def continues(self) -> Literal["causal", "prefix"] | None:
        """What the first of the objectives inside says, that says something."""
        return next((child.continues for child in self.children() if child.continues), None)

    @property
    def couples_rows(self) -> bool:
        """Whether `__call__` needs all rows of the batch at once."""
        return False

    @property
    def runs_twice(self) -> bool:
        """Whether `prepare` runs a model that `__call__` runs again, and relies on their agreeing."""
        return any(child.runs_twice for child in self.children())

    def fields(self) -> tuple[str, ...]:
        """Batch fields that the objective reads, checked before step 0."""
        return ("tokens", "segments", "positions")

    def children(self) -> Iterable[Objective]:
        """Objectives inside this one."""
        return ()

    def check(self, *, steps: int, batch: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
        """Checks the objective against a stage before anything is compiled.

        Args:
          steps: the run's steps up to the end of the stage; schedules count them from 0.
          batch: (shape, dtype) by field.

        Raises:
          UserError: a field is missing, or a schedule leaves its range.
        """
        missing = [name for name in self.fields() if name not in batch]
        if missing:
            raise UserError(
                f"{type(self).__name__} needs the batch field {missing[0]!r} and the data has {', '.join(sorted(batch))}: "
                "choose a task that gives it"
            )
        for child in self.children():
            child.check(steps=steps, batch=batch)

    def companions(self, trunk: Trunk, rngs: nnx.Rngs) -> dict[str, Companion]:
        """Trees beside the trunk, by name. Called once, inside the jitted initialisation."""
        return {}

    def prepare(self, models: Models, batch: Batch, *, step: Int[Array, ""], key: Draws) -> Batch:
        """Adds fields to the whole global batch, without a gradient: samples, scores, rewards, global negatives."""
        return batch

    def __call__(self, models: Models, batch: Batch, *, step: Int[Array, ""], key: Draws) -> Loss:
        """The terms of a micro-batch."""
        raise TypeError(f"{type(self).__name__} is an objective without a loss: define `__call__`")

    def after_step(self, models: Models, rows: Mapping[str, Array], stats: Mapping[str, Array], *, step: Any) -> None:
        """Changes buffers, once an optimizer step: the only place where they change.

        Args:
          models: with the new parameters.
          rows: what the calls returned by row, whole batch.
          stats: sums over the step by term, `<term>/total` and `<term>/weight`, and side terms' `fixed` sums.
          step: the step that was taken.
        """


def at(value: Any, step: Any) -> Any:
    """A number, or a schedule's number at a step."""
    return value(step) if callable(value) else value
