"""Where it runs: the mesh, the axis vocabulary and the rules between them.

The names that need jax are imported when they are first asked for, so that the command answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from partitioning.errors import UserError

if TYPE_CHECKING:
    from partitioning.mesh import make_mesh
    from partitioning.presets import data, fsdp, fsdp_expert, fsdp_sequence, fsdp_tensor
    from partitioning.rules import (
        Placement,
        Rules,
        along,
        constrain,
        cuts,
        devices,
        is_cut,
        on_each_device,
        platform,
        ways,
        whole,
    )

_HOMES = {
    "make_mesh": "partitioning.mesh",
    **dict.fromkeys(
        (
            "Placement",
            "Rules",
            "along",
            "constrain",
            "cuts",
            "devices",
            "is_cut",
            "on_each_device",
            "platform",
            "ways",
            "whole",
        ),
        "partitioning.rules",
    ),
    **dict.fromkeys(("data", "fsdp", "fsdp_expert", "fsdp_sequence", "fsdp_tensor"), "partitioning.presets"),
}

__all__ = [
    "Placement",
    "Rules",
    "UserError",
    "along",
    "constrain",
    "cuts",
    "data",
    "devices",
    "fsdp",
    "fsdp_expert",
    "fsdp_sequence",
    "fsdp_tensor",
    "is_cut",
    "make_mesh",
    "on_each_device",
    "platform",
    "ways",
    "whole",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'partitioning' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
