"""The step: scanned equals unscanned, one compile a stage, bad steps leave no trace, and what does not fit is refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from awkward import CASES, EXPERTS, TRUNK, plain_batch
from running import devices, metrics, record, tiny

from models import Attention, Experts
from models.stack import layer_names
from objectives import CausalLM, InfoNCE
from partitioning import UserError, data
from training.adafactor import Adafactor
from training.conda import Conda
from training.fira import Fira
from training.galore import GaLore
from training.guard import Guard
from training.lion import Lion
from training.muon import Muon
from training.optimizers import AdamW, Groups, Lamb, Optimizer, Sgd
from training.run import Stage
from training.state import by_group, by_index

RULES = {
    "AdamW": AdamW(learning_rate=0.02, weight_decay=0.1),
    "Lamb": Lamb(learning_rate=0.02, weight_decay=0.1),
    "Sgd": Sgd(learning_rate=0.1, momentum=0.9),
    "Muon": Muon(learning_rate=0.02),
    "Adafactor": Adafactor(learning_rate=0.02, smallest=4),
    "Lion": Lion(learning_rate=0.005),
    "Conda": Conda(learning_rate=0.02, every=2),
    "GaLore": GaLore(learning_rate=0.02, rank=2, every=2),
    "Fira": Fira(learning_rate=0.02, rank=2, every=2),
    "Groups": Groups(
        groups={
            ".*mixer.*": Muon(learning_rate=0.02),
            ".*(inner|outer|gate).*": Lamb(learning_rate=0.02, weight_decay=0.1),
            ".*": AdamW(learning_rate=0.02),
        }
    ),
}


def below(kind):
    """All classes under one."""
    return {found for child in kind.__subclasses__() for found in ({child} | below(child))}


def test_every_optimizer_is_here():
    """A new one is added to the test below."""
    ours = {kind.__name__ for kind in below(Optimizer) if kind.__module__.startswith("training.")}
    assert set(RULES) == ours - {"Descent", "MatrixDescent"}


@pytest.fixture(scope="module")
def both():
    """The experts' model scanned and not: its plan, its names by index, and its gradients, compiled once."""
    found = []
    with jax.enable_x64(True), devices(1):
        for scan in (True, False):
            run = tiny("experts", model=partial(EXPERTS, scan=scan, dtype="float64"), rules=data(), guard=None)
            plan = run.plan()

            def gradients(params, batch, step, plan=plan):
                state = replace(
                    plan.state, step=step, seed=jnp.uint32(plan.run.seed), params=params, frozen={}, buffers={}
                )
                return plan.stages[0].step.gradients(state, batch)[0]

            found.append((plan, layer_names(plan.trees.shapes), jax.jit(gradients)))
    (scanned, *_), (plain, *_) = found
    assert any("scanned" in name for name in scanned.state.params)
    assert not any("scanned" in name for name in plain.state.params)
    return found


# The rules themselves, all of them, on leaves without a model: tests/training/test_optimizers.py.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("AdamW", "Adafactor") else pytest.mark.long) for n in RULES]
)
def test_scanned_equals_unscanned_after_three_steps(name, both):
    """Parameters and optimizer state of a model with experts, by index, in float64."""
    ends = []
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        # By index one set of values, grouped as each plan wants it.
        plan, names, _ = both[0]
        flat = by_index(plan.state.params, names)
        start = {n: 0.2 * draw.standard_normal(leaf.shape) + n.endswith("scale") for n, leaf in sorted(flat.items())}
        for plan, names, gradients in both:
            tx = RULES[name]({leaf: plan.trees.axes[leaf] for leaf in plan.state.params})

            @jax.jit
            def update(gradient, optimizer, params, tx=tx):
                updates, optimizer = tx.update(gradient, optimizer, params)
                return optax.apply_updates(params, updates), optimizer

            params = by_group({k: jnp.asarray(v) for k, v in start.items()}, plan.state.params, names)
            optimizer = jax.jit(tx.init)(params)
            for step in range(3):
                params, optimizer = update(gradients(params, plain_batch(step, 8), step), optimizer, params)
            ends.append(jax.device_get(by_index({"params": params, "optimizer": optimizer}, names)))
    one, other = ends
    assert max(np.abs(one["params"][n] - start[n]).max() for n in start) > 1e-3
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9, err_msg=jax.tree_util.keystr(path))


class Compiled(logging.Handler):
    """The names of what jax compiles."""

    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        if record.msg.startswith("Compiling"):
            self.names.append(str(record.args[0]))


@pytest.fixture
def compiled():
    """What is compiled while a test runs."""
    handler, logger = Compiled(), logging.getLogger("jax._src.interpreters.pxla")
    logger.addHandler(handler)
    with jax.log_compiles(True):
        yield handler.names
    logger.removeHandler(handler)


