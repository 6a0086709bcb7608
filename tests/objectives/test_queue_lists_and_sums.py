"""The momentum queue, lists, and objectives made of objectives, against numpy and against their parts."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import TRUNK, VOCABULARY, list_batch, modules, pair_batch, plain_batch
from flax import nnx
from probing import Lookup, distinct, key_of, leaves, loss_of, put, soft, split, table

from models import Buffer
from models.variables import as_buffers, param
from objectives import CausalLM, ListNet, MaskedDiffusion, Models, MomentumQueue, Phases, Weighted
from objectives.momentum_queue import Queue
from partitioning import UserError

ROWS = 8


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


class Rows(nnx.Module):
    """A look-up trunk with parameters, so that it can have a teacher."""

    def __init__(self, rows):
        self.rows = param(rows, (None, None))

    def __call__(self, tokens, **call):
        return Lookup(self.rows.get_value())(tokens, **call)


def test_five_steps_of_a_momentum_queue():
    """Loss, teacher and queue follow numpy: the oldest keys leave first, and nothing moves before `after_step`."""
    size, momentum, heat, width = 2 * ROWS, 0.8, 0.2, 6
    objective = MomentumQueue(size=size, momentum=momentum, temperature=heat, pooling="first")
    trunk = Rows(table())
    queue = Queue(size, width, nnx.Rngs(0))
    queue.keys.set_value(queue.keys.get_value().astype(jnp.float64))
    models = Models({"trunk": trunk, "teacher": as_buffers(trunk), "queue": queue})
    assert not nnx.to_flat_state(nnx.state(models.module("teacher"), nnx.Param))
    student = teacher = np.asarray(table())
    held = [np.asarray(key) for key in queue.keys.get_value()]
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    for step in range(5):
        batch = distinct(put(pair_batch(seed=step, rows=ROWS)))
        loss = objective(models, batch, step=step, key=key_of(batch, step))
        q = unit(student[np.asarray(batch["query/tokens"])[:, 0]])
        k = unit(teacher[np.asarray(batch["positive/tokens"])[:, 0]])
        scores = np.concatenate([(q * k).sum(1, keepdims=True), q @ np.stack(held).T], axis=1) / heat
        np.testing.assert_allclose(loss.terms["infonce"].total, -np.log(soft(scores)[:, 0]).sum(), rtol=1e-10)
        np.testing.assert_allclose(np.asarray(nnx.state(models.module("teacher"), Buffer)["rows"]), teacher, atol=1e-12)

        # The optimizer's step, and then the buffers'.
        student = student + 0.1 * np.random.default_rng(step).standard_normal(student.shape)
        trunk.rows.set_value(jnp.asarray(student))
        objective.after_step(models, loss.rows, {}, step=step)
        teacher = momentum * teacher + (1 - momentum) * student
        held = held[ROWS:] + list(k)
        # The queue is a ring: the oldest key stands where the next one goes.
        ring = np.roll(np.asarray(queue.keys.get_value()), -int(queue.next.get_value()), axis=0)
        np.testing.assert_allclose(ring, np.stack(held), atol=1e-12)
    with pytest.raises(UserError, match=r"MomentumQueue\.size"):
        objective.check(steps=1, batch=dict.fromkeys(objective.fields(), ((6, 12), None)))


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_list_net_is_ten_lines_of_numpy(temperature):
    """Invalid candidates count for nothing, lists without a valid one neither; loss and gradient of the scores."""
    batch = distinct(put(list_batch(rows=ROWS)))
    rows = table()

    class Head:
        def __init__(self, weight):
            self.weight = weight

        def __call__(self, pooled):
            return pooled @ self.weight

    weight = jnp.asarray(np.random.default_rng(1).standard_normal(6))
    objective = ListNet(temperature=temperature)
    run = lambda w: loss_of(objective, Models({"trunk": Lookup(rows), "relevance": Head(w)}), batch)
    value, gradient = jax.value_and_grad(run)(weight)
    x = np.asarray(rows)[np.asarray(batch["candidates/tokens"])[:, :, 0]]
    total, push = 0.0, np.zeros(6)
    full = [r for r in range(ROWS) if batch["valid"][r].any()]
    for r in full:
        here = np.flatnonzero(batch["valid"][r])
        wanted, got = soft(np.asarray(batch["relevance"])[r, here] / temperature), soft(x[r, here] @ np.asarray(weight))
        total -= (wanted * np.log(got)).sum()
        push += (got - wanted) @ x[r, here]
    assert len(full) < ROWS
    np.testing.assert_allclose(value, total / len(full), rtol=1e-6)
    np.testing.assert_allclose(gradient, push / len(full), atol=1e-7)


@pytest.fixture(scope="module")
def parts():
    """Gradients of two objectives and of their sums and phases, compiled together."""
    clm, diffusion = CausalLM(), MaskedDiffusion(least=0.3)
    with jax.enable_x64(True):
        batch = put(plain_batch(rows=ROWS))
        states, models = split(modules(clm, partial(TRUNK, layers=1)))
        both = {"clm": clm, "diffusion": diffusion}
        asked = {
            "clm": (clm, 0),
            "only": (Weighted(parts={"clm": clm}), 0),
            "twice": (Weighted(parts={"a": clm, "b": clm}, weights={"a": lambda step: 0.25 * step, "b": 0.5}), 2),
            "second": (Weighted(parts={"diffusion": diffusion}), 1),
            "first phase": (Phases(parts=both, lengths=(1, 2)), 0),
            "second phase": (Phases(parts=both, lengths=(1, 2)), 1),
            "later": (Phases(parts=both, lengths=(1, 1)), 9),
            "later alone": (Weighted(parts={"diffusion": diffusion}), 9),
            "around": (Phases(parts=both, lengths=(1, 2), cycle=True), 3),
            "ninth": (clm, 3),
        }
        run = lambda one, step: jax.value_and_grad(lambda s: loss_of(one, models(s), batch, step=step))
        return jax.jit(lambda s: {name: run(one, jnp.asarray(step))(s) for name, (one, step) in asked.items()})(states)


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        ("only", "clm"),
        ("twice", "clm"),
        ("first phase", "clm"),
        ("second phase", "second"),
        ("later", "later alone"),
        ("around", "ninth"),
    ],
)
def test_sums_and_phases_reduce_to_their_parts(parts, whole, part):
    """One part is itself, half and half is one, a phase is its objective, the last one lasts, a cycle begins again."""
    (value, gradient), (expected, other) = parts[whole], parts[part]
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    for name, g in leaves(other).items():
        np.testing.assert_allclose(leaves(gradient)[name], g, atol=1e-9, err_msg=name)


def test_the_parts_differ(parts):
    """Or the reductions would prove nothing."""
    assert abs(parts["clm"][0] - parts["second"][0]) > 1e-2


def test_sums_and_phases_that_do_not_fit():
    """Refused where they are made, by name."""
    with pytest.raises(UserError, match="names 'mlm'"):
        Weighted(parts={"clm": CausalLM()}, weights={"mlm": 1.0})
    with pytest.raises(UserError, match="1 parts and 2 lengths"):
        Phases(parts={"clm": CausalLM()}, lengths=(1, 2))
    queues = Weighted(parts={"a": MomentumQueue(size=8), "b": MomentumQueue(size=16)})
    trunk = nnx.eval_shape(lambda: TRUNK(VOCABULARY, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="'b' brings a tree named 'teacher'"):
        queues.companions(trunk, nnx.Rngs(0))
