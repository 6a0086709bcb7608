"""Initial values from another run or folder, whole and in part: to the bit, reported, and refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import CASES
from flax import nnx
from running import Toy, assert_same_end, devices, killed_after, tiny

from launch.exchange import exported
from models import (
    Experts,
    FeedForward,
    HashRouter,
    PowerNorm,
    RMSNorm,
    SigmoidRouter,
    TopKRouter,
    Trunk,
    bert,
    llama,
    upcycle,
)
from models.stack import layer_names, unstack
from models.variables import flatten, param
from objectives.base import Companion
from partitioning import UserError, data, fsdp_tensor
from training.init_from import REPORT
from training.state import by_index
from training.store import Store

SIZES = {"width": 16, "layers": 3, "heads": 2, "hidden": 16, "longest": 16}
BERT = partial(bert, **SIZES)
LLAMA = partial(llama, width=16, layers=1, heads=2, kv_heads=2, hidden=16)


def leaves(plan, state):
    """The trunk's parameters, frozen ones too, layers by index."""
    flat = {n: x for n, x in {**state.params, **state.frozen}.items() if n.startswith("trunk/")}
    names = layer_names(plan.trees.shapes)
    return {n.removeprefix("trunk/"): np.asarray(x) for n, x in by_index(flat, names).items()}


