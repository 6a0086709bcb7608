"""From gin files and overrides to one built, checked configuration."""

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from launch import operative, syntax
from launch.allowed import Allowed
from launch.bindings import REQUIRED, Bind, Bindings, MacroUse, Scope, Use
from launch.check import describe
from launch.names import Names, Symbol, check_argument, nearest
from partitioning.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shown:
    """One binding for a listing: its full name, its value as gin writes it, where it stands, whether it was used."""

    name: str
    value: str
    where: str
    consumed: bool


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One argument that a file or an override may bind: its full name, annotation in words and default."""

    name: str
    kind: str
    default: str


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A resolved configuration.

    Attributes:
        value: the built top object.
        operative: gin text that builds it again exactly, defaults spelled out.
        bindings: every binding in force.
        available: every argument of every class in use.
    """

    value: Any
    operative: str
    bindings: tuple[Shown, ...]
    available: tuple[Parameter, ...]


def load(
    paths: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    top: str = "training.Run",
    allow_import: Sequence[str] = (),
    exercise: Callable[[Any], object] | None = None,
) -> Resolved:
    """Resolve gin files and overrides, parsed together, into the object that they describe.

    Everything is read and judged before anything is imported, imported and judged before anything is called, and
    checked against annotations and ranges as it is built.

    Args:
        paths: gin files; of two that bind the same name the later one wins.
        overrides: bindings such as `RandomTokens.rate = 0.4`; a name may be any end of the full one that is unique.
        top: the class to build.
        allow_import: further modules that the files may import and call.
        exercise: called with the built object; it should build, abstractly, whatever the object builds when it runs.
            A binding that nothing used by then is refused. Without it, unused bindings pass.

    Errors: UserError, one line, for everything that is wrong with the files or overrides.
    """
    allowed = Allowed(tuple(allow_import))
    sources = [syntax.read(str(path)) for path in paths]
    extra = [syntax.override(text) for text in overrides]
    for source in sources:
        _judge_imports(source, allowed)
    names = Names(allowed)
    found: list[Bind] = []
    for source in sources:
        found += _resolve(source, names)
    top_symbol = names.from_full(top, sources[0].file if sources else top)
    bindings = Bindings(names.of_class)
    bindings.source = ", ".join(source.file for source in sources)
    for bind in found:
        bindings.add(bind)
    for bind in _resolve_overrides(extra, names, bindings):
        bindings.add(bind)
    _check_macros(bindings)
    value = bindings.evaluate(Use((), top_symbol, call=True), top)
    if exercise is not None:
        exercise(value)
        _check_consumed(bindings)
    return Resolved(value, operative.text(bindings, top_symbol), _shown(bindings), _available(bindings))


def _judge_imports(source: syntax.Source, allowed: Allowed) -> None:
    for statement in source.statements:
        if isinstance(statement, syntax.Source):
            _judge_imports(statement, allowed)
        elif isinstance(statement, syntax.Import):
            allowed.check_import(statement)


def _resolve(source: syntax.Source, names: Names) -> list[Bind]:
    """A file's bindings with its names resolved; as in gin, a file sees its own imports only."""
    table: dict[str, ModuleType] = {}
    found: list[Bind] = []
    for statement in source.statements:
        if isinstance(statement, syntax.Source):
            found += _resolve(statement, names)
        elif isinstance(statement, syntax.Import):
            table[statement.bound] = names.bring(statement)
        else:

            def resolve(name: str, where: syntax.Where = statement.where) -> Symbol:
                symbol = names.resolve(name, table, where)
                assert symbol is not None
                return symbol

            found.append(_bind(statement, resolve))
    return found


def _resolve_overrides(extra: Sequence[syntax.Binding], names: Names, bindings: Bindings) -> list[Bind]:
    found: dict[str, Bind] = {}
    for statement in extra:

        def resolve(name: str, where: syntax.Where = statement.where) -> Symbol:
            return names.short(name, where)

        if not statement.argument and "/".join((*statement.scope, statement.name)) not in bindings.macros:
            raise _bare(statement, bindings, names)
        bind = _bind(statement, resolve)
        if bind.name in found:
            raise UserError(f"{bind.where}: {found[bind.name].where} binds {bind.name} already: keep one")
        found[bind.name] = bind
    return list(found.values())


def _bare(statement: syntax.Binding, bindings: Bindings, names: Names) -> UserError:
    """For `rate = 0.4`, which says of what class: the arguments of that name."""
    options = {a: f"{s.name}.{a}" for s in names.mentioned.values() for a in s.arguments}
    same = [f"{s.name}.{statement.name}" for s in names.mentioned.values() if statement.name in s.arguments]
    options |= {macro: macro for macro in bindings.macros}
    close = f"; nearest: {', '.join(sorted(same))}" if same else nearest(statement.name, options)
    return UserError(f"{statement.where}: expected `Class.{statement.name} = ...`{close}")


