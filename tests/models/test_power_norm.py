"""PowerNorm beside its equations in numpy, its limit, and what never moves its statistics."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import CASES, TRUNK, pair_batch, plain_batch
from flax import nnx
from running import Toy, devices, tiny

from models import PowerNorm
from models.norms import unit_mean_square
from models.variables import Statistic, flatten
from objectives import GRPO, InfoNCE, MomentumQueue
from partitioning import UserError, data
from training.optimizers import Sgd

D, EPS = 4, 1e-5
EXACT = 1e-14
DRAW = np.random.default_rng(0)
PRESENT = np.array([[True, True, True, False], [True, False, False, False], [True, True, True, True]])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def step(norm, x, g, present=PRESENT):
    """A training step of one norm: its result, the gradients by x, scale and bias, and its new statistics."""
    graph, params, rest = nnx.split(norm, nnx.Param, ...)

    def total(x, params, rest):
        made = nnx.merge(graph, params, rest)
        made.train()
        y = made(x, jnp.asarray(present))
        return (y * g).sum(), y

    gradients, y = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(jnp.asarray(x), params, rest)
    norm.observe({"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(gradients[2])})
    by = {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(gradients[1])}
    return y, gradients[0], by


def scaled(x):
    """Over the root mean square of its features, in numpy."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)


def test_six_steps_in_numpy():
    """Three with the batch's own mean square and three with the running one; padding has gradients and does not count."""
    norm = PowerNorm(D, warm_up=3)
    scale, bias = DRAW.standard_normal((2, D))
    norm.scale.set_value(jnp.asarray(scale))
    norm.bias.set_value(jnp.asarray(bias))
    phi, nu, here = np.ones(D), np.zeros(D), PRESENT[..., None]
    back_through_own_scale = jax.jit(lambda x, g: jax.vjp(lambda x: unit_mean_square(x, EPS), x)[1](g)[0])
    for t in range(6):
        x, g = 2 + 3 * DRAW.standard_normal((2, 3, 4, D))
        u = scaled(x)
        square = (u * u * here).sum((0, 1)) / here.sum()
        divisor = np.sqrt((square if t < 3 else phi) + EPS)
        z = u / divisor
        bounded = g * scale - nu * z * here
        y, dx, by = step(norm, x, g)
        np.testing.assert_allclose(y, z * scale + bias, rtol=1e-12)
        np.testing.assert_allclose(dx, back_through_own_scale(x, bounded / divisor), rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(by["scale"], (g * z).sum((0, 1)), rtol=1e-12)
        np.testing.assert_allclose(by["bias"], g.sum((0, 1)), rtol=1e-12)
        a = min(0.9, t / (t + 1))
        phi = a * phi + (1 - a) * square
        nu = nu + 0.1 * (bounded * z * here).sum((0, 1)) / here.sum()
        np.testing.assert_allclose(norm.mean_square.get_value(), phi, rtol=1e-12)
        np.testing.assert_allclose(norm.product.get_value(), nu, rtol=1e-12)
    assert norm.updates.get_value() == 6


@pytest.mark.parametrize("warm_up", [0, 10_000])
def test_the_same_batch_again_and_again_gives_the_exact_gradient(warm_up):
    """In the limit of equal batches the bounded gradient is that of division by the batch's own root mean square."""
    norm, everyone = PowerNorm(D, eps=EXACT, decay=0.5, warm_up=warm_up), np.ones((3, 4), bool)
    x, g = DRAW.standard_normal((2, 3, 4, D))

    def own(x):
        u = unit_mean_square(x, EXACT)
        return (u / jnp.sqrt((u * u).mean((0, 1)) + EXACT) * g).sum()

    exact = jax.grad(own)(jnp.asarray(x))
    _, first, _ = step(norm, x, g, everyone)
    for _ in range(30):
        _, dx, _ = step(norm, x, g, everyone)
    np.testing.assert_allclose(dx, exact, rtol=1e-6, atol=1e-8)
    assert np.abs(first - exact).max() > 1e-2


def test_in_use_each_token_stands_alone():
    """Outside training a token's state is x / sqrt(phi), whatever the others are, and nothing is observed."""
    norm = PowerNorm(D)
    step(norm, 5 * DRAW.standard_normal((3, 4, D)), np.ones((3, 4, D)))
    x = DRAW.standard_normal((3, 4, D))
    expected = scaled(x) / np.sqrt(np.asarray(norm.mean_square.get_value()) + EPS)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-12)
    np.testing.assert_allclose(norm(jnp.asarray(x[1:2, 1:2])), expected[1:2, 1:2], rtol=1e-12)
    graph, state = nnx.split(norm)
    sums = jax.grad(lambda state: nnx.merge(graph, state)(jnp.asarray(x)).sum())(state)
    sums = flatten(nnx.merge(graph, sums), Statistic)
    assert all(not s.any() for s in sums.values())
    # As in a step that did not call it.
    before = flatten(norm, Statistic)
    norm.observe(sums)
    assert all((value == before[name]).all() for name, value in flatten(norm, Statistic).items())