def begun(**changes):
    """The plan of a run and its first values."""
    plan = tiny(**({"model": BERT, "rules": data()} | changes)).plan([jax.devices()[0]])
    initial = plan.initial()
    return initial.get("trunk"), leaves(plan, plan.init(initial))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A trained run with a frozen part, what it ended with, and the same as a folder of the other layout."""
    out = tmp_path_factory.mktemp("source")
    run = tiny(model=BERT, steps=2, freeze=["positions", "mixer_norm", "^table"], average=None)
    with devices(1):
        run.train(out / "run")
        exported(run, out / "run", out / "hf")
        plan = run.plan()
        _, values = run_values(plan, out / "run")
    return out, values


def run_values(plan, folder):
    state, _ = Store(plan, str(folder / "checkpoints")).restore()
    return state, leaves(plan, state)


def same(ours, theirs, names=None):
    for name in theirs if names is None else names:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_run_begins_with_all_of_another(source):
    """Frozen parts too, which lie elsewhere; on another mesh."""
    out, values = source
    plan = tiny(model=BERT, init_from=str(out / "run"), rules=fsdp_tensor(2)).plan()
    initial = plan.initial()
    assert initial["trunk"].used == sorted(values)
    assert not initial["trunk"].reinitialised
    assert not initial["trunk"].left
    got = leaves(plan, plan.init(initial))
    assert got.keys() == values.keys()
    same(got, values)


@pytest.mark.parametrize("kind", ["run", "hf"])
def test_what_is_named_begins_anew(source, kind):
    """A new head and one layer of a scanned stack: as in a run of this seed without `init_from`, to the bit."""
    out, values = source
    fresh = begun(seed=5)[1]
    found, got = begun(seed=5, init_from=str(out / kind), reinitialise=["^head/", "layers/1/"])
    anew = {name for name in values if name.startswith("head/") or "/layers/1/" in name}
    assert set(found.reinitialised) == anew
    assert set(found.used) == values.keys() - anew
    same(got, fresh, anew)
    cut = lambda name, x: x[:37] if name == "table" else x
    for name in found.used:
        np.testing.assert_array_equal(cut(name, got[name]), cut(name, values[name]), err_msg=name)
    assert any((got[name] != values[name]).any() for name in anew)


@pytest.mark.parametrize("kind", ["run", "hf"])
def test_sizes_may_differ_where_nothing_is_shared(source, kind):
    """More layers, a longer table of positions: theirs where ours are alike; fewer layers: theirs are left."""
    out, values = source
    larger = partial(bert, **(SIZES | {"layers": 4, "longest": 20}))
    found, got = begun(init_from=str(out / kind), reinitialise=["layers/3/", "positions"], model=larger)
    assert not found.left
    same(got, values, [name for name in values if name not in ("table", "positions/table")])
    assert got["positions/table"].shape[0] == 20
    smaller = partial(bert, **(SIZES | {"layers": 2}))
    found, got = begun(init_from=str(out / kind), reinitialise=["^head/bias"], model=smaller)
    assert found.left
    assert all("layers/2/" in name or "layer.2." in name for name in found.left)
    same(got, values, [name for name in got if name not in ("table", "head/bias")])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": partial(bert, **(SIZES | {"layers": 5}))}, r"lacks \d\d of \d\d parameters, first 'stack/layers/3/.*not there"),
        ({"model": partial(bert, **(SIZES | {"longest": 9}))}, r"lacks 1 of .*\(16, 16\) there and \(9, 16\) here\)"),
        ({"reinitialise": ["haed"]}, "reinitialise of tree 'trunk': 'haed' matches no parameter; nearest: 'head/"),
        ({"reinitialise": ["("]}, "is not a regular expression"),
        ({"reinitialise": ["head"], "init_from": None}, "has reinitialise and no init_from"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(source, changes, says):
    with pytest.raises(UserError, match=says) as raised:
        begun(**({"init_from": str(source[0] / "run"), "model": BERT} | changes))
    assert "\n" not in str(raised.value)


def test_another_layout_is_not_read_halfway(source):
    """What shapes do not show is never taken for alike."""
    with pytest.raises(UserError, match="eps is 1e-12 there and 1e-06 here"):
        begun(init_from=str(source[0] / "hf"), reinitialise=["head"], model=partial(BERT, eps=1e-6))
    with pytest.raises(UserError, match="holds a bert, the trunk is a llama"):
        begun(init_from=str(source[0] / "hf"), model=LLAMA)


def test_it_is_told_and_kept_and_a_resume_is_exact(source, tmp_path, capsys):
    """The folder is not needed again: the second start reads its own checkpoint."""
    run = tiny(
        model=BERT, rules=data(), init_from=str(source[0] / "run"), reinitialise=["^head/"], freeze=["mixer_norm"]
    )
    with devices(1):
        run.train(tmp_path / "whole")
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trunk from")]
        killed_after(2, tmp_path / "whole", tmp_path / "killed")
        run.train(tmp_path / "killed")
    assert len(said) == 1
    assert "re-initialised: head/bias, head/dense, " in said[0]
    assert not any(line.startswith("trunk from") for line in capsys.readouterr().out.splitlines())
    assert_same_end(tmp_path / "whole", tmp_path / "killed", 4)
    record = json.loads((tmp_path / "whole" / REPORT).read_text())["trunk"]
    assert record["source"] == str(source[0] / "run")
    assert {"head/bias", "head/dense"} <= set(record["reinitialised"])
    assert "table" in record["used"]
    assert record["left"] == []


def test_a_companion_takes_its_own_part(source):
    """From the same folder, with what it names."""
    out, values = source

    class Beside(type(CASES["mlm"].objective)):
        def companions(self, trunk, rngs):
            module = BERT(trunk.vocabulary, rngs=rngs)
            return {"beside": Companion(module, train=False, init_from=str(out / "run"), reinitialise=("^head/",))}

    objective = Beside(**vars(CASES["mlm"].objective))
    plan = tiny(model=BERT, objective=objective, data=Toy(CASES["mlm"].batch)).plan()
    initial = plan.initial()
    assert initial.keys() == {"beside"}
    state = plan.init(initial)
    got = by_index(state.frozen, layer_names(plan.trees.shapes))
    for name in initial["beside"].used:
        np.testing.assert_array_equal(got[f"beside/{name}"], values[name])


DENSE = partial(FeedForward, hidden=16, gated=True)
SPARSE = partial(Experts, experts=4, hidden=16, activation="gelu", router=partial(TopKRouter, renormalise=True))


BUFFERS = {
    "biases": {"feed_forward": partial(SPARSE, router=partial(SigmoidRouter, rate=0.1))},
    "hashes": {"feed_forward": partial(SPARSE, router=HashRouter)},
    "running": {"norm": PowerNorm},
}
LAST = {"biases": "router/bias", "hashes": "router/table", "running": "mixer_norm/mean_square"}


@pytest.mark.parametrize("case", BUFFERS)
def test_buffers_are_part_of_what_a_run_gives(case, tmp_path):
    """Routers' biases, tables of hashes, running statistics: without them another function would begin. By name they begin anew."""
    made = partial(Trunk, width=16, layers=2, **BUFFERS[case])
    run = tiny(model=made, steps=2, average=None)
    with devices(1):
        run.train(tmp_path / "first")
        expected = Store(run.plan(), str(tmp_path / "first" / "checkpoints")).restore()[0].buffers

    def begun(**changes):
        plan = tiny(model=made, seed=5, rules=fsdp_tensor(2), **changes).plan()
        initial = plan.initial()
        return initial.get("trunk"), plan.init(initial).buffers

    _, fresh = begun()
    found, got = begun(init_from=str(tmp_path / "first"))
    same(got, expected)
    assert any((np.asarray(expected[name]) != fresh[name]).any() for name in expected)
    assert found.reinitialised == []
    some = sorted(name for name in found.used if name.startswith("stack/layers/1/") and name.endswith(LAST[case]))
    found, got = begun(init_from=str(tmp_path / "first"), reinitialise=some)
    assert found.reinitialised == some
    scanned = f"trunk/stack/scanned/0/{some[0].removeprefix('stack/layers/1/')}"
    np.testing.assert_array_equal(got[scanned][0], expected[scanned][0])
    np.testing.assert_array_equal(got[scanned][1], fresh[scanned][1])


