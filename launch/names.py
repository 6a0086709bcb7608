"""From the names in a file to the classes and functions they mean, with the nearest ones where there is none."""

import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
import sys
import typing
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from launch import syntax
from launch.allowed import LIBRARIES, Allowed, is_configurable, is_format
from launch.ours import OURS
from partitioning.errors import UserError


def nearest(name: str, options: Iterable[str] | Mapping[str, str]) -> str:
    """`; nearest: a, b` for an error message, or nothing where no option comes near.

    A mapping gives for each option what to show for it.
    """
    shown = options if isinstance(options, Mapping) else {option: option for option in options}
    by_low = {option.lower(): shown[option] for option in sorted(shown, reverse=True)}
    found = difflib.get_close_matches(name.lower(), by_low, n=3, cutoff=0.5)
    if not found:
        # `models.RandomTokens` for `objectives.RandomTokens`: a wrong package, a right name.
        last = name.lower().rsplit(".", 1)[-1]
        found = difflib.get_close_matches(last, by_low, n=3, cutoff=0.6)
    return f"; nearest: {', '.join(by_low[f] for f in found)}" if found else ""


@dataclasses.dataclass(frozen=True, eq=False)
class Symbol:
    """A class or function under the one name that listings and operative files use for it."""

    name: str
    target: Any

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """Its arguments, without `self`. A class's are those of its own constructor, whatever its metaclass does."""
        target = self.target
        if inspect.isclass(target):
            constructor: Any = target.__init__
            if constructor is object.__init__ and target.__new__ is not object.__new__:
                constructor = target.__new__
            if constructor is object.__init__:
                return inspect.Signature()
            first, *rest = inspect.signature(constructor).parameters.values()
            if first.kind is inspect.Parameter.VAR_POSITIONAL:
                rest = [first, *rest]
            return inspect.Signature(rest)
        return inspect.signature(target)

    @functools.cached_property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """The arguments that a binding can name."""
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {name: p for name, p in self.signature.parameters.items() if p.kind in kinds}

    @functools.cached_property
    def factories(self) -> dict[str, type]:
        """Of a dataclass: the arguments whose default is a class, built anew for each object."""
        if not (inspect.isclass(self.target) and dataclasses.is_dataclass(self.target)):
            return {}
        fields = dataclasses.fields(self.target)
        return {f.name: f.default_factory for f in fields if f.init and inspect.isclass(f.default_factory)}

    @functools.cached_property
    def open_ended(self) -> bool:
        """Whether it takes `**kwargs`, and so any name."""
        return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self.signature.parameters.values())

    @functools.cached_property
    def hints(self) -> dict[str, Any]:
        """Evaluated annotations of its arguments; one that cannot be evaluated is left out."""
        target = self.target
        if inspect.isclass(target) and not dataclasses.is_dataclass(target):
            target = target.__init__
        try:
            hints = typing.get_type_hints(target, include_extras=True)
        except (NameError, TypeError, AttributeError, SyntaxError):
            hints = {
                name: p.annotation
                for name, p in self.arguments.items()
                if p.annotation is not inspect.Parameter.empty and not isinstance(p.annotation, str)
            }
        return {n: h.type if isinstance(h, dataclasses.InitVar) else h for n, h in hints.items() if n in self.arguments}


def public(module: ModuleType) -> list[str]:
    """The classes and functions that a module offers, its own or re-exported."""
    return [n for n, v in vars(module).items() if not n.startswith("_") and is_configurable(v)]