def moved(run, batches):
    """The state after steps on these batches, on the devices there are."""
    plan = run.plan()
    state, program = plan.init(), plan.compile(plan.stages[0])
    for batch in batches:
        state, _ = program(state, plan.put(plan.stages[0], batch))
    return {name: np.asarray(value) for name, value in (state.params | state.buffers).items()}


def test_padding_never_counts_and_scanned_is_unscanned():
    """Other tokens in the padding change neither parameters nor statistics; nor does how the layers are stacked."""
    warm = partial(TRUNK, layers=2, norm=partial(PowerNorm, warm_up=1), embedding_norm=True, dtype="float64")
    batches = [plain_batch(i) for i in range(3)]
    other = [batch | {"tokens": np.where(batch["segments"] > 0, batch["tokens"], 9)} for batch in batches]
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(batches, other, strict=True))
    with devices(1):
        small = {"rules": data(), "batch_size": 16, "optimizer": Sgd(learning_rate=0.5)}
        run = tiny("clm", model=warm, **small)
        one, padded = moved(run, batches), moved(run, other)
        flat = moved(tiny("clm", model=partial(warm, scan=False), **small), batches)
    with devices(8):
        many = moved(run, batches)
    statistics = [name for name in one if name.endswith("mean_square")]
    assert len(statistics) == 4
    for name, value in one.items():
        if "/scanned/0/" in name:
            by_layer = [flat[name.replace("scanned/0", f"layers/{i}")] for i in range(2)]
            np.testing.assert_allclose(value, np.stack(by_layer), rtol=1e-6, atol=1e-8, err_msg=name)
        np.testing.assert_allclose(value, padded[name], rtol=1e-9, atol=1e-11, err_msg=name)
        np.testing.assert_allclose(value, many[name], rtol=1e-6, atol=1e-8, err_msg=name)
        if name in statistics:
            assert np.abs(value - 1).max() > 1e-3, name
        if name.endswith("updates"):
            assert (value == 3).all()


def test_a_teacher_follows_the_statistics():
    """A teacher's running means move toward the trunk's as its parameters do."""
    model = partial(TRUNK, norm=partial(PowerNorm, warm_up=0), dtype="float64")
    run = tiny("momentum_queue", model=model, objective=MomentumQueue(size=32, momentum=0.75), rules=data())
    with devices(1):
        state = moved(run, [pair_batch(0, 8)])
        trees, kinds = run.plan().trees, ("params", "frozen", "buffers")
    values = ({name: trees.shapes[name] for name in trees.of_kind(kind)} for kind in kinds)
    models = trees.models(*values, training=True)
    assert not models.module("trunk").final_norm.use_running_average
    assert models.module("teacher").final_norm.use_running_average
    ends = "stack/scanned/0/mixer_norm/mean_square"
    np.testing.assert_allclose(state[f"teacher/{ends}"], 0.75 + 0.25 * state[f"trunk/{ends}"], rtol=1e-6)
    assert np.abs(state[f"trunk/{ends}"] - 1).max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accumulate": 2, "batch_size": 16}, r"accumulate = 2 .*PowerNorm.warm_up = 0, or accumulate = 1"),
        ({"objective": InfoNCE(chunked=4), "data": Toy(pair_batch)}, "InfoNCE, which runs it twice .*warm_up = 0"),
        ({"objective": CASES["grpo"].objective, "data": Toy(CASES["grpo"].batch)}, "GRPO, which runs it twice"),
    ],
)
def test_what_needs_independent_rows_is_refused_in_the_warm_up(changes, words):
    """One line that says what to set; without a warm-up the same is planned."""
    assert GRPO.runs_twice
    for warm_up in (0, 5):
        run = tiny("clm", model=partial(TRUNK, norm=partial(PowerNorm, warm_up=warm_up)), **changes)
        if warm_up:
            with pytest.raises(UserError, match=words):
                run.plan()
        else:
            run.plan()


@pytest.mark.parametrize(("name", "value"), [("decay", 1.0), ("warm_up", -1)])
def test_values_out_of_range(name, value):
    """They are named."""
    with pytest.raises(UserError, match=rf"PowerNorm.{name} = {value}"):
        PowerNorm(D, **{name: value})
