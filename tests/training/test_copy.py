"""A run whose checkpoints are copied: the same run, which no single fault sets back by more than an interval."""

import shutil

import pytest
from google.cloud import storage
from running import devices, metrics, record, tiny

from launch import cli
from partitioning import UserError
from training import loop

EVERY = 2


def run(**changes):
    """Four steps and two checkpoints, or as it says."""
    return tiny("mlm", **({"steps": 4, "checkpoint_every": EVERY} | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happens to, and that copies nothing."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with devices(1):
        run().train(out)
    return out


def assert_as(whole, *places):
    """The last checkpoint of each place has the bits of that run."""
    for place in places:
        assert record(place, 4)["leaves"] == record(whole, 4)["leaves"]


def test_a_copy_changes_nothing(whole, tmp_path):
    out, copy = tmp_path / "run", tmp_path / "copy"
    with devices(1):
        run().train(out, copy=copy, operative="# as it was\n")
    assert_as(whole, out, copy)
    assert metrics(out) == metrics(whole)
    # What else is there is enough for a run's folder to be read.
    assert {path.name for path in copy.iterdir()} == {".in_use", "checkpoints", "config.gin"}
    assert (copy / "config.gin").read_text() == (out / "config.gin").read_text()


@pytest.mark.parametrize("lost", ["the run's newest", "the copy's newest", "the run's folder", "the copy's folder"])
def test_whatever_is_lost_of_one_the_run_goes_on_from_the_newest(whole, tmp_path, lost, capsys):
    out, copy = tmp_path / "run", tmp_path / "copy"
    place = out if "run" in lost else copy
    with devices(1):
        run(steps=EVERY).train(out, copy=copy)
        shutil.rmtree(place / "checkpoints" / str(EVERY) if "newest" in lost else place)
        capsys.readouterr()
        run().train(out, copy=copy)
    assert f"goes on from the checkpoint of step {EVERY}" in capsys.readouterr().out
    assert_as(whole, out, copy)


def test_steps_wait_until_both_are_written(tmp_path, monkeypatch):
    out, copy = tmp_path / "run", tmp_path / "copy"
    seen, beat = [], loop.Hosts.beat

    def beats(hosts, done):
        seen.append((done, *((place / "checkpoints" / str(done // EVERY * EVERY)).exists() for place in (out, copy))))
        beat(hosts, done)

    monkeypatch.setattr(loop.Hosts, "beat", beats)
    with devices(1):
        run(checkpoint_every=EVERY, log_every=1).train(out, copy=copy)
    # What is read back is the step before: that of a save is read before it is saved.
    assert [row for row in seen if row[0] % EVERY] == [(1, False, False), (3, True, True)]


def test_the_copy_may_be_in_a_bucket(whole, bucket, tmp_path):
    out, copy = tmp_path / "run", f"{bucket}/copies/run"
    with devices(1):
        run(steps=EVERY).train(out, copy=copy, operative="# as it was\n")
        shutil.rmtree(out)
        run().train(out, copy=copy)
    assert_as(whole, out)
    found = {blob.name for blob in storage.Client().list_blobs("tests", prefix="copies/run/")}
    assert "copies/run/config.gin" in found
    assert "copies/run/checkpoints/4/metadata/metadata" in found
    assert "copies/run/.in_use" not in found


def test_copies_that_cannot_be(tmp_path, capsys):
    out = tmp_path / "run"
    with devices(1), pytest.raises(UserError, match="is the run's own: use one on another disk"):
        run().train(out, copy=tmp_path / "." / "run")
    assert not out.exists()
    (tmp_path / "file").write_text("mine")
    config = tmp_path / "a.gin"
    config.write_text("")
    for place, words in (
        (
            tmp_path / "file" / "x",
            f"--copy {tmp_path / 'file' / 'x'}: {tmp_path / 'file'} is a file, expected a folder",
        ),
        ("s3://bucket/x", "expected a local folder or gs://BUCKET/FOLDER"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["train", str(config), "--out", str(out), "--copy", str(place)])
        assert end.value.code == 2
        assert words in capsys.readouterr().err
    assert not out.exists()
