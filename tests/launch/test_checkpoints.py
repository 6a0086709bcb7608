"""`palmette checkpoints`: what is there, what is whole, means, and other pieces."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from running import devices, tiny

from checkpoints.store import Checkpoints
from launch import cli
from partitioning import data
from training.ema import Ema


def palmette(*arguments):
    with pytest.raises(SystemExit) as done:
        cli.main([*map(str, arguments)])
    return done.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps with checkpoints of 2 and 4, a frozen tree and an average."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with devices(1):
        tiny("dpo", rules=data(), average=Ema(decay=0.9)).train(out)
    return out


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def leaves(run, step):
    store = Checkpoints(run / "checkpoints")
    return {k: np.asarray(v) for k, v in store.restore(store.shapes(step), step)[0].items()}


def flip(run, step):
    """A bit in the middle of every file of data: some of them hold what a later one took over."""
    for path in (run / "checkpoints" / str(step)).rglob("d/*"):
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)


def test_list_and_verify(run, capsys):
    assert palmette("checkpoints", "verify", run) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["2", "whole"], ["4", "whole"]]
    flip(run, 4)
    (run / "checkpoints" / "2" / "metadata" / "metadata").unlink()
    assert palmette("checkpoints", "list", run) == 0
    two, four = capsys.readouterr().out.splitlines()
    assert "broken: its metadata is missing" in two
    assert " MiB  20" in four
    assert palmette("checkpoints", "verify", run, "--step", 4) == 2
    said = capsys.readouterr()
    assert "4  broken: " in said.out
    assert f"{run}: 1 broken: step 4" in said.err
    assert palmette("checkpoints", "verify", run, "--step", 3) == 2
    assert "no checkpoint of step 3; steps there: 2, 4" in capsys.readouterr().err
    assert palmette("checkpoints", "list", run / "nowhere") == 2
    assert "has no checkpoints" in capsys.readouterr().err


def test_the_mean_of_one_is_itself_and_of_two_their_mean(run, tmp_path, capsys):
    assert palmette("checkpoints", "average", run, "--step", 4, "--out", tmp_path / "one") == 0
    two, four, one = leaves(run, 2), leaves(run, 4), leaves(tmp_path / "one", 4)
    assert four.keys() == one.keys()
    for name in four:
        np.testing.assert_array_equal(one[name], four[name])
    assert palmette("checkpoints", "average", run, "--out", tmp_path / "mean") == 0
    assert "steps 2, 4" in capsys.readouterr().out
    mean = leaves(tmp_path / "mean", 4)
    moved = 0
    for name in four:
        averaged = name.startswith(("params/", "average/"))
        expected = (two[name].astype(np.float64) + four[name]) / 2 if averaged else four[name]
        np.testing.assert_array_equal(mean[name], expected.astype(four[name].dtype))
        moved += bool((mean[name] != four[name]).any())
    assert moved > 4
    # It restores like any run, and is whole.
    assert palmette("checkpoints", "verify", tmp_path / "mean") == 0
    with devices(1):
        trunk, _ = tiny("dpo", rules=data(), average=Ema(decay=0.9)).restore(tmp_path / "mean")
    own = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(trunk, nnx.Param)))]
    table = max((leaf for name, leaf in mean.items() if name.startswith("average/")), key=np.size)
    assert any(np.array_equal(leaf, table) for leaf in own)
    assert palmette("checkpoints", "average", run, "--out", tmp_path / "mean") == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.long
def test_resharded_is_the_same_in_other_pieces(tmp_path, capsys):
    from benchmarks.several import CONFIG

    (tmp_path / "c.gin").write_text(CONFIG.replace("steps = 24", "steps = 2"))
    assert palmette("train", tmp_path / "c.gin", "Run.rules = @partitioning.data()", "--out", tmp_path / "run") == 0
    there = tmp_path / "there"
    arguments = ("checkpoints", "reshard", tmp_path / "run", "Run.rules = @partitioning.fsdp()", "--out", there)
    assert palmette(*arguments) == 0
    assert "step 2, in the pieces of 8 devices (fsdp 8)" in capsys.readouterr().out
    records = [json.loads((f / "checkpoints/2/metadata/metadata").read_text()) for f in (tmp_path / "run", there)]
    assert records[0] == records[1]
    assert "partitioning.fsdp" in (there / "config.gin").read_text()
    pieces = lambda out: json.loads((out / "checkpoints/2/arrays/_sharding").read_text())
    assert pieces(there) != pieces(tmp_path / "run")
    assert palmette(*arguments) == 2
    assert "is there already" in capsys.readouterr().err
