"""What is saved comes back, on any mesh, whole or not at all."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint._src.checkpointers import async_checkpointer

from checkpoints.leaves import checksums, content_hash
from checkpoints.store import Checkpoints
from partitioning.errors import UserError

ROOT = Path(__file__).parents[2]


class Moments(NamedTuple):
    steps: jax.Array
    mu: dict
    nothing: tuple = ()


def mesh_of(count, *names):
    shape = (count,) if len(names) == 1 else (count // 2, 2)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices()[:count])


def state(seed: int = 0) -> dict[str, Any]:
    """Every kind of leaf that a run has."""
    draw = np.random.default_rng(seed)
    params = {
        "trunk/embed/tokens/table": jnp.asarray(draw.standard_normal((64, 32)), jnp.float32),
        "trunk/layers/0/mlp/up/kernel": jnp.asarray(draw.standard_normal((8, 16)), jnp.bfloat16),
    }
    return {
        "params": params,
        "optimizer": (Moments(jnp.int32(seed), params), ()),
        "buffers": {"queue": jnp.asarray(draw.integers(0, 9, (8, 3)), jnp.int8), "empty": jnp.zeros((0, 4))},
        "flags": jnp.asarray(draw.integers(0, 2, 5), bool),
        "key": jax.random.key(seed),
        "step": 7,
        "none": None,
    }


def abstract(tree: Any, sharding: Any = None) -> Any:
    def one(leaf):
        leaf = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding)

    return jax.tree.map(one, tree)


def assert_same(one: Any, other: Any) -> None:
    def bits(leaf):
        return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    assert str(jax.tree.structure(one)) == str(jax.tree.structure(other))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(bits(jnp.asarray(a)), bits(b))
        assert jnp.asarray(a).dtype == b.dtype


def saved(folder, *steps, keep=3):
    with Checkpoints(folder, keep=keep) as store:
        for step in steps:
            store.save(step, state(step), {"log": [step]})
    return Checkpoints(folder)


def test_everything_comes_back_and_the_newest_wins(tmp_path):
    store = saved(tmp_path / "new" / "run", 10, 20, 30, 40)
    assert store.steps() == [20, 30, 40]
    arrays, metadata = store.restore(abstract(state()))
    assert_same(state(40), arrays)
    assert metadata == {"log": [40]}
    assert jnp.issubdtype(arrays["key"].dtype, jax.dtypes.prng_key)
    arrays, metadata = store.restore(abstract(state()), step=20)
    assert_same(state(20), arrays)
    store.verify(30)
    assert store.metadata(30) == {"log": [30]}


def test_a_tree_without_arrays(tmp_path):
    with Checkpoints(tmp_path) as store:
        store.save(1, {"nothing": (), "empty": jnp.zeros((0,))}, {"a": 1})
    arrays, metadata = Checkpoints(tmp_path).restore({"nothing": (), "empty": jnp.zeros((0,))})
    assert arrays["empty"].shape == (0,)
    assert metadata == {"a": 1}


def test_donated_arrays_are_saved_as_they_were(tmp_path):
    value = jnp.arange(2_000_000.0)
    expected = np.array(value)
    overwrite = jax.jit(lambda x: -x, donate_argnums=0)
    with Checkpoints(tmp_path) as store:
        store.save(1, {"w": value}, {})
        for _ in range(3):
            value = overwrite(value)
    arrays, _ = Checkpoints(tmp_path).restore({"w": value})
    np.testing.assert_array_equal(arrays["w"], expected)


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1), (8, 8)])
def test_any_mesh_restores_any_other(tmp_path, before, after):
    def placed(count, *specs):
        mesh = mesh_of(count, "data", "tensor") if count == 8 else mesh_of(1, "data")
        named = [NamedSharding(mesh, spec if count == 8 else P()) for spec in specs]
        return dict(zip(("table", "kernel", "scale"), named, strict=True))

    values = {"table": jnp.arange(64.0).reshape(16, 4), "kernel": jnp.ones((8, 6)), "scale": jnp.arange(3)}
    there = placed(before, P("data", "tensor"), P("tensor"), P())
    with Checkpoints(tmp_path) as store:
        store.save(1, jax.tree.map(jax.device_put, values, there), {})
    here = placed(after, P(None, "data"), P(("data", "tensor")), P())
    arrays, _ = Checkpoints(tmp_path).restore(
        jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), values, here)
    )
    for name, value in values.items():
        assert arrays[name].sharding == here[name]
        np.testing.assert_array_equal(arrays[name], value)


def test_checksums_do_not_know_the_sharding_and_see_every_bit():
    value = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.bfloat16)
    spread = jax.device_put(value, NamedSharding(mesh_of(8, "data", "tensor"), P("data", "tensor")))
    assert checksums({"w": value}) == checksums({"w": spread})
    raw = np.array(value).view(np.uint16)
    seen = {checksums({"w": value})["w"]}
    for bit in range(16):
        changed = raw.copy()
        changed[3, bit % 8] ^= 1 << bit
        seen.add(checksums({"w": jnp.asarray(changed.view(jnp.bfloat16))})["w"])
    swapped = raw.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    seen.add(checksums({"w": jnp.asarray(swapped.view(jnp.bfloat16))})["w"])
    assert len(seen) == 18


def data_files(folder):
    return sorted(
        (path for path in folder.rglob("*") if path.is_file() and "/d/" in str(path)), key=lambda p: p.stat().st_size
    )


def truncate(folder):
    path = data_files(folder)[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_data(folder):
    for path in data_files(folder):
        path.unlink()


def lose_metadata(folder):
    (folder / "metadata" / "metadata").unlink()


def cut_metadata(folder):
    path = folder / "metadata" / "metadata"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [truncate, lose_data, lose_metadata, cut_metadata])
def test_a_broken_checkpoint_is_reported_and_skipped(tmp_path, damage):
    saved(tmp_path, 10, 20)
    (tmp_path / "25.orbax-checkpoint-tmp").mkdir()
    damage(tmp_path / "20")
    lines: list[str] = []
    store = Checkpoints(tmp_path, keep=2, on_broken=lines.append)
    arrays, _ = store.restore(abstract(state()))
    assert_same(state(10), arrays)
    assert len(lines) == 1
    assert str(tmp_path / "20") in lines[0]
    with pytest.raises(UserError, match=r"20: its (arrays|metadata)"):
        Checkpoints(tmp_path).verify(20)
    # The run goes on from 10: what it writes next is the newest, before the broken one's step and after.
    with store:
        store.save(15, state(15), {})
    assert Checkpoints(tmp_path).steps() == [10, 15]
    assert [path.name.split("-")[0] for path in (tmp_path / "aside").iterdir()] == ["20"]
    assert not (tmp_path / "25.orbax-checkpoint-tmp").exists()
    damage(tmp_path / "10")
    damage(tmp_path / "15")
    with pytest.raises(UserError, match="no complete checkpoint"):
        Checkpoints(tmp_path, on_broken=lines.append).restore(abstract(state()))


def test_one_changed_byte_of_data_is_found(tmp_path):
    value = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(3000), jnp.float32)}
    with Checkpoints(tmp_path) as store:
        store.save(1, value, {})
    path = data_files(tmp_path / "1")[-1]
    whole = path.read_bytes()
    for place in range(len(whole) // 2, len(whole), len(whole) // 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"not as they were saved, first 'w'|cannot be read"):
            Checkpoints(tmp_path).restore(value, step=1)
    path.write_bytes(whole)
    Checkpoints(tmp_path).verify(1)


def test_a_checkpoint_of_another_model_names_the_leaves(tmp_path):
    store = saved(tmp_path, 1)
    other = abstract(state())
    other["params"]["head/kernel"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    other["params"]["trunk/embed/tokens/table"] = jax.ShapeDtypeStruct((96, 32), jnp.float32)
    other["flags"] = jax.ShapeDtypeStruct((5,), jnp.int32)
    del other["buffers"]["queue"]
    with pytest.raises(UserError) as caught:
        store.restore(other)
    for words in (
        "'params/head/kernel' is missing in it",
        "'params/trunk/embed/tokens/table' is (64, 32) in it and (96, 32) in the model",
        "'flags' is bool in it and int32 in the model",
        "'buffers/queue' is only in it",
    ):
        assert words in str(caught.value)
    many = {f"w{i}": jnp.zeros(1) for i in range(20)}
    with pytest.raises(UserError, match="and 14 more"):
        store.restore_part(many)
    part, _ = store.restore_part({"params": abstract(state())["params"]})
    assert_same(state(1)["params"], part["params"])


def test_folders_that_cannot_hold_checkpoints(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="file is a file"):
            Checkpoints(folder)
    with pytest.raises(UserError, match="no checkpoint in"):
        Checkpoints(tmp_path / "nowhere").restore({})
    assert Checkpoints(tmp_path / "nowhere").steps() == []
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UserError, match=r"step 5 in .*; steps there: 1"):
        saved(tmp_path / "run", 1).restore(abstract(state()), step=5)


def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_stays(tmp_path):
    value = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(400_000), jnp.float32)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, value, {})
    store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        store.save(2, value, {})
        with pytest.raises(UserError, match="no room on the disk"):
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    arrays, _ = Checkpoints(tmp_path).restore(value)
    np.testing.assert_array_equal(arrays["w"], value["w"])
    assert Checkpoints(tmp_path).steps() == [1]


@contextmanager
def slow_writes(monkeypatch, wait: Callable[[], object]):
    """Between a checkpoint's last byte and its name, Orbax's thread waits."""
    commit = async_checkpointer._background_wait_for_commit_futures

    def slowly(directory, futures, on_commit, **rest):
        commit(directory, futures, lambda: (wait(), on_commit()), **rest)

    with monkeypatch.context() as patch:
        patch.setattr(async_checkpointer, "_background_wait_for_commit_futures", slowly)
        yield


def test_writes_slower_than_the_interval_lose_nothing(tmp_path, monkeypatch):
    """At every moment all checkpoints but the last are there, whole; a save waits for one write at most."""
    took, steps = 0.2, [1, 2, 3, 4, 5]
    begin = time.monotonic()
    with slow_writes(monkeypatch, lambda: time.sleep(took)), Checkpoints(tmp_path, keep=9) as store:
        for step in steps:
            store.save(step, state(step), {"log": [step]})
            assert store.steps() == steps[: step - 1]
    assert len(steps) * took <= time.monotonic() - begin < 60
    reading = Checkpoints(tmp_path, on_broken=pytest.fail)
    assert reading.steps() == steps
    for step in steps:
        reading.verify(step)
        arrays, metadata = reading.restore(abstract(state(step)), step)
        assert_same(state(step), arrays)
        assert metadata == {"log": [step]}
    assert {path.name for path in tmp_path.iterdir()} == set(map(str, steps))


def test_a_write_that_does_not_end_is_one_line(tmp_path, monkeypatch):
    """Neither the next save nor the end waits for it for ever, and what was written before stays."""
    answers = threading.Event()
    saved(tmp_path, 1)
    store = Checkpoints(tmp_path, timeout_s=1)
    store.restore(abstract(state(1)))
    with slow_writes(monkeypatch, answers.wait):
        store.save(2, state(2), {})
        for call in (lambda: store.save(3, state(3), {}), store.wait, store.close):
            with pytest.raises(UserError, match=r"a checkpoint was not written in 1 s; the earlier ones are whole"):
                call()
        reading = Checkpoints(tmp_path, on_broken=pytest.fail)
        assert reading.steps() == [1]
        assert_same(state(1), reading.restore(abstract(state(1)))[0])
        answers.set()


def test_a_write_that_fails_while_it_is_closed_is_one_line(tmp_path, monkeypatch, caplog):
    """What Orbax's threads meet is heard until nothing is waited for: on several hosts nobody else would end the wait."""
    closing = threading.Event()

    def full():
        closing.wait()
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Checkpoints(tmp_path)
    with slow_writes(monkeypatch, full):
        store.save(1, state(1), {})
        threading.Timer(0.3, closing.set).start()
        with pytest.raises(UserError, match="no room on the disk"):
            store.close()
    assert not [record for record in caplog.records if record.exc_info]
    assert Checkpoints(tmp_path).steps() == []


