"""The bindings of one configuration at work: what a reference builds, in which scope, and which bindings it used.

The rules are gin's: a class built in scope `a/b` takes the bindings of its name, of `a/` and of `a/b/`, the narrower
winning; a caller's own arguments win over all; a reference with a scope replaces the scope it stands in. gin keeps
its bindings in the process, where loading a second file would change what the first file's classes build; here they
belong to the configuration, and each reference carries them.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

import gin

from launch.allowed import is_format
from launch.check import describe, expected, makes
from launch.names import Symbol
from launch.syntax import Where
from partitioning.errors import UserError
from partitioning.ranges import Range

Scope = tuple[str, ...]

_SCOPE: contextvars.ContextVar[Scope] = contextvars.ContextVar("scope", default=())


@dataclasses.dataclass(frozen=True)
class Use:
    """A resolved reference: `@scope/symbol`, or with `call` `@scope/symbol()`."""

    scope: Scope
    symbol: Symbol
    call: bool

    def __repr__(self) -> str:
        return f"@{'/'.join((*self.scope, self.symbol.name))}{'()' if self.call else ''}"


@dataclasses.dataclass(frozen=True)
class MacroUse:
    """A resolved `%name`."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


REQUIRED = MacroUse("gin.REQUIRED")


@dataclasses.dataclass(eq=False)
class Bind:
    """One binding in force. `symbol` is None for a macro, whose name is then `argument`."""

    scope: Scope
    symbol: Symbol | None
    argument: str
    value: Any
    where: Where
    consumed: bool = False

    @property
    def name(self) -> str:
        """The full name: `scope/package.Class.argument`, or the macro's."""
        dotted = self.argument if self.symbol is None else f"{self.symbol.name}.{self.argument}"
        return "/".join((*self.scope, dotted))


@dataclasses.dataclass
class Call:
    """What the calls of one symbol in one scope used: bindings by argument, and the names their callers gave."""

    used: dict[str, Bind] = dataclasses.field(default_factory=dict)
    given: set[str] = dataclasses.field(default_factory=set)
    open: set[str] = dataclasses.field(default_factory=set)  # neither bound nor given: the default was used


