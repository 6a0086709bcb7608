"""A run on several hosts: real processes that talk over loopback, each with its share of the batch and of the devices."""

from __future__ import annotations

import numpy as np
import pytest
from google.cloud import storage
from running import assert_same_end, killed_after, metrics, on_hosts, record

from checkpoints.folder import place


def train(out, hosts):
    """Trains into `out`, or goes on with it, on so many hosts."""
    on_hosts("host.py", out, hosts)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were never stopped, by hosts."""
    folder = tmp_path_factory.mktemp("hosts")
    for hosts in (1, 2):
        train(folder / str(hosts), hosts)
    return folder


def same_losses(one, other):
    """Every step's loss and gradient norm, to float32's rounding."""
    one, other = metrics(one), metrics(other)
    assert one.keys() == other.keys()
    for step, row in one.items():
        for name in ("loss", "mlm", "gradient_norm"):
            np.testing.assert_allclose(other[step][name], row[name], rtol=2e-5, err_msg=f"{name} of step {step}")


def test_two_hosts_are_one(whole):
    """The same batches in the same order: one host's losses."""
    same_losses(whole / "1", whole / "2")


# On two hosts again: launch/test_hosts.py has it for runs that are killed while they run.
@pytest.mark.parametrize(("before", "after"), [pytest.param(2, 2, marks=pytest.mark.long), (2, 1), (1, 2)])
def test_killed_and_resumed_on_any_number_of_hosts(whole, before, after, tmp_path):
    """On as many hosts bit for bit, on another number the same run."""
    out = tmp_path / "killed"
    killed_after(4, whole / str(before), out)
    train(out, after)
    if before == after:
        assert_same_end(whole / str(before), out, 6)
    same_losses(whole / str(before), out)
    assert record(out, 6)["leaves"].keys() == record(whole / str(before), 6)["leaves"].keys()


@pytest.mark.long
def test_two_hosts_write_to_a_bucket_and_go_on_there(whole, bucket):
    """Bit for bit what they write to a shared folder; from the checkpoint before, as after a kill, the same again."""
    out = f"{bucket}/two_hosts"
    train(out, 2)
    assert_same_end(whole / "2", place(out), 6)
    home = storage.Client().bucket("tests")
    last = [blob for blob in home.list_blobs(prefix="two_hosts/") if blob.name.startswith("two_hosts/checkpoints/6/")]
    assert (
        len({blob.name for blob in last if "ocdbt.process_" in blob.name and blob.name.endswith("manifest.ocdbt")}) == 2
    )
    # The object that Orbax writes last.
    home.blob("two_hosts/checkpoints/6/commit_success.txt").delete()
    train(out, 2)
    assert_same_end(whole / "2", place(out), 6)