def test_one_compile_a_stage_and_its_memory_before_step_0(compiled, tmp_path, capsys):
    """Two stages are two programs, made before the first step; the steps compile nothing more."""
    small = partial(TRUNK, layers=1)
    stages = [Stage(steps=4), Stage(steps=4, batch_size=16)]
    run = tiny("clm", model=small, steps=None, stages=stages, checkpoint_every=100)
    with devices(2):
        run.train(tmp_path / "run")
    assert compiled.count("jit(train_step)") == 2
    said = capsys.readouterr().out
    assert said.count("MiB temporaries") == 2
    assert said.index("MiB temporaries") < said.index("step 1/8")
    with devices(2):
        plan = run.plan()
        program = plan.compile(plan.stages[0])
        state = plan.init()
        del compiled[:]
        for i in range(3):
            state, _ = program(state, plan.put(plan.stages[0], plain_batch(i, 8)))
    # A numpy batch, a restored or an initial state: placing them is all that a step needs.
    assert not compiled


def bad_steps(*steps):
    """CausalLM whose loss is NaN at these steps."""

    class Poisoned(CausalLM):
        def __call__(self, models, batch, *, step, key):
            loss = super().__call__(models, batch, step=step, key=key)
            bad = jnp.isin(step, jnp.asarray(steps))
            term = loss.terms["clm"]
            total = jnp.where(bad, jnp.nan, 1.0) * term.total
            return type(loss)({**loss.terms, "clm": type(term)(total, term.weight)}, loss.rows)

    return Poisoned()


def test_the_guard_skips_a_bad_step_and_ends_a_run_of_them(tmp_path):
    """One NaN leaves everything but the step count as it was; several in a row end the run with one line."""
    experts = partial(Experts, experts=2, top_k=1, hidden=8)
    small = {"model": partial(TRUNK, layers=1, feed_forward=experts), "rules": data(), "checkpoint_every": 1}
    with devices(1):
        tiny("clm", objective=bad_steps(2), guard=Guard(patience=2), **small).train(tmp_path / "run")
        before, after = (record(tmp_path / "run", step)["leaves"] for step in (2, 3))
        moved = {name for name in before if before[name] != after[name]}
        assert moved == {"step", "guard/run", "guard/skipped"}
        assert record(tmp_path / "run", 4)["leaves"]["params/trunk/table"] != after["params/trunk/table"]
        seen = metrics(tmp_path / "run")
        assert [seen[step]["skipped"] for step in (1, 2, 3, 4)] == [0, 0, 1, 1]
        assert seen[3]["loss"] == "nan"
        # No token counts, whatever the states were.
        loads = [seen[step]["experts/trunk/layers/0/load"] for step in (2, 3, 4)]
        assert [load == ["nan", "nan"] for load in loads] == [False, True, False]
        with pytest.raises(UserError, match="the last 2 steps were skipped"):
            tiny("clm", objective=bad_steps(1, 2, 3), guard=Guard(patience=2), **small).train(tmp_path / "ends")


def test_clipping_bounds_the_gradient(tmp_path):
    """Steps of gradient descent are as long as the limit, or as the gradient where that is shorter."""
    small = {"model": partial(TRUNK, layers=1), "rules": data(), "optimizer": Sgd(learning_rate=1.0), "steps": 2}
    with devices(1):
        for limit in (0.01, 1e9, None):
            tiny("clm", clip=limit, **small).train(tmp_path / str(limit))
    for limit in (0.01, 1e9, None):
        row = metrics(tmp_path / str(limit))[1]
        length = np.sqrt(sum(v**2 for k, v in row.items() if k.startswith("norms/updates/")))
        assert length == pytest.approx(min(limit or 1e9, row["gradient_norm"]), rel=1e-5)
        assert row["gradient_norm"] > 0.02


def refused(words, name="clm", **changes):
    """One line, from the plan alone."""
    with pytest.raises(UserError, match=words) as error:
        tiny(name, **changes).plan()
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_refused_before_anything_is_compiled():
    """A missing field, rows that do not divide, what cannot be accumulated, optimizers that cannot follow each other."""
    refused(r"InfoNCE needs the batch field 'query/tokens' and the data has", objective=InfoNCE())
    refused(r"4 rows \(batch_size\) do not divide over 8 devices: use a multiple of 8", batch_size=4)
    refused(r"4 rows \(batch_size / accumulate\) do not divide over 8 devices", accumulate=2)
    refused("batch_size = 8 does not divide into accumulate = 3", accumulate=3)
    refused("InfoNCE compares the rows of a batch", "info_nce", accumulate=2, batch_size=16)
    refused("every tree is frozen", freeze=[".*"])
    refused("freeze of tree 'trunk': 'nothing' matches no parameter; nearest: ", freeze=["nothing"])
    stages = [Stage(steps=1), Stage(steps=1, optimizer=Sgd(learning_rate=0.1))]
    refused("states of different structure", steps=None, stages=stages)
    refused("either steps or stages, and has neither", steps=None)
    refused("either steps or stages, and has both", stages=stages)
    refused("heads = 3 does not divide the width 16", model=partial(TRUNK, mixer=partial(Attention, heads=3)))
    refused(
        "two objectives of this run want a tree named",
        "electra",
        stages=[Stage(steps=1), Stage(steps=1, objective=CASES["electra"].objective.__class__(generator=TRUNK))],
        steps=None,
    )
