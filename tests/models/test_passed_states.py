"""Rows of linear attention cut along their length: states cross, tokens do not, and all equals one device."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import HYBRID, LENGTH
from linear_inputs import inputs, ordered
from programs import collectives
from running import devices, tiny

from models import LightningAttention, Trunk
from models.linear_attention.apply import CHUNKED, apply
from partitioning import data, fsdp, fsdp_sequence, fsdp_tensor

S = 16
PURE = partial(Trunk, width=16, layers=3, mixer=partial(LightningAttention, heads=2, layers=3), vocab_multiple=8)


def results(run, parts, resets, present, state):
    """Outputs, last state, and the gradients of a sum over both by every input."""

    def total(parts, state):
        out, last = run(ordered(parts), resets, present, state)
        weigh = lambda x: (jnp.sin(x) * (1 + jnp.arange(x.size).reshape(x.shape) % 7)).sum()
        return weigh(out) + weigh(last), (out, last)

    gradients, values = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(parts, state)
    return {"out": values[0], "last": values[1], "state": gradients[1], **gradients[0]}


@pytest.mark.parametrize("form", [*CHUNKED, "steady"])
@pytest.mark.parametrize("ways", [2, pytest.param(4, marks=pytest.mark.long), 8])
def test_every_result_is_that_of_one_device(form, ways):
    """In float64, with borders anywhere, on the cuts and beside them too, and with tokens that are not there."""
    with jax.enable_x64(True):
        parts, _, state = inputs(form, 8, S)
        form = "decayed" if form == "steady" else form
        resets = np.random.default_rng(3).random((8, S)) < 0.1
        resets[1, S // ways], resets[2, S // ways - 1], resets[3], resets[4] = True, True, False, True
        there = jnp.asarray((np.arange(8) > 0)[:, None] | (np.arange(S) % 5 > 0))
        given = parts, jnp.asarray(resets), there, state
        one = results(partial(apply, form), *given)
        with fsdp_sequence(ways).place().scope():
            cut = results(partial(apply, form), *given)
    for name, right in one.items():
        np.testing.assert_allclose(cut[name], right, rtol=0, atol=1e-10 * np.abs(right).max(), err_msg=name)


def step(model, rules, count):
    """The compiled step of a run, and what it makes of one batch of 8 rows of 12 tokens."""
    with devices(count):
        plan = tiny("clm", model=model, rules=rules).plan()
    stage = plan.stages[0]
    program = plan.compile(stage)
    batch = stage.reader.batch(0, batch_size=8, length=LENGTH, seed=0)
    state, out = program(plan.init(), plan.put(stage, batch))
    return program, jax.device_get(out), {name: np.asarray(x) for name, x in state.params.items()}


@pytest.mark.parametrize("model", [pytest.param(PURE, marks=pytest.mark.long), HYBRID], ids=["linear", "hybrid"])
def test_a_training_step_is_that_of_one_device(model):
    """Under every preset."""
    _, one, parameters = step(model, data(), 1)
    for rules in (fsdp(), fsdp_tensor(2), fsdp_sequence(4), fsdp_sequence(2, tensor=2)):
        _, cut, moved = step(model, rules, 8)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), cut, one)
        for name, value in parameters.items():
            np.testing.assert_allclose(
                moved[name], value, rtol=0, atol=2e-5 * max(1, np.abs(value).max()), err_msg=name
            )


def test_no_row_of_states_is_gathered():
    """Along the sequence axis go states and what is left of them, no tokens' features."""
    program, *_ = step(PURE, fsdp_sequence(4), 8)
    found = collectives(program.as_text(), 8)
    assert found
    assert not [one for one in found for shape in one.shapes if LENGTH in shape and len(shape) > 2]
