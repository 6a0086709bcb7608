"""What is known of a run before step 0: trees, shapes, shardings and one step a stage."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from data.control import ControlEntry
from models.variables import Flat, replace_values
from models.vocabulary import Vocabulary
from objectives.base import Companion
from partitioning import Placement, UserError
from training.init_from import Initial, initial_values
from training.optimizers import Optimizer
from training.programs import for_one_run
from training.run import Part, Run
from training.state import State, abstract_state, state_shardings
from training.step import Step
from training.trees import Trees

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PlannedStage:
    """A stage with its place in the run.

    Args:
      stage: with every value filled in.
      first: the run's step at which it starts.
      rows: rows consumed by earlier stages.
      reader: of its data.
      step: its step function.
      batch: abstract batch, with shardings.
      control: what the data's own schedules change, as entries of the control log.
    """

    stage: Part
    first: int
    rows: int
    reader: Any
    step: Step
    batch: dict[str, jax.ShapeDtypeStruct]
    control: tuple[ControlEntry, ...] = ()

    @property
    def last(self) -> int:
        """The step after this stage's last."""
        return self.first + self.stage.steps


@dataclass(frozen=True, eq=False)
class Plan:
    """A run's plan; nothing has been allocated.

    Args:
      run: what was asked for.
      placement: rules on a mesh.
      trees: the modules.
      stages: in order.
      state: the abstract state.
      shardings: of the state.
      rates: of each stage's optimizer, as tables over all steps.
      kept: what was compiled or readied already, by name; see `once`.
    """

    run: Run
    placement: Placement
    trees: Trees
    stages: tuple[PlannedStage, ...]
    state: State
    shardings: State
    rates: tuple[dict[str, np.ndarray], ...]
    kept: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run, devices: Sequence[Any] | None = None) -> Plan:
        """Plans a run.

        Raises:
          UserError: whatever of the config, the data or the mesh does not fit.
        """
        placement = run.placed().place(devices)
        parts = run.parts()
        opened = {id(part.data): part.data for part in parts}
        opened = {key: source.open() for key, source in opened.items()}
        readers = [opened[id(part.data)] for part in parts]
        vocabulary = vocabulary_of(readers[0])
        for reader in readers[1:]:
            if vocabulary_of(reader) != vocabulary:
                raise UserError("the stages' data have different vocabularies: prepare all of them with one tokenizer")
        with placement.scope():
            trees = Trees.plan(lambda key, given: build(run, vocabulary, key, given))
        if not trees.of_kind("params"):
            raise UserError("no parameter is trained: every tree is frozen")
        axes = {name: trees.axes[name] for name in trees.of_kind("params")}
        rates = rate_tables([part.optimizer for part in parts], sum(part.steps for part in parts))
        first, rows = 0, 0
        stages: list[PlannedStage] = []
        states: list[State] = []
        for part, reader in zip(parts, readers, strict=True):
            _check(part, reader, placement, first + part.steps, trees.coupled)
            tx = part.optimizer(axes)
            step = Step(
                trees=trees,
                objective=part.objective,
                optimizer=part.optimizer,
                stage=len(stages),
                batch_size=part.batch_size,
                accumulate=part.accumulate,
                clip=run.clip,
                guard=run.guard,
                average=run.average,
                sources=len(reader.names),
            )
            batch = {
                name: jax.ShapeDtypeStruct(shape, dtype, sharding=placement.rows(shape, f"batch field {name!r}"))
                for name, (shape, dtype) in reader.spec(batch_size=part.batch_size, length=part.length).items()
            }
            stages.append(PlannedStage(part, first, rows, reader, step, batch))
            guard = run.guard.init() if run.guard else ()
            states.append(abstract_state(trees, tx, rates=rates, average=run.average is not None, guard=guard))
            first, rows = first + part.steps, rows + part.steps * part.batch_size
        for state in states[1:]:
            if not _alike(state, states[0]):
                raise UserError(
                    "the stages' optimizers have states of different structure: use one class, with other constants"
                )
        shardings = state_shardings(states[0], trees, placement)
        plan = cls(run, placement, trees, tuple(stages), states[0], shardings, rates)
        return replace(plan, stages=tuple(plan._scheduled(stage) for stage in stages))

    def _scheduled(self, stage: PlannedStage) -> PlannedStage:
        control = stage.reader.planned(self.steps, self.row)
        if control and self.run.controllers:
            raise UserError(
                "the mixture's weights are schedules and the run has controllers, which set weights too: keep one of them"
            )
        return replace(stage, control=control)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.stages[-1].last

    @property
    def tokenizer(self) -> Any:
        """The data's tokenizer."""
        return self.stages[0].reader.tokenizer

    def stage_of(self, step: int) -> PlannedStage:
        """The stage that takes a step."""
        return next(stage for stage in self.stages if step < stage.last)

    def row(self, step: int) -> int:
        """The run's first row of a step, whichever stage takes it; past the end as if the last stage went on."""
        stage = self.stage_of(min(step, self.steps - 1))
        return stage.rows + (step - stage.first) * stage.stage.batch_size

    def targets(self) -> State:
        """The abstract state with shardings: what a restore fills."""
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.tree.map(place, self.state, self.shardings)

    def initial(self) -> dict[str, Initial]:
        """What the trees with `init_from` begin with.

        Raises:
          UserError: see `training.init_from.initial_values`.
        """

        def seeded() -> Flat:
            with self.placement.scope():
                places = {kind: getattr(self.shardings, kind) for kind in ("params", "frozen", "buffers")}
                kinds = jax.jit(self.trees.init, out_shardings=places)(jax.random.key(self.run.seed))
            return {name: leaf for flat in kinds.values() for name, leaf in flat.items()}

        return {tree: initial_values(self.trees, self.placement, tree, seeded) for tree in self.trees.init_from}

    def with_seed(self, seed: int) -> Plan:
        """The same run from another seed: nothing that is compiled holds the seed, so both share it."""
        return replace(self, run=replace(self.run, seed=seed))

    def configured(self) -> dict[str, Any]:
        """The fields of the state that are the config's and not the checkpoint's."""
        return {"seed": np.uint32(self.run.seed), "rates": self.rates}

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, which is called once for this plan and all that differ from it in their seed."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def init(self, initial: Mapping[str, Initial] | None = None) -> State:
        """The initial state, made where it lives.

        Args:
          initial: from `initial`, which is called for None.

        Returns:
          Step 0 of the run: seeded values, with `init_from` trees overwritten by what they name.
        """
        run = self.run
        tx = self.stages[0].stage.optimizer({name: self.trees.axes[name] for name in self.trees.of_kind("params")})
        given = {tree: found.values for tree, found in (self.initial() if initial is None else initial).items()}

        def make(given: dict[str, Flat], config: dict[str, Any]) -> State:
            values = self.trees.init(jax.random.key(config["seed"]), given)
            return State(
                step=jax.numpy.zeros((), jax.numpy.int32),
                optimizer=tx.init(values["params"]),
                average=None if run.average is None else run.average.init(values["params"]),
                guard=run.guard.init() if run.guard else (),
                seed=config["seed"],
                rates=config["rates"],
                **values,
            )

        options = for_one_run(self.placement.mesh)
        with self.placement.scope():
            made = self.once("init", lambda: jax.jit(make, out_shardings=self.shardings, compiler_options=options))
            return made(given, self.configured())

    def exercise(self) -> None:
        """Traces every stage's loss.

        Raises:
          UserError: whatever a module or an objective refuses to be called with.
        """
        with self.placement.scope():
            for stage in self.stages:
                # A loss holds more than arrays.
                terms = lambda *given, step=stage.step: [term.total for term in step.forward(*given).terms.values()]
                jax.eval_shape(terms, self.state, stage.batch)

    def compile(self, stage: PlannedStage) -> Any:
        """Compiles a stage's step; the executable takes the state (donated) and a batch, and can never compile again."""
        with self.placement.scope():
            return self.lower(stage).compile()

    def lower(self, stage: PlannedStage) -> Any:
        """A stage's step as XLA is given it: the same for runs that differ in their seed or rates alone."""

        # The name that profiles and compile logs show.
        def train_step(state: State, batch: dict[str, jax.Array]) -> tuple[State, Any]:
            return stage.step(state, batch)

        with self.placement.scope():
            jitted = jax.jit(
                train_step,
                in_shardings=(self.shardings, {name: leaf.sharding for name, leaf in stage.batch.items()}),
                out_shardings=(self.shardings, self.placement.replicated),
                donate_argnums=0,
            )
            return jitted.lower(self.targets(), stage.batch)

    def put(self, stage: PlannedStage, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Places one host's share of a batch."""
        if jax.process_count() == 1:
            return jax.device_put(batch, {name: leaf.sharding for name, leaf in stage.batch.items()})
        return {
            name: jax.make_array_from_process_local_data(leaf.sharding, batch[name], leaf.shape)
            for name, leaf in stage.batch.items()
        }


def rate_tables(optimizers: Sequence[Optimizer], steps: int) -> tuple[dict[str, np.ndarray], ...]:
    """Each optimizer's rates at all steps of a run, by name; as long as the next power of two, which many runs share."""
    every = np.arange(max(1024, 1 << (steps - 1).bit_length()))
    # Not jitted: with other constants it would be compiled again.
    return tuple(jax.device_get(jax.vmap(optimizer.rates)(every)) for optimizer in optimizers)


def vocabulary_of(reader: Any) -> Vocabulary:
    """A trunk's vocabulary from a reader's sizes, specials and frequencies."""
    specials = {k: int(v) for k, v in vars(reader.specials).items()}
    return Vocabulary(size=reader.vocabulary, frequencies=reader.frequencies, **specials)


def build(run: Run, vocabulary: Vocabulary, key: jax.Array, given: Mapping[str, Flat]) -> dict[str, Companion]:
    """The trunk and every objective's companions, by tree name.

    Args:
      run: what says how.
      vocabulary: of the data.
      key: of the initial values.
      given: values by tree and path that replace initial ones. The trunk has its own before companions copy it.

    Raises:
      UserError: two objectives want different companions of one name.
    """
    trunk = run.model(vocabulary, rngs=nnx.Rngs(jax.random.fold_in(key, 0)))
    replace_values(trunk, given.get("trunk", {}))
    found = {
        "trunk": Companion(
            trunk, freeze=tuple(run.freeze), init_from=run.init_from, reinitialise=tuple(run.reinitialise)
        )
    }
    objectives = []
    for part in run.parts():
        if part.objective not in objectives:
            objectives.append(part.objective)
    for number, objective in enumerate(objectives, 1):
        for name, companion in objective.companions(trunk, nnx.Rngs(jax.random.fold_in(key, number))).items():
            if name in found:
                raise UserError(f"two objectives of this run want a tree named {name!r}: only one may bring it")
            replace_values(companion.module, given.get(name, {}))
            found[name] = companion
    return found


def _check(part: Part, reader: Any, placement: Placement, last: int, coupled: Sequence[str]) -> None:
    spec = reader.spec(batch_size=part.batch_size, length=part.length)
    # An objective's schedules count the run's steps, not the stage's.
    part.objective.check(steps=last, batch=spec)
    k = part.accumulate
    if k > 1 and part.objective.couples_rows:
        raise UserError(
            f"{type(part.objective).__name__} compares the rows of a batch with each other and cannot be accumulated over "
            f"{k} micro-batches: set accumulate = 1, or the objective's chunked form where it has one"
        )
    if coupled and (k > 1 or part.objective.runs_twice):
        what = f"accumulate = {k}" if k > 1 else f"{type(part.objective).__name__}, which runs it twice a step,"
        raise UserError(
            f"the model takes statistics of all rows that it is called with, and {what} would give it others: set "
            f"{' and '.join(coupled)}{', or accumulate = 1' if k > 1 else ''}"
        )
    if part.batch_size % k:
        raise UserError(f"batch_size = {part.batch_size} does not divide into accumulate = {k} micro-batches")
    count = lambda name: int(np.prod([placement.mesh.shape[a] for a in placement.rules.activations.get(name, ())]))
    if part.length % count("length"):
        raise UserError(
            f"length = {part.length} does not divide over the {count('length')} devices of the mesh axis 'sequence': use a "
            f"multiple of {count('length')}, or another mesh"
        )
    ways = count("batch")
    if (part.batch_size // k) % ways:
        raise UserError(
            f"{part.batch_size // k} rows ({'batch_size' if k == 1 else 'batch_size / accumulate'}) do not divide over "
            f"{ways} devices: use a multiple of {ways}, or another mesh"
        )


def _alike(one: Any, other: Any) -> bool:
    """Whether two trees have one structure and the same shapes."""
    shapes = lambda tree: [(jax.tree_util.keystr(k), x.shape) for k, x in jax.tree_util.tree_leaves_with_path(tree)]
    return shapes(one) == shapes(other)
