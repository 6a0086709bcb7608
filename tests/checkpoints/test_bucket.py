"""Checkpoints in a bucket: the same code, against a stand-in for Google's object store that keeps objects in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoints import folder as module
from checkpoints.store import Checkpoints
from data.cache import store as objects
from partitioning.errors import UserError

LAST = "commit_success.txt"


def tree(step):
    draw = np.random.default_rng(step)
    return {
        "w": jnp.asarray(draw.standard_normal((64, 16)), jnp.float32),
        "half": jnp.asarray(draw.standard_normal(8), jnp.bfloat16),
        "key": jax.random.key(step),
        "empty": jnp.zeros((0, 2)),
    }


def like(sharding=None):
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding)
    return jax.tree.map(place, tree(0))


def same(one, other):
    bits = lambda leaf: np.asarray(jax.random.key_data(leaf) if leaf.dtype == jax.random.key(0).dtype else leaf)
    return jax.tree.all(jax.tree.map(lambda a, b: bool((bits(a) == bits(b)).all()), one, other))


def keys(folder):
    return sorted(key.decode() for key in objects(folder).list().result())


@pytest.fixture
def folder(bucket, request):
    """A folder of its own in the bucket."""
    return f"{bucket}/{request.node.name}/checkpoints"


def saved(folder, *steps, **options):
    with Checkpoints(folder, **options) as store:
        for step in steps:
            store.save(step, tree(step), {"figures": {"loss": abs(step - 20)}})
    return Checkpoints(folder, **options)


def test_everything_comes_back_on_another_mesh_and_the_newest_stay(folder):
    store = saved(folder, 10, 20, 30, 40, keep=2, best=("loss", "min"))
    assert store.steps() == [20, 30, 40]
    assert {key.split("/")[0] for key in keys(folder)} == {"20", "30", "40"}
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    whole, metadata = store.restore(like(NamedSharding(mesh, P())))
    assert same(whole, tree(40))
    assert metadata == {"figures": {"loss": 20}}
    cut = like() | {"w": jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))}
    assert same(store.restore(cut, step=20)[0], tree(20))
    for step in store.steps():
        store.verify(step)


def test_a_write_that_was_killed_is_no_checkpoint_and_is_written_over(folder):
    """A bucket renames nothing: a step's folder is there before its last object is."""
    saved(folder, 10, 20)
    objects(f"{folder}/20").write(LAST, None).result()
    assert len(keys(f"{folder}/20")) > 3
    store = Checkpoints(folder)
    assert store.steps() == [10]
    assert same(store.restore(like())[0], tree(10))
    with store:
        store.save(15, tree(15), {})
    assert {key.split("/")[0] for key in keys(folder)} == {"10", "15"}
    objects(f"{folder}/15").write(LAST, None).result()
    with Checkpoints(folder) as again:
        again.restore(like())
        again.save(15, tree(21), {})
    assert Checkpoints(folder).steps() == [10, 15]
    assert same(Checkpoints(folder).restore(like())[0], tree(21))


def test_a_damaged_object_is_found_and_passed_over(folder):
    saved(folder, 10, 20)
    arrays = objects(f"{folder}/20/arrays")
    name = max(
        (key for key in keys(f"{folder}/20/arrays") if "d/" in key), key=lambda k: len(arrays.read(k).result().value)
    )
    whole = bytearray(arrays.read(name).result().value)
    whole[len(whole) // 2] ^= 1
    arrays.write(name, bytes(whole)).result()
    with pytest.raises(UserError, match=f"{folder}/20: (its arrays cannot be read|1 leaves are not as they were)"):
        Checkpoints(folder).verify(20)
    lines = []
    store = Checkpoints(folder, on_broken=lines.append)
    assert same(store.restore(like())[0], tree(10))
    assert len(lines) == 1
    # Going on from 10 moves what is newer aside, which a bucket does object by object.
    with store:
        store.save(15, tree(15), {})
    assert Checkpoints(folder).steps() == [10, 15]
    assert {key.split("-")[0] for key in keys(f"{folder}/aside")} == {"20", "README"}


def test_a_frozen_tree_is_written_once_and_again_where_a_write_was_killed(folder):
    store, frozen = Checkpoints(folder), {"a": jnp.arange(6.0)}
    reference = store.save_frozen("teacher", frozen)
    before = keys(folder)
    assert store.save_frozen("teacher", frozen) == reference
    assert keys(folder) == before
    objects(f"{folder}/{reference['path']}").write(LAST, None).result()
    assert store.save_frozen("teacher", frozen) == reference
    # What is no step's is not taken for an unfinished one.
    with store:
        store.save(1, frozen, {"frozen": {"teacher": reference}})
    Checkpoints(folder).verify(1)
    assert (store.load_frozen(reference, frozen)["a"] == frozen["a"]).all()


def test_what_cannot_hold_checkpoints_is_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"s3://x/y: expected a local folder or gs://"):
        Checkpoints("s3://x/y")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gcsfs is not installed: pip install 'palmette\[gcs\]'"):
        Checkpoints("gs://x/y")
