"""The table of chips, and topologies that nobody sells."""

import pytest

from partitioning import Rules, UserError, make_mesh, topologies
from partitioning.chips import CHIPS, GIB, PODS, chip_of
from partitioning.presets import table
from partitioning.topologies import topology


@pytest.mark.parametrize("text", ["v5p", "v5p:8x8", "v5e:3x5", "v9:2x2", "8x8x8", ""])
def test_an_unknown_topology_is_refused_with_those_that_there_are(text):
    with pytest.raises(UserError, match=r"is unknown: .*v5e: 2x2, 2x4.*v6e: .*v5p: .*8x8x8"):
        topology(text)


def test_a_topology_knows_its_chips_and_the_larger_ones():
    place = topology("v5p:4x4x4", 2)
    assert (place.extents, place.pod.hbm, str(place)) == ((4, 4, 4), 95 * GIB, "v5p:4x4x4 x 2 slices")
    assert [one.shape for one in place.larger][:2] == ["4x4x8", "4x8x8"]
    assert {one.slices for one in place.larger} == {2}


def test_one_table_has_every_chip_once():
    """Of two kinds of which one is a part of the other, the longer comes first."""
    for i, chip in enumerate(CHIPS):
        assert chip_of(chip.kind) is chip, f"{chip.kind} is hidden by an earlier one"
        assert chip.kind not in [other.kind for other in CHIPS[:i]]
    assert {chip.pod.name for chip in CHIPS if chip.pod} == set(PODS)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(topologies, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'palmette\[tpu\]'"):
        topology("v5e:2x2").devices()


def test_an_axis_that_divides_nothing_is_refused():
    rules = Rules(mesh={"data": 4, "expert": 2}, parameters=table(), activations=table(batch=("data",)))
    with pytest.raises(UserError, match="mesh axis 'expert' of size 2 divides nothing"):
        rules.place()


class Chip:
    """A device of some slice."""

    platform = device_kind = "cpu"

    def __init__(self, slice_index):
        self.slice_index = slice_index


def test_only_the_slice_axis_goes_between_slices():
    devices = [Chip(i // 4) for i in range(8)]
    for shape in (None, {"fsdp": -1}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2, "slice": 2}):
        mesh = make_mesh(shape, devices)
        assert mesh.shape["slice"] == 2
        for i in range(2):
            assert {device.slice_index for device in mesh.devices[i].flat} == {i}
    with pytest.raises(UserError, match="'slice' has size 4, and the devices lie in 2 slices"):
        make_mesh({"slice": 4, "fsdp": 2}, devices)
    with pytest.raises(UserError, match="need 16 devices"):
        make_mesh({"fsdp": 8}, devices)
