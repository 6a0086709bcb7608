"""The guard skips what is not finite or spikes, counts, and ends the run in time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partitioning.errors import UserError
from training.ema import Ema
from training.guard import Guard, chosen


def run(guard, steps):
    """Decisions and last state over (loss, gradient norm) pairs, each an array as in a jitted step."""
    call, state, taken = jax.jit(guard.__call__), guard.init(), []
    for loss, norm in steps:
        ok, state = call(state, jnp.float32(loss), jnp.float32(norm))
        taken.append(bool(ok))
    return taken, {name: value.item() for name, value in state.items()}


@pytest.mark.parametrize("bad", [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_what_is_not_finite_is_skipped_and_leaves_no_trace(bad):
    guard = Guard(spike=3.0, warmup=1)
    taken, state = run(guard, [(1.0, 1.0), bad, (1.0, 1.0)])
    assert taken == [True, False, True]
    assert state["skipped"] == 1
    assert state["run"] == 0
    assert state["sum"] == run(guard, [(1.0, 1.0), (1.0, 1.0)])[1]["sum"]


def test_spikes_are_called_against_the_mean_of_accepted_norms_after_warmup():
    guard = Guard(spike=3.0, warmup=3, decay=0.5)
    norms = [1.0, 50.0, 1.0, 20.0, 21.0, 1000.0, 1.0]
    taken, state = run(guard, [(1.0, norm) for norm in norms])
    accepted: list[float] = []
    expected: list[bool] = []
    for norm in norms:
        weights = 0.5 ** np.arange(len(accepted))[::-1]
        expected.append(len(accepted) < 3 or bool(norm <= 3 * np.average(accepted, weights=weights)))
        accepted += [norm] if expected[-1] else []
    assert taken == expected == [True, True, True, True, True, False, True]
    assert state["accepted"] == 6


def test_without_a_ratio_no_norm_is_too_large():
    assert run(Guard(), [(1.0, 1.0)] * 30 + [(1.0, 1e30)])[0][-1]


def test_a_run_of_skipped_steps_ends_the_run():
    guard = Guard(patience=3)
    _, state = run(guard, [(1.0, 1.0), (np.nan, 1.0), (np.nan, 1.0)])
    guard.check(state, step=3)
    _, state = run(guard, [(np.nan, 1.0), (1.0, 1.0)] + [(np.nan, 1.0)] * 3)
    assert state["skipped"] == 4
    with pytest.raises(UserError, match=r"step 5: the last 3 steps were skipped.*patience = 3"):
        guard.check(state, step=5)


@pytest.mark.parametrize("wrong", [{"spike": 0.5}, {"decay": 1.0}, {"patience": 0}, {"warmup": 0}])
def test_values_out_of_range(wrong):
    with pytest.raises(UserError, match=f"Guard.{next(iter(wrong))}"):
        Guard(**wrong)


def test_a_skipped_step_keeps_the_old_values_even_beside_nan():
    old, new = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([jnp.nan, 3.0])}
    np.testing.assert_array_equal(chosen(jnp.array(False), new, old)["a"], old["a"])
    np.testing.assert_array_equal(chosen(jnp.array(True), new, old)["a"], new["a"])


def test_ema_is_the_weighted_mean_of_its_past():
    values = [{"w": jnp.float32(value)} for value in (1.0, 2.0, 5.0, -3.0)]
    ema = Ema(decay=0.9)
    mean = ema.init(values[0])
    for step, params in enumerate(values[1:]):
        mean = ema.update(mean, params, step)
    weights = np.array([0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1])
    np.testing.assert_allclose(mean["w"], weights @ np.array([1.0, 2.0, 5.0, -3.0]), rtol=1e-6)


def test_ema_of_a_short_type_is_kept_long_and_follows_a_schedule():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    ema = Ema(decay=lambda step: jnp.minimum(0.9999, (1 + step) / (10 + step)))
    mean = ema.init(params)
    assert mean["w"].dtype == jnp.float32
    once = ema.update(mean, {"w": jnp.full(3, 2, jnp.bfloat16)}, 0)
    np.testing.assert_allclose(once["w"], 1.9, rtol=1e-6)
    slow = Ema(decay=0.9999)
    small = slow.update(mean, {"w": jnp.full(3, 2, jnp.bfloat16)}, 0)
    np.testing.assert_allclose(small["w"], 1.0001, rtol=1e-7)
    assert slow.read(small, params)["w"].dtype == jnp.bfloat16
    with pytest.raises(UserError, match=r"Ema.decay is 1.5"):
        Ema(decay=1.5)
