"""Ways to cut a run over devices, each one table of rules."""

from partitioning.axes import AXES
from partitioning.errors import UserError
from partitioning.rules import Rules, Table

# Rows are cut over all of these. Nothing else is cut over `slice`, so that only sums over rows, the gradients, cross it.
BATCH_AXES = ("slice", "data", "fsdp", "expert")


def table(**places: tuple[str, ...]) -> Table:
    """A whole table: the axes that are named go where it says, every other axis of the vocabulary is not sharded."""
    return dict.fromkeys(AXES, ()) | places


def data(slices: int = 1) -> Rules:
    """Data parallel: every device holds the whole model and a part of the rows.

    Args:
      slices: slices of a pod, or pods, between which the network is slow; each has devices of its own.
    """
    return Rules(mesh=_mesh("data", slice=slices), parameters=table(), activations=table(batch=BATCH_AXES))


def fsdp(slices: int = 1) -> Rules:
    """Fully sharded: parameters and optimizer state are cut along `embed`, rows along the same devices.

    Args:
      slices: as in `data`; each holds all parameters, cut over its own devices.
    """
    return _sharded(slice=slices)


def fsdp_tensor(tensor: int = 2, slices: int = 1) -> Rules:
    """Fully sharded, and heads, feed-forward and vocabulary cut over `tensor` devices.

    Args:
      tensor: devices that share one row's matrices.
      slices: as in `fsdp`.
    """
    return _sharded(tensor=tensor, slice=slices)


def fsdp_sequence(sequence: int = 2, tensor: int = 1, slices: int = 1) -> Rules:
    """Fully sharded, and rows cut along their length over `sequence` devices.

    Each device has the queries of its part of the row. For softmax attention it gathers the keys and values of all of it, for
    linear attention what each part does to a state; a row's states are never whole on one device. The length divides by
    `sequence`.

    Args:
      sequence: devices that share one row's tokens.
      tensor, slices: as in `fsdp_tensor`.

    Source: "Sequence Parallelism: Long Sequence Training from System Perspective", Li et al., 2021; gathered keys: "The
      Llama 3 Herd of Models", Grattafiori et al., 2024.
    Differs: parts are contiguous; Llama 3 gives each device two, one from either end, to even out a causal mask's work.
    """
    return _sharded(sequence=sequence, tensor=tensor, slice=slices)


def fsdp_expert(expert: int = 2, tensor: int = 1, sequence: int = 1, slices: int = 1) -> Rules:
    """Fully sharded, and experts shared out over `expert` devices, to which tokens travel and come back.

    Rows are cut over these devices too, so that each has tokens of its own; whatever is no expert lies on all of them. The
    other presets leave tokens where they are and gather the matrices of all experts, which sends less where experts are
    small beside the tokens of a device. The number of experts divides by `expert`.

    Args:
      expert: devices that share out the experts.
      tensor, sequence, slices: as in `fsdp_sequence`.

    Source: "GShard", Lepikhin et al., 2020.
    Differs: no token is dropped.
    """
    return _sharded(expert=expert, tensor=tensor, sequence=sequence, slice=slices)


def _sharded(**sizes: int) -> Rules:
    wide: dict[str, tuple[str, ...]] = dict.fromkeys(("heads", "mlp", "vocab"), ("tensor",))
    wide["expert"] = ("expert",)
    return Rules(
        mesh=_mesh("fsdp", **sizes),
        parameters=table(embed=("fsdp",), **wide),
        activations=table(batch=BATCH_AXES, length=("sequence",), **wide),
    )


def _mesh(rest: str, **sizes: int) -> dict[str, int]:
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} = {size}: expected a number of devices, 1 or more")
    # Devices that know of several slices fill `slice`; a size would be a demand.
    return {rest: -1} | {name: size for name, size in sizes.items() if name != "slice" or size > 1}