class Bindings:
    """All bindings of one configuration, and the record of what was built with them."""

    def __init__(self, find: Callable[[type], Symbol | None]) -> None:
        self._find = find  # the symbol of a class that a default builds, None where a configuration may not bind it
        self.table: dict[tuple[Scope, Symbol], dict[str, Bind]] = {}
        self.macros: dict[str, Bind] = {}
        self.calls: dict[tuple[Scope, Symbol], Call] = {}
        self.source = ""  # the file that an error about no particular line names
        self._making: list[object] = []

    def add(self, bind: Bind) -> None:
        """Put a binding in force; a later one of the same name takes an earlier one's place."""
        if bind.symbol is None:
            self.macros["/".join((*bind.scope, bind.argument))] = bind
        else:
            self.table.setdefault((bind.scope, bind.symbol), {})[bind.argument] = bind

    def all(self) -> list[Bind]:
        """Every binding in force, in the order of the file."""
        return [*self.macros.values(), *(bind for group in self.table.values() for bind in group.values())]

    def lookup(self, scope: Scope, symbol: Symbol) -> dict[str, Bind]:
        """The bindings that a call of `symbol` in `scope` takes, by argument."""
        found: dict[str, Bind] = {}
        for depth in range(len(scope) + 1):
            found |= self.table.get((scope[:depth], symbol), {})
        return found

    def taken(self, scope: Scope, symbol: Symbol) -> dict[str, Bind]:
        """What a call takes in all: the bindings, and the parts that it builds by default."""
        return self._defaults(symbol) | self.lookup(scope, symbol)

    def evaluate(self, value: Any, where: Where | str) -> Any:
        """A binding's value as the callee gets it: fresh containers, references resolved in the current scope."""
        if isinstance(value, Use):
            if is_format(value.symbol.target):
                return value.symbol.target
            made = Made(self, value.symbol, value.scope, _SCOPE.get())
            if not value.call:
                return made
            with self._once((made.scope, value.symbol), where, repr(value)):
                return made()
        if value == REQUIRED:
            return REQUIRED
        if isinstance(value, MacroUse):
            bind = self.macros[value.name]
            with self._once(value.name, where, f"%{value.name}"):
                bind.consumed = True
                return self.evaluate(bind.value, bind.where)
        if isinstance(value, dict):
            return {self.evaluate(k, where): self.evaluate(v, where) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.evaluate(v, where) for v in value)
        return value

    @contextlib.contextmanager
    def _once(self, key: object, where: object, name: str) -> Iterator[None]:
        if key in self._making:
            raise UserError(f"{where}: {name} is needed to make itself: expected no circle of references")
        self._making.append(key)
        try:
            yield
        finally:
            self._making.pop()

    def call(self, symbol: Symbol, scope: Scope, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call `symbol` in `scope`: the caller's arguments, then what is bound.

        Errors: UserError for a value that does not fit its annotation or range, and for what is missing.
        """
        token = _SCOPE.set(scope)
        try:
            given = {*list(symbol.arguments)[: len(args)], *kwargs}
            record = self.calls.setdefault((scope, symbol), Call())
            record.given |= given
            bound: dict[str, Any] = {}
            used = {n: b for n, b in self.taken(scope, symbol).items() if n not in given}
            for name, bind in used.items():
                bind.consumed = True
                bound[name] = self._value(bind, name)
            record.used |= used
            record.open |= {n for n in symbol.arguments if n not in given and n not in used}
            self._check_complete(symbol, scope, given, used)
            try:
                return symbol.target(*args, **bound, **kwargs)
            except UserError as error:
                placed = [bind.where for bind in used.values() if bind.where.line]
                if placed and not getattr(error, "placed", False):
                    error = UserError(f"{placed[0]}: {symbol.name}: {error}")
                    error.placed = True  # type: ignore[attr-defined]
                    raise error from None
                raise
        finally:
            _SCOPE.reset(token)

    def _defaults(self, symbol: Symbol) -> dict[str, Bind]:
        """Parts that a dataclass builds by default, as bindings: they are built here, so that theirs are heard."""
        found = {}
        for name, cls in symbol.factories.items():
            part = self._find(cls)
            if part is not None:
                place = Where(f"default of {symbol.name}.{name}", 0)
                found[name] = Bind((), symbol, name, Use((), part, call=True), place)
        return found

    def _value(self, bind: Bind, name: str) -> Any:
        assert bind.symbol is not None
        annotation = bind.symbol.hints.get(name)
        use = bind.value
        if isinstance(use, Use) and use.call and use.symbol.target in makes(annotation):
            # Said now: built here, it would only miss what its receiver gives.
            early = f"{bind.where}: {bind.name} = {use!r}: expected {describe(annotation)}"
            raise _placed(f"{early}: @{use.symbol.name} without ()")
        value = self.evaluate(bind.value, bind.where)
        if value is REQUIRED:
            raise _missing(bind.symbol, name, bind.scope, f"{bind.where}: ")
        words = None if annotation is None else expected(value, annotation)
        if words is not None:
            hint = ""
            if isinstance(value, Made) and expected(value, Any) is None and "makes" not in words:
                hint = f"; @{value.symbol.name}() with () builds one"
            raise _placed(f"{bind.where}: {bind.name} = {bind.value!r}: expected {words}{hint}")
        return value

    def _check_complete(self, symbol: Symbol, scope: Scope, given: set[str], used: dict[str, Bind]) -> None:
        empty = inspect.Parameter.empty
        for name, parameter in symbol.arguments.items():
            if name not in given and name not in used and parameter.default in (empty, gin.REQUIRED):
                raise _missing(symbol, name, scope, f"{self.source}: ")


def _placed(message: str) -> UserError:
    error = UserError(message)
    error.placed = True  # type: ignore[attr-defined]
    return error


def _missing(symbol: Symbol, name: str, scope: Scope, where: str) -> UserError:
    annotation = symbol.hints.get(name)
    full = "/".join((*scope, f"{symbol.name}.{name}"))
    words = f" ({describe(annotation)})" if annotation is not None else ""
    line = f"{full} = {example(annotation)}"
    return _placed(f"{where}{full} is required{words} and nothing binds it: add a line such as `{line}`")


def example(annotation: Any) -> str:
    """A value that fits `annotation`, as one would write it in a file."""
    for member in (annotation, *typing.get_args(annotation)):
        marks = [m for m in getattr(member, "__metadata__", ()) if isinstance(m, Range)]
        plain = getattr(member, "__origin__", member) if marks else member
        if plain in (int, float):
            numbers = (1_000, 1) if plain is int else (0.1, 0.5, 1.0, 10.0)
            return f"{next((n for n in numbers if all(n in m for m in marks)), marks[0].low if marks else 0):_}"
        if plain in (str, bool):
            return "'name'" if plain is str else "True"
        if inspect.isclass(plain) and plain.__module__ not in ("builtins", "typing", "collections.abc", "types"):
            made = _concrete(plain)
            return f"@{made.__module__.split('.')[0]}.{made.__name__}()"
    return "@package.Class"


def _concrete(cls: type) -> type:
    """A documented class derived from `cls` that its package exports, or `cls` itself."""
    queue: list[type] = list(cls.__subclasses__())
    found = []
    while queue:
        derived = queue.pop()
        queue += derived.__subclasses__()
        package = sys.modules.get(derived.__module__.split(".")[0])
        if getattr(package, derived.__name__, None) is derived:
            found.append(derived)
    return min(found, key=lambda c: c.__name__, default=cls)


class Made:
    """A class or function with its configuration: what `@package.Class` hands to its receiver.

    Calling it builds the object from the bindings, the caller's arguments winning. Its signature shows what is left
    to give; other attributes are the class's own. Two are equal where they build the same.
    """

    def __init__(self, bindings: Bindings, symbol: Symbol, scope: Scope, around: Scope):
        self.bindings, self.symbol, self._own, self._around = bindings, symbol, scope, around
        functools.update_wrapper(self, symbol.target, updated=())

    @property
    def scope(self) -> Scope:
        """Where a call would look: its own scope, else the caller's, else the one it was written in."""
        return self._own or _SCOPE.get() or self._around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.bindings.call(self.symbol, self.scope, args, kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        bound = self.bindings.lookup(self.scope, self.symbol)
        left = [p for n, p in self.symbol.signature.parameters.items() if n not in bound]
        return inspect.Signature(left)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "symbol" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.symbol.target, name)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Made) and self._tree() == other._tree())

    def __hash__(self) -> int:
        return hash((id(self.symbol.target), self.scope))

    def __deepcopy__(self, memo: dict) -> "Made":
        return self

    def __copy__(self) -> "Made":
        return self

    def __repr__(self) -> str:
        return f"@{'/'.join((*self.scope, self.symbol.name))}"

    def _tree(self) -> Any:
        return _tree(self.bindings, self.symbol, self.scope)


def _tree(bindings: Bindings, symbol: Symbol, scope: Scope) -> Any:
    """What a call would build, defaults spelled out, as something that compares by value."""

    def plain(value: Any) -> Any:
        if isinstance(value, Use):
            return value.call, *_tree(bindings, value.symbol, value.scope or scope)
        if isinstance(value, MacroUse) and value != REQUIRED:
            return plain(bindings.macros[value.name].value)
        if isinstance(value, dict):
            return {plain(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(plain(v) for v in value)
        return value

    arguments = {n: p.default for n, p in symbol.arguments.items()}
    arguments |= {n: plain(bind.value) for n, bind in bindings.taken(scope, symbol).items()}
    return id(symbol.target), scope, arguments
