"""A checkpoint in two places: whatever happens to one of them, the newest comes back."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.copied import Copied
from checkpoints.faults import Background
from checkpoints.store import Checkpoints
from partitioning.errors import UserError

PLACES = ("run", "copy")


def arrays(seed):
    """Of which a checkpoint is made."""
    draw = np.random.default_rng(seed)
    return {"w": jnp.asarray(draw.standard_normal((300, 40)), jnp.float32), "step": seed}


def opened(folder, said=None, **options):
    """The two places, and what they say."""
    tell = (said if said is not None else []).append
    return Copied(*(Checkpoints(folder / name, on_broken=tell, **options) for name in PLACES))


def written(folder, *steps):
    """Saves of these steps."""
    with opened(folder) as store:
        for step in steps:
            assert store.save(step, arrays(step), {"log": step})


def largest(folder):
    """The file with most of a checkpoint."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(folder):
    """Cuts a file short."""
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder):
    """Flips a bit in the middle of the values."""
    path = largest(folder)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)


def no_record(folder):
    """Takes its record away."""
    (folder / "metadata" / "metadata").unlink()


def restored(store):
    """The step that comes back, with its bits."""
    found, metadata = store.restore(jax.eval_shape(lambda: arrays(0)))
    step = metadata["log"]
    np.testing.assert_array_equal(found["w"], arrays(step)["w"])
    return step


def test_a_save_is_over_when_both_are_written(tmp_path):
    with opened(tmp_path) as store:
        for step in (1, 2):
            store.save(step, arrays(step), {"log": step})
            assert [Checkpoints(tmp_path / name).steps()[-1] for name in PLACES] == [step, step]
        assert not store.save(2, arrays(2), {"log": 2})
    for name in PLACES:
        Checkpoints(tmp_path / name).verify(2)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("harm", [cut, flip, no_record, shutil.rmtree])
def test_a_harmed_checkpoint_costs_nothing_and_is_written_anew(tmp_path, harm, place):
    written(tmp_path, 1, 2)
    harm(tmp_path / place / "2")
    said = []
    with opened(tmp_path, said) as store:
        assert restored(store) == 2
        if place == "copy":
            assert said == []
        else:
            assert said[-1] == f"checkpoint 2 is read from its copy, {tmp_path / 'copy' / '2'}"
            assert len(said) == (1 if harm is shutil.rmtree else 2)
        store.save(3, arrays(3), {"log": 3})
    assert opened(tmp_path).steps() == [1, 2, 3]
    for name in PLACES:
        Checkpoints(tmp_path / name).verify(3)
    # What was found broken is out of the way, and what was not read stays.
    if place == "run":
        assert Checkpoints(tmp_path / "run").steps() == [1, 3]


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_is_gone(tmp_path, place):
    written(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / place)
    with opened(tmp_path) as store:
        assert restored(store) == 2
        store.save(3, arrays(3), {"log": 3})
    assert Checkpoints(tmp_path / place).steps() == [3]


def test_both_harmed_is_an_interval_and_all_harmed_a_line(tmp_path):
    written(tmp_path, 1, 2)
    for name in PLACES:
        cut(tmp_path / name / "2")
    said = []
    assert restored(opened(tmp_path, said)) == 1
    assert [line.partition(" is ")[0] for line in said] == [f"checkpoint {tmp_path / name / '2'}" for name in PLACES]
    for name in PLACES:
        no_record(tmp_path / name / "1")
    with pytest.raises(
        UserError, match=r"no complete checkpoint in .*run and .*copy: .*/2: .*/1: its metadata is missing"
    ):
        restored(opened(tmp_path))


def test_what_a_killed_save_left_in_one_place_alone(tmp_path):
    """The newest counts wherever it is; what the run does not go on from is moved aside in both."""
    written(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "copy" / "2")
    assert restored(opened(tmp_path)) == 2
    cut(tmp_path / "run" / "2")
    with opened(tmp_path) as store:
        assert restored(store) == 1
        store.save(2, arrays(7), {"log": 7})
    assert restored(opened(tmp_path)) == 7
    assert len(list((tmp_path / "run" / "aside").glob("2-*"))) == 1


def test_a_frozen_tree_is_read_from_where_it_is_whole(tmp_path):
    tree = {"a": jnp.arange(600.0).reshape(20, 30)}
    said = []
    store = opened(tmp_path, said)
    reference = store.save_frozen("teacher", tree)
    assert said == []
    flip(tmp_path / "run" / reference["path"])
    np.testing.assert_array_equal(store.load_frozen(reference, tree)["a"], tree["a"])
    assert len(said) == 1
    shutil.rmtree(tmp_path / "copy" / reference["path"])
    with pytest.raises(UserError, match=r"copy.* is missing"):
        store.load_frozen(reference, tree)


def test_both_in_one_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="is the run's own: use one on another disk"):
        Copied(Checkpoints(tmp_path), Checkpoints(tmp_path))


@pytest.mark.parametrize("failed", PLACES)
def test_a_write_that_fails_is_heard_by_those_who_wait_for_it(tmp_path, failed):
    """Whoever listens first: of two places that are open at once, the one whose folder it is."""
    heard = {name: Background(tmp_path / name) for name in PLACES}
    error = OSError("File too large")
    record = logging.LogRecord(
        "absl",
        logging.ERROR,
        "orbax/checkpoint/_src/checkpointers/async_checkpointer.py",
        1,
        f"Failed to run 2 Handler Commit operations, directory: {tmp_path / failed / '4.orbax-checkpoint-tmp'}",
        None,
        (OSError, error, None),
    )
    try:
        assert not logging.getLogger("absl").filter(record)
        assert {name: one.error for name, one in heard.items()} == dict.fromkeys(PLACES) | {failed: error}
    finally:
        for one in heard.values():
            one.close()
