"""What every objective promises: devices, micro-batches and rows do not change the loss or its gradient."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import CASES, EXPERTS, ROWS, Case, build, in_float64

from models import Attention, Block, Experts, RMSNorm, SigmoidRouter
from objectives import CausalLM
from objectives.base import Batch
from objectives.draws import draws
from partitioning import UserError, data, fsdp, fsdp_expert, fsdp_sequence, fsdp_tensor
from training.optimizers import Sgd
from training.step import Step
from training.trees import Trees

# Two layers of experts, one with a bias that moves.
ROUTED = Case(
    CausalLM(),
    model=partial(
        EXPERTS,
        layers=2,
        pattern=[
            partial(
                Block,
                mixer=partial(Attention, heads=2),
                feed_forward=partial(Experts, experts=8, hidden=8, router=router),
                norm=RMSNorm,
            )
            for router in (None, partial(SigmoidRouter, groups=2, rate=0.1))
        ],
    ),
)
ACCUMULATING = [name for name, case in CASES.items() if case.accumulates]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def gradients(name: str, rules, devices: int, accumulate: int = 1):
    """Loss, reduced sums and gradients of a case on a mesh, in float64."""
    case = ROUTED if name == "routed" else CASES[name]
    model = in_float64(case.model)
    objective = _float64_parts(case.objective)
    case = replace(case, model=model, objective=objective)
    placement = rules.place(jax.devices()[:devices])
    with placement.scope(), warnings.catch_warnings():
        trees = Trees.plan(build(case))
        step = Step(
            trees=trees, objective=objective, optimizer=Sgd(learning_rate=0.1), stage=0, batch_size=ROWS,
            accumulate=accumulate,
        )  # fmt: skip
        values = initial(trees)
        shardings = trees.shardings(placement)
        values = {k: {n: jax.device_put(v, shardings[n]) for n, v in part.items()} for k, part in values.items()}
        batch = {k: jax.device_put(v, placement.rows(v.shape, k)) for k, v in case.batch().items()}

        def run(values, batch: Batch):
            state = _State(step=jnp.asarray(2), seed=jnp.uint32(3), **values)
            key = draws(jax.random.key(3), state.step, batch["row"], ROWS)
            models = trees.models(values["params"], values["frozen"], values["buffers"])
            prepared = jax.lax.stop_gradient(objective.prepare(models, batch, step=state.step, key=key))
            grads, observed, stats, rows, _ = step.gradients(state, prepared)
            models = trees.models(values["params"], values["frozen"], values["buffers"])
            trees.observe(models, observed)
            objective.after_step(models, rows, stats, step=state.step)
            return grads, stats, trees.buffers(models)

        return jax.device_get(jax.jit(run)(values, batch))


def initial(trees):
    """Values of all leaves, large enough that nothing vanishes; a reference is not the policy, or it had no gradient."""
    draw = np.random.default_rng(0)
    values: dict = {"params": {}, "frozen": {}, "buffers": {}}
    for name, leaf in trees.shapes.items():
        if np.issubdtype(leaf.dtype, np.floating):
            drawn = 0.1 * draw.standard_normal(leaf.shape) + name.endswith(("scale", "mean_square"))
        else:
            drawn = np.zeros(leaf.shape, leaf.dtype)
        values[trees.kinds[name]][name] = drawn
    return values


class _State:
    def __init__(self, step, seed, params, frozen, buffers):
        self.step, self.seed, self.params, self.frozen, self.buffers = step, seed, params, frozen, buffers


def _float64_parts(objective):
    """Companions' trunks compute in float64 too."""
    changes = {}
    for field in ("generator", "decoder"):
        if make := getattr(objective, field, None):
            changes[field] = partial(make, dtype="float64")
    return replace(objective, **changes) if changes else objective


def assert_same(one, other, tolerance=1e-10):
    """Equal relative to the largest entry of each leaf."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        scale = max(np.abs(a).max(), 1e-3)
        worst = np.abs(a - b).max() / scale
        assert worst < tolerance, f"{jax.tree_util.keystr(path)}: {worst:.2e}"


_ONE: dict = {}


def on_one(name):
    """The case on one device, computed once."""
    if name not in _ONE:
        _ONE[name] = gradients(name, data(), 1)
    return _ONE[name]


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_and_micro_batches_equal_one(name):
    """Loss, gradients and buffers depend neither on the mesh nor on micro-batches of unequal token counts, where the objective
    takes these; on other meshes, and on each alone, in the long run.
    """
    one = on_one(name)
    assert np.isfinite(one[1]["loss"])
    assert max(np.abs(g).max() for g in one[0].values()) > 1e-3
    assert_same(one, gradients(name, fsdp_tensor(2), 8, accumulate=2 if name in ACCUMULATING else 1))


EVERY_WAY = fsdp_sequence(2, tensor=2, slices=2)
# GRPO's rows are a prompt and what was drawn behind it, 17 tokens: they are refused.
LONGER = [name for name in CASES if name != "grpo"]


@pytest.mark.parametrize("name", ["mlm", "clm"])
def test_rows_cut_along_their_length_equal_one(name):
    """An encoder and a decoder; heads are cut, and there are two slices. An encoder-decoder: models/test_cut_rows.py."""
    assert_same(on_one(name), gradients(name, EVERY_WAY, 8))


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param(fsdp_expert(2, tensor=2, sequence=2), id="tensor and sequence"),
        pytest.param(fsdp_expert(4), id="fully sharded", marks=pytest.mark.long),
        pytest.param(fsdp_expert(2, tensor=2), id="fully sharded, tensor", marks=pytest.mark.long),
        pytest.param(fsdp_expert(2, sequence=2), id="fully sharded, sequence", marks=pytest.mark.long),
    ],
)
def test_experts_shared_out_equal_one(rules):
    """Side terms with the balance over the whole batch, and the bias that moves by what all devices chose."""
    found = gradients("routed", rules, 8, accumulate=2)
    assert any(name.endswith("router/bias") for name in found[2])
    assert_same(on_one("routed"), found)


@pytest.mark.long
@pytest.mark.parametrize(
    "rules",
    [data(), fsdp(), EVERY_WAY, fsdp_sequence(2), fsdp(slices=2)],
    ids=["copied", "fully sharded", "every way", "length", "slices"],
)
@pytest.mark.parametrize("name", LONGER)
def test_every_way_to_cut_equals_one(name, rules):
    """All objectives."""
    assert_same(on_one(name), gradients(name, rules, 8))


def test_a_length_that_does_not_divide_is_refused():
    """Also where an objective made the rows."""
    with pytest.raises(UserError, match="axis 'length' of size 17 does not divide over sequence = 2 devices"):
        gradients("grpo", fsdp_sequence(2), 8)


@pytest.mark.long
@pytest.mark.parametrize("name", ACCUMULATING)
def test_micro_batches_equal_the_batch(name):
    """On fewer devices, more of them."""
    assert_same(on_one(name), gradients(name, fsdp(), 2, accumulate=4))


def test_what_cannot_be_accumulated_says_so():
    """The plan refuses it (see training/test_plan)."""
    coupled = {name for name, case in CASES.items() if case.objective.couples_rows}
    assert coupled == set(CASES) - set(ACCUMULATING)