def test_frozen_trees_are_written_once_and_known_by_content(tmp_path):
    tree: dict[str, Any] = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(4, jnp.bfloat16)}}
    store = Checkpoints(tmp_path)
    reference = store.save_frozen("reference", tree)
    assert reference["hash"] == content_hash({"a": tree["a"], "b/c": tree["b"]["c"]})
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert store.save_frozen("reference", tree) == reference
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    sharding = NamedSharding(mesh_of(8, "data"), P())
    assert_same(tree, store.load_frozen(reference, abstract(tree, sharding)))
    other = store.save_frozen("reference", {"a": tree["a"], "b": {"c": jnp.zeros(4, jnp.bfloat16)}})
    assert other["path"] != reference["path"]
    with pytest.raises(UserError, match="not that tree"):
        store.load_frozen(reference | {"path": other["path"]}, tree)
    with pytest.raises(UserError, match="missing"):
        store.load_frozen(reference | {"path": "frozen/gone"}, tree)
    with pytest.raises(UserError, match="cannot be restored"):
        store.load_frozen(reference, {"a": tree["a"], "x": tree["a"]})
    # Neither frozen trees nor what is set aside is taken for a step.
    store.save(1, tree, {"frozen": reference})
    store.close()
    assert Checkpoints(tmp_path).steps() == [1]


