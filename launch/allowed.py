"""What a gin file may reach: our packages, optax and the number formats of jax.numpy.

A gin file calls what it references, so a file from a stranger could otherwise run anything. An import is judged by
its name before it happens, and a symbol by the module that defines it, however it was reached: `models.trunk.os.system`
is defined in `posix`, and stays out.
"""

import dataclasses
import inspect
from typing import Any

from launch import syntax
from launch.ours import OURS
from partitioning.errors import UserError

LIBRARIES = ("optax",)
FORMATS = (
    *("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The allow-list of one run: what is built in, and `extra`, the modules named by `--allow-import`."""

    extra: tuple[str, ...] = ()

    def module(self, name: str) -> bool:
        """Whether the module `name` may be imported and its symbols called."""
        return any(name == ok or name.startswith(ok + ".") for ok in (*OURS, *LIBRARIES, *self.extra))

    def check_import(self, statement: syntax.Import) -> None:
        """Raise UserError where the statement imports what it may not."""
        # jax.numpy is importable for its formats' sake; everything else in it is turned away as a symbol.
        if not self.module(statement.module) and statement.module not in ("jax", "jax.numpy"):
            raise UserError(
                f"{statement.where}: imports {statement.module}, which a configuration may not: "
                f"pass --allow-import {statement.module} if you trust this file"
            )

    def check_symbol(self, name: str, target: Any, where: object) -> None:
        """Raise UserError where `target`, reached as `name`, is defined where a configuration may not reach."""
        if is_format(target):
            return
        home = getattr(target, "__module__", None) or "builtins"
        if not self.module(home):
            raise UserError(
                f"{where}: {name} is defined in {home}, which a configuration may not call: "
                f"pass --allow-import {home.split('.')[0]} if you trust this file"
            )


def is_format(target: Any) -> bool:
    """Whether `target` is a number format that a configuration may name, such as jax.numpy.bfloat16."""
    if getattr(target, "__module__", None) != "jax.numpy":
        return False
    import jax.numpy

    return any(target is getattr(jax.numpy, name, None) for name in FORMATS)


def is_configurable(target: Any) -> bool:
    """Whether `target` can be bound and called: a class, a function, or a function that something wrapped."""
    return inspect.isclass(target) or inspect.isroutine(target) or (callable(target) and hasattr(target, "__wrapped__"))
