"""The TPU kernel of linear attention: its code, interpreted, is the recurrence; and libtpu compiles it for real chips."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_inputs import inputs

from models.linear_attention import apply as calls
from models.linear_attention import pallas
from models.linear_attention.recurrence import recurrence
from partitioning import UserError, fsdp_sequence, fsdp_tensor

TESTS = Path(__file__).resolve().parents[1]
INTERPRETED = partial(pallas.kernel, chunk=16, interpret=True)


def plain(q, k, v, log_decay, resets, state):
    return recurrence(q, k, v, log_decay[..., None], resets, state)


def given(length, **options):
    """In the order of the arguments."""
    parts, resets, state = inputs("decayed", 2, length, dtype=np.float32, **options)
    return (parts["q"], parts["k"], parts["v"], parts["log_decay"], resets, state)


@pytest.mark.parametrize(("length", "strength"), [(1, 1.0), (15, 0.0), (16, 1.0), (37, 2.0), (37, 1e4)])
def test_it_is_the_recurrence(length, strength):
    """Outputs and last state, packed, from a state on, at any length, with no decay and the strongest."""
    found, right = INTERPRETED(*given(length, strength=strength)), plain(*given(length, strength=strength))
    for one, other in zip(found, right, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * max(1, float(jnp.abs(other).max())))


def test_so_is_its_gradient():
    """By every input."""
    *parts, resets, state = given(21)
    total = lambda form: lambda *x: sum(jnp.sin(y).sum() for y in form(*x[:4], resets, x[4]))
    slopes = [jax.grad(total(form), argnums=tuple(range(5)))(*parts, state) for form in (INTERPRETED, plain)]
    for one, other in zip(*slopes, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(jnp.abs(other).max()))


def test_bfloat16_has_a_float32_state():
    q, k, v, *rest = given(40, strength=0.1)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out, last = INTERPRETED(*low, *rest)
    right = plain(*(x.astype(jnp.float32) for x in low), *rest)
    assert (out.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.float32(out), right[0], rtol=0, atol=0.02 * float(jnp.abs(right[0]).max()))
    np.testing.assert_allclose(last, right[1], rtol=0, atol=0.02 * float(jnp.abs(right[1]).max()))


def test_a_mesh_gives_each_device_its_part(monkeypatch):
    """Rows and heads are cut; the kernel sees what is there."""
    monkeypatch.setattr(calls, "platform", lambda: "tpu")
    monkeypatch.setattr(pallas, "kernel", INTERPRETED)
    *parts, resets, state = (jnp.concatenate([x] * 2) for x in given(20))
    right = plain(*parts, resets, state)
    with fsdp_tensor(2).place(jax.devices()[:4]).scope():
        found = jax.jit(lambda *x: calls.apply("decayed", x[:4], *x[4:], "pallas"))(
            *parts, resets, resets | True, state
        )
    for one, other in zip(found, right, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_what_it_cannot_compute_it_refuses(monkeypatch):
    *parts, resets, state = given(16)
    says = "linear attention's backend = 'pallas' cannot compute {}: use 'xla'"
    with pytest.raises(UserError, match=says.format("without a TPU")):
        calls.apply("decayed", parts, resets, resets | True, state, "pallas")
    monkeypatch.setattr(calls, "platform", lambda: "tpu")
    with pytest.raises(UserError, match=says.format("the form 'gated'")):
        calls.apply("gated", parts, resets, resets | True, state, "pallas")
    cut = fsdp_sequence(2).place().scope()
    with cut, pytest.raises(UserError, match=says.format("rows that are cut along their length")):
        calls.apply("decayed", parts, resets, resets | True, state, "pallas")


@pytest.mark.long
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_it_compiles_for_real_chips(topology):
    """One kernel, forward; the gradient is XLA's. In float32 and bfloat16."""
    place = {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, str(TESTS / "linear_on_tpus.py"), topology],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1] == "[1, 1]"
