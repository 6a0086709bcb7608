"""Rules never silently do nothing and never silently resolve a conflict."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from partitioning import Rules, UserError, constrain, data, fsdp, fsdp_tensor, make_mesh
from partitioning.axes import AXES, MESH_AXES
from partitioning.presets import table


def test_a_mesh_has_every_axis():
    """Axes that are not named have size 1, and -1 takes the devices that are left."""
    mesh = make_mesh({"fsdp": -1, "tensor": 2})
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {**dict.fromkeys(MESH_AXES, 1), "fsdp": 4, "tensor": 2}
    assert make_mesh().shape["data"] == 8


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"date": 8}, "'date' is unknown: use one of slice, data, fsdp"),
        ({"data": 0}, "size 0"),
        ({"data": -1, "fsdp": -1}, "only one may take"),
        ({"data": 3, "fsdp": -1}, "8 devices cannot be divided"),
        ({"data": 3}, "need 3 devices, and there are 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(shape, says):
    """Each message says what was asked for and what there is."""
    with pytest.raises(UserError, match=says):
        make_mesh(shape)


def test_specs_of_the_presets():
    """The same leaf under the three presets."""
    names, shape = ("layers", "embed", "heads", "kv"), (3, 16, 4, 8)
    spec = lambda rules: rules.place().parameter(names, shape, "w").spec
    assert spec(data()) == PartitionSpec()
    assert spec(fsdp()) == PartitionSpec(None, "fsdp")
    assert spec(fsdp_tensor(2)) == PartitionSpec(None, "fsdp", "tensor")
    assert fsdp_tensor(2).place().rows((8, 5), "tokens").spec == PartitionSpec("fsdp")


@pytest.mark.parametrize(
    ("names", "shape", "says"),
    [
        (("embed", "embed"), (8, 8), "axes 'embed' and 'embed' both go to mesh axis 'fsdp'"),
        (("embed",), (12,), "size 12 does not divide over fsdp = 8 devices: use a multiple of 8"),
        (("embed",), (8, 8), "give one name, or None, for each dimension"),
        (("width",), (8,), "no rule for the axis 'width'"),
    ],
)
def test_a_leaf_that_does_not_fit_is_refused(names, shape, says):
    """Conflicts, uneven divisions and unknown names raise and name the leaf."""
    with pytest.raises(UserError, match=says) as raised:
        fsdp().place().parameter(names, shape, "trunk/w")
    assert "trunk/w" in str(raised.value)


def test_an_axis_without_a_rule_is_refused():
    """'Not sharded' has to be said."""
    rules = replace(data(), parameters={name: () for name in AXES if name != "mlp"})
    with pytest.raises(UserError, match=r"no rule for the axis 'mlp': add it to rules\.parameters"):
        rules.place().parameter(("mlp",), (8,), "w")


@pytest.mark.parametrize("bad", [{"width": ("fsdp",)}, {"embed": ("fdsp",)}])
def test_rules_over_names_that_do_not_exist_are_refused(bad):
    """A mistyped axis is found when the rules are made."""
    with pytest.raises(UserError, match="no such"):
        Rules(mesh={"data": -1}, parameters=table(), activations=bad)


def test_constraints_without_rules_are_refused_under_a_mesh():
    """Without a mesh there is nothing to place; with one and no rules the constraint would do nothing."""
    x = jnp.ones((8, 4))
    assert constrain(x, "batch", "embed") is x
    mesh = make_mesh()
    with jax.set_mesh(mesh), pytest.raises(UserError, match="no partition rules are"):
        constrain(x, "batch", "embed")
    with fsdp().place().scope():
        assert constrain(x, "batch", "embed").sharding.spec == PartitionSpec("fsdp")


def test_explain_counts_the_bytes_of_a_device():
    """A stacked float32 leaf over four devices."""
    rows = fsdp_tensor(2).place().explain({"w": ((2, 16, 8), np.float32, ("layers", "embed", "mlp"))})
    assert rows == [
        ("w", "(2, 16, 8)", "('layers', 'embed', 'mlp')", str(PartitionSpec(None, "fsdp", "tensor")), 2 * 4 * 4 * 4)
    ]
