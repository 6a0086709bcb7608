"""Each way to cut a run: where parameters and rows go, which devices are a slice, which hosts read the same rows."""

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from partitioning import Rules, UserError, data, fsdp, fsdp_expert, fsdp_sequence, fsdp_tensor, make_mesh
from partitioning.axes import MESH_AXES
from partitioning.presets import table
from partitioning.rules import Placement


@pytest.mark.parametrize(
    ("rules", "parameter", "activation"),
    [
        (data(slices=2), PartitionSpec(), PartitionSpec(("slice", "data"))),
        (fsdp(slices=2), PartitionSpec("fsdp"), PartitionSpec(("slice", "fsdp"))),
        (fsdp_tensor(2, slices=2), PartitionSpec("fsdp", "tensor"), PartitionSpec(("slice", "fsdp"), None, "tensor")),
        (fsdp_sequence(2), PartitionSpec("fsdp"), PartitionSpec("fsdp", "sequence")),
        (fsdp_sequence(2, tensor=2), PartitionSpec("fsdp", "tensor"), PartitionSpec("fsdp", "sequence", "tensor")),
    ],
)
def test_parameters_lie_whole_on_a_slice_and_rows_on_one(rules, parameter, activation):
    """Nothing but rows is cut over `slice`, nothing but lengths over `sequence`."""
    place = rules.place()
    assert place.parameter(("embed", "heads"), (8, 8), "w").spec == parameter
    spec = place.spec(("batch", "length", "heads"), (8, 8, 8), table="activations", what="q")
    assert spec == activation


def test_rows_and_experts_are_cut_over_the_same_devices():
    """Matrices of experts and their activations too; other parameters lie on all of these devices."""
    place = fsdp_expert(2, tensor=2).place()
    assert place.parameter(("expert", "embed", "mlp"), (8, 8, 8), "w").spec == PartitionSpec("expert", "fsdp", "tensor")
    assert place.parameter(("embed", "mlp"), (8, 8), "w").spec == PartitionSpec("fsdp", "tensor")
    assert place.rows((8, 8), "tokens").spec == PartitionSpec(("fsdp", "expert"))
    names = ("batch", "length", None)
    spec = fsdp_expert(2, sequence=2, slices=2).place().spec(names, (8, 8, 8), table="activations", what="x")
    assert spec == PartitionSpec(("slice", "expert"), "sequence")


def test_a_size_below_one_is_refused():
    with pytest.raises(UserError, match="sequence = 0: expected a number of devices"):
        fsdp_sequence(0)


@dataclass(frozen=True)
class Chip:
    """A device of some slice."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_a_slice_has_its_own_devices():
    """Devices that know their slice go by it, in whatever order they come; others in order."""
    assert [d.id for d in make_mesh({"slice": 2, "fsdp": -1}).devices[1].flat] == [4, 5, 6, 7]
    chips = [Chip(i, i % 2) for i in range(6)]
    for rules in (fsdp(), fsdp(slices=2)):
        mesh = make_mesh(rules.mesh, chips)
        assert [[d.id for d in part.flat] for part in mesh.devices] == [[0, 2, 4], [1, 3, 5]]
    with pytest.raises(UserError, match=r"'slice' has size 3, and the devices lie in 2 slices: use 2"):
        make_mesh(fsdp(slices=3).mesh, chips)


def shares(hosts, **sizes):
    """Each host's share on a mesh of eight devices."""
    shape = [sizes.get(name, 1) for name in MESH_AXES]
    devices = np.array([SimpleNamespace(process_index=i * hosts // 8) for i in range(8)]).reshape(shape)
    mesh = SimpleNamespace(devices=devices, shape=dict(zip(MESH_AXES, shape, strict=True)), axis_names=MESH_AXES)
    mesh.local_devices = devices.ravel()[: 8 // hosts]
    rules = Rules(mesh={"data": -1}, parameters=table(), activations=table(batch=("slice", "data", "fsdp")))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for host in range(hosts):
            patch.setattr(jax, "process_index", lambda h=host: h)
            found.append(Placement(rules, mesh).share)
    return found


@pytest.mark.parametrize(
    ("hosts", "sizes", "expected"),
    [
        (1, {"fsdp": 8}, [(0, 1)]),
        (2, {"fsdp": 4, "sequence": 2}, [(0, 2), (1, 2)]),
        (4, {"fsdp": 2, "sequence": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (2, {"sequence": 8}, [(0, 1), (0, 1)]),
        (2, {"fsdp": 2, "tensor": 4}, [(0, 2), (1, 2)]),
    ],
)
def test_hosts_that_share_rows_read_the_same(hosts, sizes, expected):
    """A row on devices of several hosts is read by each of them."""
    assert shares(hosts, **sizes) == expected


def test_hosts_that_share_some_rows_are_refused():
    """Three hosts of a mesh of two by four: the middle one holds rows of both others."""
    with pytest.raises(UserError, match="share rows unevenly"):
        shares(3, fsdp=2, sequence=4)
