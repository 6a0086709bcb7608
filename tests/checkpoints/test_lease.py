"""A run's folder in a bucket has one writer at a time; a dead one is found out, and one that was cut off finds out."""

import time

import pytest
from google.api_core.exceptions import PreconditionFailed
from google.cloud import storage

from checkpoints import lease as module
from checkpoints.lease import Lease
from partitioning import UserError


@pytest.fixture
def take(bucket, request, monkeypatch):
    """Takes the lease of this test's folder; what was said meanwhile is noted."""
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    monkeypatch.setattr(module, "SILENT_S", 0.8)
    said = []
    home = storage.Client().bucket("tests")
    name = f"{request.node.name}/.in_use"
    made = []

    def taken():
        made.append(Lease(home, name, f"{bucket}/{request.node.name}", said.append))
        return made[-1]

    taken.said, taken.blob = said, lambda: home.get_blob(name)
    yield taken
    for one in made:
        dies(one)


def dies(lease):
    """As a process does: it says nothing more, and lets nothing go."""
    lease._over.set()
    lease._thread.join()


def test_a_living_holder_keeps_others_out_and_lets_go(take):
    first = take()
    with pytest.raises(UserError, match=r"in use by process \d+ on .* since 20.*use another folder"):
        take()
    assert "waits" in take.said[0]
    first.check()
    first.release()
    assert take.blob() is None
    take().check()


def test_a_dead_holder_s_folder_is_taken_after_a_silence_and_it_finds_out(take):
    first = take()
    dies(first)
    begin = time.monotonic()
    second = take()
    assert time.monotonic() - begin >= module.SILENT_S
    second.check()
    with pytest.raises(UserError, match="cut off from the bucket for so long that another one took the folder over"):
        first.check()
    # It leaves the other's alone.
    first.release()
    second.check()


def test_a_folder_that_is_let_go_meanwhile_is_taken_at_once(take, monkeypatch):
    first = take()
    real, calls = time.sleep, []

    def sleep(seconds):
        if not calls:
            first.release()
        calls.append(seconds)
        real(seconds)

    monkeypatch.setattr(module.time, "sleep", sleep)
    take().check()
    assert len(calls) == 1


def test_a_write_whose_answer_was_lost_is_our_own(take, monkeypatch):
    """The client tries again, and the bucket says that the object is another than it was."""
    first = take()
    dies(first)
    whole = storage.Blob.upload_from_string

    def lost(self, text, **options):
        whole(self, text, **options)
        raise PreconditionFailed("the first try was written")

    with monkeypatch.context() as patch:
        patch.setattr(storage.Blob, "upload_from_string", lost)
        first.check()
    first.check()