class Names:
    """The names of one resolution: what the files import and mention, and what an override may mean."""

    def __init__(self, allowed: Allowed):
        self.allowed = allowed
        self.mentioned: dict[str, Symbol] = {}
        self.imported: dict[str, ModuleType] = {}
        self._symbols: dict[int, Symbol] = {}

    def bring(self, statement: syntax.Import) -> ModuleType:
        """Carry out an import that the allow-list passed; returns what it binds.

        Errors: UserError where there is no such module (with the nearest), or where it lacks a library.
        """
        module = self._load(statement.module, statement.where)
        if statement.whole:
            module = sys.modules[statement.module.split(".")[0]]
        self.imported[statement.bound] = module
        return module

    def _load(self, name: str, where: object) -> ModuleType:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or name
            if not (name == missing or name.startswith(missing + ".")):
                raise UserError(f"{where}: importing {name} needs {missing}, which is not installed") from None
            parent, _, last = name.rpartition(".")
            options = [*OURS, *LIBRARIES, *self.allowed.extra]
            if parent and parent in sys.modules:
                # `from models import Trunk` asks for a class where gin takes modules only.
                if hasattr(sys.modules[parent], last):
                    raise UserError(
                        f"{where}: {name} is no module: `import {parent}` and write {name} in full"
                    ) from None
                found = pkgutil.iter_modules(getattr(sys.modules[parent], "__path__", []))
                options = [f"{parent}.{m.name}" for m in found]
            raise UserError(f"{where}: there is no module {name}{nearest(name, options)}") from None

    def intern(self, target: Any, spelled: str) -> Symbol:
        """The one Symbol of `target`, named after its package's own export where there is one."""
        if id(target) not in self._symbols:
            package, own = str(getattr(target, "__module__", "")).split(".")[0], getattr(target, "__name__", "")
            exported = getattr(sys.modules.get(package), own, None) if own else None
            self._symbols[id(target)] = Symbol(f"{package}.{own}" if exported is target else spelled, target)
        return self._symbols[id(target)]

    def of_class(self, cls: type) -> Symbol | None:
        """The symbol of a class that code names, not a file; None where a configuration may not bind it."""
        if not self.allowed.module(cls.__module__) or "." in cls.__qualname__:
            return None
        return self.intern(cls, f"{cls.__module__}.{cls.__qualname__}")

    def resolve(
        self, name: str, table: Mapping[str, ModuleType], where: object, *, quiet: bool = False
    ) -> Symbol | None:
        """The symbol that `name` means among the modules of `table`; with `quiet`, None where it means none.

        Errors: UserError for an unknown name (with the nearest), one that is neither class nor function, and one
        that is defined where a configuration may not reach.
        """
        first, *rest = name.split(".")
        if first not in table:
            if quiet:
                return None
            if self.allowed.module(first):
                raise UserError(f"{where}: {name}: expected `import {first}` above it in this file")
            raise UserError(f"{where}: {name} is unknown{nearest(name, [*table, *self._offers(table)])}")
        target: Any = table[first]
        spelled = [target.__name__]
        for part in rest:
            if part.startswith("_"):
                raise UserError(f"{where}: {name}: {part} is private, and a configuration may not reach it")
            if not hasattr(target, part):
                if quiet:
                    return None
                holder = ".".join(spelled)
                offers = [f"{holder}.{n}" for n in public(target)] if inspect.ismodule(target) else []
                close = nearest(f"{holder}.{part}", offers) or nearest(name, self._offers(table))
                raise UserError(f"{where}: {holder} has no {part}{close}")
            target = getattr(target, part)
            spelled.append(part)
        full = ".".join(spelled)
        if inspect.ismodule(target):
            if quiet:
                return None
            raise UserError(f"{where}: {name} is a package: expected a class or function of it{self._example(target)}")
        # Before anything else is said or asked of it: may the file reach it at all?
        if is_configurable(target):
            self.allowed.check_symbol(name, target, where)
        elif not is_format(target):
            raise UserError(f"{where}: {name} is neither a class nor a function")
        symbol = self.intern(target, full)
        self.mentioned[symbol.name] = symbol
        return symbol

    def short(self, name: str, where: object) -> Symbol:
        """The symbol that an override means: a full name, or an end of one that only one class has.

        The files' own names come first, then what the imported packages export.
        Errors: UserError for an unknown name (with the nearest) or one that means several.
        """
        first = name.split(".")[0]
        table = dict(self.imported)
        if "." in name and first not in table and self.allowed.module(first):
            table[first] = self._load(first, where)
        if first in table and "." in name:
            symbol = self.resolve(name, table, where, quiet=True)
            if symbol is not None:
                return symbol
        offered = {full: full for full in self._offers(table)}
        for known in (self.mentioned, offered):
            ends = sorted(full for full in known if full == name or full.endswith("." + name))
            symbols = {id(s): s for s in (self.from_full(full, where) for full in ends)}
            if len(symbols) > 1:
                found = " and ".join(sorted(s.name for s in symbols.values()))
                raise UserError(f"{where}: {name} may mean {found}: expected one of them in full")
            if symbols:
                return next(iter(symbols.values()))
        full = [*offered, *self.mentioned]
        close = nearest(name, {f.rsplit(".", 1)[-1]: f for f in full} if "." not in name else full)
        raise UserError(f"{where}: {name} is unknown{close}")

    def from_full(self, name: str, where: object) -> Symbol:
        """The symbol of a full name; its package is imported where it was not."""
        if name in self.mentioned:
            return self.mentioned[name]
        first = name.split(".")[0]
        symbol = self.resolve(name, {first: self._load(first, where)}, where)
        assert symbol is not None
        return symbol

    def _offers(self, table: Mapping[str, ModuleType]) -> list[str]:
        modules = {m.__name__: m for m in table.values()}
        modules |= {n: sys.modules[n] for n in (*OURS, *self.allowed.extra) if n in sys.modules}
        return [
            f"{module}.{name}"
            for module in sorted(modules)
            if self.allowed.module(module)
            for name in public(modules[module])
            if self.allowed.module(str(getattr(modules[module], name).__module__))
        ]

    def _example(self, module: ModuleType) -> str:
        names = public(module)
        return f" such as {module.__name__}.{names[0]}" if names else ""


def check_argument(symbol: Symbol, argument: str, where: object) -> None:
    """Raise UserError, with the nearest names, where `symbol` has no such argument."""
    if argument in symbol.arguments or symbol.open_ended:
        return
    close = nearest(argument, list(symbol.arguments)) or (
        f"; it has {', '.join(symbol.arguments)}" if symbol.arguments else "; it has none"
    )
    raise UserError(f"{where}: {symbol.name} has no argument {argument}{close}")