def test_a_buffer_that_is_not_there_begins_as_usual(tmp_path):
    """And is told: routers of a run that had none."""
    dense = tiny(model=partial(Trunk, width=16, layers=2, feed_forward=DENSE), steps=1, average=None)
    with devices(1):
        dense.train(tmp_path / "dense")
    sparse = partial(Trunk, width=16, layers=2, **BUFFERS["biases"])
    plan = tiny(model=sparse, init_from=str(tmp_path / "dense"), reinitialise=["router/kernel"]).plan()
    found = plan.initial()["trunk"]
    assert {name for name in found.reinitialised if "kernel" not in name} == {
        f"stack/layers/{i}/feed_forward/router/bias" for i in range(2)
    }


class OneRow(RMSNorm):
    """Whose scale has one dimension more, and that is not of experts."""

    def __init__(self, width):
        super().__init__(width)
        self.scale = param(jnp.ones((1, width)), (None, "embed"))


def test_a_dense_run_fills_every_expert(tmp_path):
    """As `upcycle` does, from trained and frozen matrices, told by name, on a mesh that cuts them; no other shape is filled."""
    make = lambda forward: partial(Trunk, width=16, layers=3, feed_forward=forward)
    dense = tiny(model=make(DENSE), freeze=["feed_forward/inner"], steps=1, average=None)
    with devices(1):
        dense.train(tmp_path / "dense")
    trunk, _ = dense.restore(tmp_path / "dense")
    expected = unstack(flatten(upcycle(trunk, experts=4, top_k=2, rngs=nnx.Rngs(0)), nnx.Param))
    run = tiny(model=make(SPARSE), init_from=str(tmp_path / "dense"), reinitialise=["router"], rules=fsdp_tensor(2))
    plan = run.plan()
    initial = plan.initial()
    got = leaves(plan, plan.init(initial))
    matrices = {name for name in got if name.endswith(("/inner", "/gate", "/outer"))}
    assert set(initial["trunk"].spread) == matrices
    assert f"{len(matrices)} given to every expert: stack/layers/0/feed_forward/gate" in initial["trunk"].line("trunk")
    same(got, expected, [name for name in got if "router" not in name])
    assert got["stack/layers/1/feed_forward/inner"].shape == (4, 16, 16)
    wider = make(partial(SPARSE, hidden=24))
    with pytest.raises(UserError, match=r"lacks 9 of .*\(16, 16\) there and \(4, 16, 24\) here"):
        replace(run, model=wider).plan().initial()
    with pytest.raises(UserError, match=r"lacks 7 of .*'final_norm/scale' \(\(16,\) there and \(1, 16\) here"):
        replace(run, model=partial(make(SPARSE), norm=OneRow)).plan().initial()
