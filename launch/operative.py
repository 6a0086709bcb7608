"""The gin text of a resolved configuration: every value that was used, defaults included, and nothing else."""

import inspect
import math
import pprint
from typing import Any

import gin

from launch.bindings import Bind, Bindings, MacroUse, Scope, Use
from launch.check import expected
from launch.names import Symbol
from launch.syntax import HEADER

TITLE = "# Every value of one run, as resolved. It runs again by `palmette train` with this file."
_WIDTH = 100


def text(bindings: Bindings, top: Symbol) -> str:
    """The configuration that rebuilds exactly what `bindings` built: imports, macros, one block a class and scope."""
    blocks: list[list[str]] = []
    named: set[str] = {top.name}
    macros: dict[str, Bind] = {}

    def note(value: Any) -> None:
        if isinstance(value, Use):
            named.add(value.symbol.name)
        elif isinstance(value, MacroUse) and value.name in bindings.macros:
            macros[value.name] = bindings.macros[value.name]
            note(macros[value.name].value)
        elif isinstance(value, dict):
            for key, item in value.items():
                note(key)
                note(item)
        elif isinstance(value, list | tuple):
            for item in value:
                note(item)

    for (scope, symbol), call in sorted(bindings.calls.items(), key=lambda item: _order(item[0], top)):
        values = {name: symbol.arguments[name].default for name in call.open if name in symbol.arguments}
        values = {n: v for n, v in values.items() if literal(v) and _fits(v, symbol, n)}
        values |= {name: bind.value for name, bind in call.used.items()}
        if values:
            named.add(symbol.name)
            order = [*(n for n in symbol.arguments if n in values), *(n for n in values if n not in symbol.arguments)]
            blocks.append([line("/".join((*scope, f"{symbol.name}.{n}")), values[n]) for n in order])
        for value in values.values():
            note(value)
    imports = [HEADER, *(f"import {m}" for m in sorted({name.rpartition(".")[0] for name in named}))]
    if macros:
        blocks.insert(0, [line(name, macros[name].value) for name in sorted(macros)])
    return "\n\n".join([TITLE, "\n".join(imports), *("\n".join(block) for block in blocks)]) + "\n"


def _order(key: tuple[Scope, Symbol], top: Symbol) -> tuple:
    scope, symbol = key
    return symbol is not top, symbol.name, scope


def _fits(value: Any, symbol: Symbol, name: str) -> bool:
    # A default that breaks its own annotation (`x: int = None`) works while it is left alone.
    return name not in symbol.hints or expected(value, symbol.hints[name]) is None


def literal(value: Any) -> bool:
    """Whether gin can write and read `value`."""
    if value is gin.REQUIRED or value is inspect.Parameter.empty:
        return False
    if isinstance(value, dict):
        return type(value) is dict and all(literal(k) and literal(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(literal(v) for v in value)
    if type(value) is float:
        return math.isfinite(value)
    return value is None or type(value) in (bool, int, str)


def line(name: str, value: Any) -> str:
    """`name = value`, a long container on lines of its own."""
    plain = f"{name} = {value!r}"
    if len(plain) <= _WIDTH or not isinstance(value, list | tuple | dict):
        return plain
    shown = pprint.pformat(value, width=_WIDTH - 4, sort_dicts=False)
    return f"{name} = \\\n" + "\n".join("    " + part for part in shown.split("\n"))