def _bind(statement: syntax.Binding, resolve: Callable[[str], Symbol]) -> Bind:
    value = _resolve_value(statement.value, resolve)
    if not statement.argument:
        return Bind(statement.scope, None, statement.name, value, statement.where)
    if statement.name.split(".")[0] == "gin":
        raise UserError(f"{statement.where}: {statement.name} is gin's own, and configurations here do without it")
    symbol = resolve(statement.name)
    check_argument(symbol, statement.argument, statement.where)
    return Bind(statement.scope, symbol, statement.argument, value, statement.where)


def _resolve_value(value: Any, resolve: Callable[[str], Symbol]) -> Any:
    if isinstance(value, syntax.Reference):
        return Use(value.scope, resolve(value.name), value.call)
    if isinstance(value, syntax.Macro):
        return MacroUse(value.name)
    if isinstance(value, dict):
        return {_resolve_value(k, resolve): _resolve_value(v, resolve) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_resolve_value(v, resolve) for v in value)
    return value


def _parts(value: Any) -> list[Any]:
    """The references and macros within a value."""
    if isinstance(value, dict):
        return [part for item in value.items() for part in _parts(item)]
    if isinstance(value, list | tuple):
        return [part for item in value for part in _parts(item)]
    return [value] if isinstance(value, Use | MacroUse) else []


def _check_macros(bindings: Bindings) -> None:
    for bind in bindings.all():
        for part in _parts(bind.value):
            if isinstance(part, MacroUse) and part != REQUIRED and part.name not in bindings.macros:
                close = nearest(part.name, list(bindings.macros))
                raise UserError(f"{bind.where}: nothing defines %{part.name}: expected `{part.name} = ...`{close}")


def _check_consumed(bindings: Bindings) -> None:
    idle = [bind for bind in bindings.all() if not bind.consumed]
    if not idle:
        return
    scopes = {scope for scope, _ in bindings.calls if scope}
    told = "; ".join(f"{bind.where}: {bind.name} {_why(bind, bindings, scopes)}" for bind in idle[:5])
    more = f"; and {len(idle) - 5} more" if len(idle) > 5 else ""
    raise UserError(f"{told}{more}")


def _why(bind: Bind, bindings: Bindings, scopes: set[Scope]) -> str:
    if bind.symbol is None:
        options = {a: f"{s.name}.{a}" for _, s in bindings.calls for a in s.arguments}
        return f"is a macro that nothing uses{nearest(bind.argument, options)}"
    built = [scope for scope, symbol in bindings.calls if symbol is bind.symbol]
    at = len(bind.scope)
    if not built:
        return f"is bound, but nothing builds {bind.symbol.name}: reference it as @{bind.symbol.name}, or remove this"
    if not any(scope[:at] == bind.scope for scope in built):
        wanted = "/".join(bind.scope)
        close = nearest(wanted, ["/".join(scope) for scope in scopes])
        places = " and ".join(f"scope {'/'.join(s)}" if s else "no scope" for s in sorted(built))
        return f"is bound, but scope {wanted} never builds it (it is built in {places}){close}"
    if any(bind.argument in bindings.calls[scope, bind.symbol].given for scope in built):
        return "is bound, but the code that builds it always sets this argument itself"
    return "is bound, but a binding in a narrower scope always takes its place"


def _shown(bindings: Bindings) -> tuple[Shown, ...]:
    return tuple(Shown(b.name, repr(b.value), str(b.where), b.consumed) for b in bindings.all())


def _available(bindings: Bindings) -> tuple[Parameter, ...]:
    found: dict[str, Parameter] = {}
    for (_, symbol), call in bindings.calls.items():
        for name, argument in symbol.arguments.items():
            if name in call.given and name not in call.used:
                continue
            kind = describe(symbol.hints[name]) if name in symbol.hints else "any"
            default = "required" if argument.default is argument.empty else _short(argument.default)
            if name in symbol.factories:
                default = f"{symbol.factories[name].__name__}()"
            found[f"{symbol.name}.{name}"] = Parameter(f"{symbol.name}.{name}", kind, default)
    return tuple(found[name] for name in sorted(found))


def _short(default: Any) -> str:
    # A factory or an array has no form that one could write; what it is called says enough.
    if type(default).__module__ == "dataclasses":
        return "built anew"
    shown = getattr(default, "__name__", None) or repr(default)
    return shown if len(shown) <= 60 else shown[:57] + "..."
