"""Numbers that say that something is wrong, and only then."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import RandomTokens
from partitioning.spoiled import spoiled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_right_stays_and_what_is_wrong_is_nan(dtype):
    value = jnp.asarray([[0.0, 1.0, -3.7], [5.0, 1e-30, 2.0]], dtype)
    wrong = jnp.asarray([[False], [True]])
    found = spoiled(value, wrong)
    assert found.dtype == value.dtype
    np.testing.assert_array_equal(found[0], value[0])
    assert jnp.isnan(found[1]).all()
    slope = jax.grad(lambda x: (spoiled(x, wrong)[0] ** 2).sum())(value.astype(jnp.float32))
    np.testing.assert_array_equal(slope[0], 2 * value[0].astype(jnp.float32))


def test_a_debugged_step_stops_at_a_wrong_number_and_at_no_other():
    value, hides = jnp.ones((2,)), RandomTokens(rate=0.5)
    slots = jnp.arange(4)[None]
    with jax.debug_nans(True):
        spoiled(value, jnp.zeros((2,), bool))
        np.testing.assert_array_equal(hides.selection(slots, jnp.asarray([2]), 4).weight, [[1.0, 1.0]])
        with pytest.raises(FloatingPointError):
            spoiled(value, jnp.asarray([False, True]))
        with pytest.raises(FloatingPointError):
            hides.selection(slots, jnp.asarray([3]), 4)
