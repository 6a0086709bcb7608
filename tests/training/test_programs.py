"""With how much effort a program is compiled that runs once."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from training.programs import for_one_run


def mesh(platform):
    """As much of a mesh as is asked for."""
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))


def test_a_cpu_takes_less_effort_unless_the_user_says_how_much(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    assert for_one_run(mesh("cpu")) == {"xla_backend_optimization_level": 1}
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert for_one_run(mesh("cpu")) == {"xla_backend_optimization_level": 1}
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    assert for_one_run(mesh("cpu")) is None


def test_other_devices_know_no_such_option(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    assert for_one_run(mesh("tpu")) is for_one_run(mesh("gpu")) is None


def test_xla_takes_the_option_and_gives_the_same_values(monkeypatch):
    """The compiler knows the option's name, and draws are the same, bit for bit, at another level."""
    monkeypatch.delenv("XLA_FLAGS")
    draw = lambda seed: jax.random.truncated_normal(jax.random.key(seed), -2, 2, (64, 64)) * jnp.float32(0.02)
    plain, cheap = (jax.jit(draw, compiler_options=options)(np.uint32(3)) for options in (
        {"xla_backend_optimization_level": 3}, for_one_run(mesh("cpu")),
    ))  # fmt: skip
    np.testing.assert_array_equal(plain, cheap)
