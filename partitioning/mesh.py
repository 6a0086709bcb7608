"""One function builds every mesh."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh

from partitioning.axes import MESH_AXES
from partitioning.errors import UserError


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds a mesh that has every mesh axis, those not named in `shape` with size 1.

    Args:
      shape: sizes by mesh axis, such as `{"fsdp": -1, "tensor": 2}`; one size may be -1, 'all that is left'.
        None puts every device on `data`. Devices of several slices fill `slice`, whether it is named or not.
      devices: the devices to use; all of them by default. Those of one slice of TPUs stay together along `slice`; devices
        that know of no slices are shared out in order.

    Returns:
      A mesh with axes `MESH_AXES` in that order, all of type Auto, so that every partition rule names axes that exist.

    Raises:
      UserError: an unknown axis, a size that is not positive, sizes whose product is not the number of devices, or a size of
        `slice` that is not the number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = dict(shape) if shape else {"data": -1}
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and shape.setdefault("slice", slices) not in (slices, -1):
        raise UserError(
            f"mesh axis 'slice' has size {shape['slice']}, and the devices lie in {slices} slices: use {slices}"
        )
    for name, size in shape.items():
        if name not in MESH_AXES:
            raise UserError(f"mesh axis {name!r} is unknown: use one of {', '.join(MESH_AXES)}")
        if size < 1 and size != -1:
            raise UserError(f"mesh axis {name!r} has size {size}: use a positive size, or -1 for all devices left")
    free = [name for name, size in shape.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh axes {' and '.join(free)} both have size -1: only one may take the devices left")
    fixed = int(np.prod([size for size in shape.values() if size != -1]))
    if free:
        if len(devices) % fixed:
            raise UserError(f"{len(devices)} devices cannot be divided by the mesh sizes {shape}: change a size")
        shape[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise UserError(
            f"mesh sizes {shape} need {fixed} devices, and there are {len(devices)}: change a size, or use -1"
        )
    sizes = [shape.get(name, 1) for name in MESH_AXES]
    if slices > 1:
        if shape["slice"] != slices:
            raise UserError(f"mesh sizes {shape} spread other axes over {slices} slices: only `slice` may cross them")
        inside = [1 if name == "slice" else size for name, size in zip(MESH_AXES, sizes, strict=True)]
        across = [slices if name == "slice" else 1 for name in MESH_AXES]
        grid = create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))