WRITER = """
import sys
import jax.numpy as jnp
from checkpoints.store import Checkpoints
store, like = Checkpoints(sys.argv[1], keep=2), {"w": jnp.zeros(300_000), "step": jnp.int32(0)}
start = int(store.restore(like)[0]["step"]) if store.steps() else 0
for step in range(start + 1, start + 10_000):
    store.save(step, {"w": jnp.sin(jnp.arange(300_000.0) * step), "step": jnp.int32(step)}, {"step": step})
    print(step, flush=True)
"""


def test_kill_during_a_write_leaves_the_previous_checkpoint(tmp_path):
    draw = random.Random(0)
    reached = 0
    like = {"w": jnp.zeros(300_000), "step": jnp.int32(0)}
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        )
        assert writer.stdout is not None
        for _ in range(3):
            begun = int(writer.stdout.readline())
        time.sleep(draw.uniform(0.0, 0.12))
        writer.send_signal(signal.SIGKILL)
        last = [int(line) for line in writer.stdout.read().split()]
        writer.wait()
        lines: list[str] = []
        arrays, metadata = Checkpoints(tmp_path, on_broken=lines.append).restore(like)
        step = int(arrays["step"])
        assert lines == []
        assert metadata == {"step": step}
        assert max([begun, *last]) - 1 <= step <= max([begun, *last]) + 1
        assert step > reached
        np.testing.assert_array_equal(arrays["w"], jnp.sin(jnp.arange(300_000.0) * step))
        reached = step


def test_the_record_is_json_a_person_can_read(tmp_path):
    saved(tmp_path, 3)
    record = json.loads((tmp_path / "3" / "metadata" / "metadata").read_text())
    assert record["step"] == 3
    assert record["leaves"]["params/trunk/embed/tokens/table"]["shape"] == [64, 32]
