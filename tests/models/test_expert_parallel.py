"""Experts shared out over devices: whatever goes where, results and gradients are the dense layer's, and no more is sent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import TRUNK
from running import tiny

from models import Experts
from models.mixture import exchange, ragged, travelling
from models.mixture.blocks import plan
from models.mixture.dispatch import dense, dropless
from models.stack import POLICIES
from partitioning import UserError, fsdp_expert
from partitioning.collectives import collectives
from partitioning.hlo import parse
from training.flops import FlopCount, executed_flops, forward_flops

TESTS = Path(__file__).resolve().parents[1]
ROWS, E, D, F, K = 8, 8, 6, 4, 2
# Choices of each expert, of 8 rows of 8 tokens.
SIZES = {
    "even": [16] * 8,
    "uneven": [1, 70, 0, 3, 33, 0, 5, 16],
    "all to one": [0, 0, 128] + [0] * 5,
    "all to the last": [0] * 7 + [128],
    "all on one device": [0] * 4 + [64, 64, 0, 0],
    # Each of the eight devices has a row of one token, and the last experts have none.
    "one token": [3, 1, 9, 2, 0, 1, 0, 0],
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def example(sizes):
    """Choices shuffled over the tokens, and states, weights, matrices and a cotangent of float64."""
    draw = np.random.default_rng(0)
    length = sum(sizes) // K // ROWS
    chosen = draw.permutation(np.repeat(np.arange(E), sizes)).reshape(ROWS, length, K).astype(np.int32)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape))
    args = normal(ROWS, length, D), normal(ROWS, length, K), normal(E, D, F), normal(E, D, F), normal(E, F, D)
    return chosen, args, normal(ROWS, length, D)


def found(form, sizes):
    """Output and every gradient of a form, under the rules in scope."""
    chosen, args, pull = example(sizes)
    run = dense if form == "dense" else partial(dropless, form)

    def loss(x, weights, *matrices):
        out = run("silu", x, weights, chosen, matrices)
        return (out * pull).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, tuple(range(5)), has_aux=True))(*args)
    return (out, *gradients)


def assert_alike(one, other):
    for name, a, b in zip(("out", "x", "weights", "inner", "gate", "outer"), one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("form", ["blocks", "ragged"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_no_row_is_lost_whatever_the_skew(sizes, form):
    """Empty experts and devices, all on one, one token: outputs and all gradients in float64."""
    with fsdp_expert(4).place().scope():
        assert_alike(found(form, sizes), found("dense", sizes))


@pytest.mark.parametrize("sizes", [[3, 0, 9, 2], [0, 0, 0, 0], [32, 0, 0, 0]])
def test_room_that_is_not_used_is_not_walked(sizes):
    """Of room for 64 rows; each expert's rows are whole blocks."""
    laid = plan(travelling._expert(jnp.zeros((64, D)), jnp.asarray(sizes, jnp.int32)), 4)
    assert laid.used == sum(-(-size // laid.rows) for size in sizes)
    assert ragged._parts(jnp.asarray(sizes, jnp.int32), 16) == -(-sum(sizes) // 16)


def documented(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `jax.lax.ragged_all_to_all` says that it does; nan where sender and receiver count differently."""
    every = [jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)]
    me, devices = jax.lax.axis_index(axis_name), len(every[0])
    here, row = len(send_sizes) // devices, jnp.arange(len(output))
    for source in range(devices):
        rows, begin, size, land = (x[source] for x in every)
        for i in range(here):
            at = me * here + i
            mine = (row >= land[at]) & (row < land[at] + size[at])
            counted = jnp.where(size[at] == recv_sizes[source * here + i], 0.0, jnp.nan)
            new = rows[jnp.clip(begin[at] + row - land[at], 0, len(rows) - 1)] + counted
            output = jnp.where(mine.reshape(-1, *[1] * (output.ndim - 1)), new, output)
    return output


@pytest.mark.parametrize("name", ["uneven", "all on one device", "one token"])
def test_what_a_tpu_is_told_to_send(name, monkeypatch):
    """A CPU has no ragged all-to-all: its definition, written out, in its place."""
    with fsdp_expert(4).place().scope():
        monkeypatch.setattr(exchange, "platform", lambda: "tpu")
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", documented)
        assert_alike(found("ragged", SIZES[name]), found("dense", SIZES[name]))


def gradient(rules, remat="none"):
    """The gradient of a layer of 8 rows of 16 tokens: its optimised program, its jaxpr, and the mesh."""
    place, length = rules.place(), 16
    shapes = [(ROWS, length, D), (ROWS, length, K), (ROWS, length, K), (E, D, F), (E, D, F), (E, F, D)]
    names = [("batch", "length", None)] * 3 + [("expert", "embed", "mlp")] * 2 + [("expert", "mlp", "embed")]
    tables = ["activations"] * 3 + ["parameters"] * 3
    specs = [place.spec(n, s, table=t, what="x") for n, s, t in zip(names, shapes, tables, strict=True)]
    at = [jax.sharding.NamedSharding(place.mesh, spec) for spec in specs]
    given = [
        jax.ShapeDtypeStruct(s, jnp.int32 if i == 2 else jnp.float32, sharding=where)
        for i, (s, where) in enumerate(zip(shapes, at, strict=True))
    ]
    layer = lambda x, w, chosen, *m: dropless("blocks", "silu", x, w, chosen, m)
    layer = layer if remat == "none" else jax.checkpoint(layer, policy=POLICIES[remat])
    loss = lambda *args: jnp.sin(layer(*args)).sum()
    with place.scope():
        run = jax.jit(jax.grad(loss, (0, 1, 3, 4, 5)), out_shardings=tuple(at[i] for i in (0, 1, 3, 4, 5)))
        return run.lower(*given).compile().as_text(), jax.make_jaxpr(run)(*given), place.mesh


@pytest.mark.parametrize(
    "rules", [fsdp_expert(4), fsdp_expert(2, tensor=2), fsdp_expert(2, sequence=2)], ids=["fsdp", "tensor", "sequence"]
)
def test_tokens_travel_and_matrices_stay(rules):
    """Over the devices that share out experts go the rows' all-to-alls and the counts; no matrix, and no sum of one."""
    text, _, mesh = gradient(rules)
    sent = [one for one in collectives(parse(text), mesh) if "expert" in one.axes]
    choices = ROWS * 16 * K * mesh.shape["tensor"] // 8
    room = choices * mesh.shape["expert"]
    rows = [one for one in sent if one.kind == "all-to-all"]
    # States there and back and their gradients, a weight and its gradient.
    assert sum(one.bytes for one in rows) == 4 * room * (4 * D + 2)
    assert sum(one.bytes for one in sent if one not in rows) == 4 * E * mesh.shape["expert"]


def trips(jaxpr):
    """The all-to-alls in a jaxpr, by their dimensions: two of weights, four of states."""
    found = []
    for equation in jaxpr.eqns:
        found += [x.aval.ndim for x in equation.outvars if equation.primitive.name == "all_to_all"]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            found += trips(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("arrived", 0), ("full", 1)])
def test_states_travel_as_often_as_they_must(remat, again):
    """There and back in each pass, a weight there and its gradient back; once more where nothing may be kept."""
    _, jaxpr, _ = gradient(fsdp_expert(4), remat)
    assert sorted(trips(jaxpr.jaxpr)) == [2] * (2 + again) + [4] * (4 + again)


@pytest.mark.parametrize("form", ["blocks", "ragged"])
def test_flops_are_those_of_the_choices(form):
    """However much room there is for more; features inside may be cut. By ragged_dot two products are computed again."""
    chosen, args, _ = example(SIZES["even"])
    forward = FlopCount(2.0 * chosen.size * 3 * D * F)
    layer = lambda x, w, *m: dropless(form, "silu", x, w, chosen, m)
    pulled = jax.grad(lambda *a: jnp.sin(layer(*a)).sum(), tuple(range(5)))
    for rules in (fsdp_expert(4), fsdp_expert(2, tensor=2)):
        with rules.place().scope():
            assert forward_flops(layer, *args) == forward
            executed = executed_flops(pulled, *args)
            assert executed.flops == pytest.approx((3 + (2 / 3 if form == "ragged" else 0)) * forward.flops)
            assert not executed.unbounded


def test_experts_that_do_not_divide_are_refused():
    """Before anything is compiled, with the matrix's name."""
    model = partial(TRUNK, feed_forward=partial(Experts, experts=6, hidden=8))
    with pytest.raises(UserError, match=r"feed_forward/\w+: axis 'expert' of size 6 does not divide over expert = 4"):
        tiny("clm", model=model, rules=fsdp_expert(4)).plan()


@pytest.mark.long
@pytest.mark.parametrize(("rules", "ways"), [("travel", 8), ("tensor", 4)])
def test_it_compiles_for_real_chips(rules, ways):
    """`ragged_dot` inside, ragged all-to-alls around: each sends this chip's choices, and not the room for all chips'."""
    place = {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, str(TESTS / "experts_on_tpus.py"), "ragged", rules],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [one for one in json.loads(run.stdout.splitlines()[-1]) if one[0] == "ragged-all-to-all"]
    choices, state = 8 * 256 * 4 // ways, 2 * 256
    # A weight takes a line of 128 numbers of four bytes there, and its gradient back.
    assert rows == [["ragged-all-to-all", choices * (4 * state + 128 * (4 + 4)), 6]]
