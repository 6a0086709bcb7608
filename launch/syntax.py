"""Reads gin files into statements: nothing is imported and nothing is called here.

gin's own parser does the parsing. What it would turn into live references is kept as plain values, so that a file
can be judged before any of it runs.
"""

import dataclasses
import difflib
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gin import config_parser

from checkpoints.folder import place
from partitioning.errors import UserError

FEATURE = "__gin__.dynamic_registration"
HEADER = "from __gin__ import dynamic_registration"


@dataclasses.dataclass(frozen=True)
class Where:
    """Where a statement stands: a line of a file, an override given on the command line, or (line 0) in the code."""

    file: str
    line: int
    override: str | None = None

    def __str__(self) -> str:
        if self.override is not None:
            return f"override {self.override!r}"
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/name` or, with `call`, `@scope/name()`."""

    scope: tuple[str, ...]
    name: str
    call: bool


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%name`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Import:
    """`import module [as bound]`, or `from module's parent import bound`."""

    module: str
    bound: str
    whole: bool  # `import a.b` binds `a`; every other form binds the module itself
    where: Where


@dataclasses.dataclass(frozen=True)
class Binding:
    """`scope/name.argument = value`; a macro's definition has an empty argument."""

    scope: tuple[str, ...]
    name: str
    argument: str
    value: Any
    where: Where


@dataclasses.dataclass(frozen=True)
class Source:
    """One file's statements in order; an included file stands where it was included, as a Source."""

    file: str
    statements: tuple["Import | Binding | Source", ...]


class _Plain(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name, evaluate):
        *scope, name = scoped_configurable_name.split("/")
        return Reference(tuple(scope), name, evaluate)

    def macro(self, macro_name):
        return Macro(macro_name)


def statements(text: str, file: str, override: str | None = None) -> Iterator[Any]:
    """The statements of a text, includes as (file, place).

    Errors: UserError where it does not parse.
    """

    def where(line: int) -> Where:
        return Where(file, line, override)

    parser = None
    try:
        parser = config_parser.ConfigParser(text, _Plain())
        for statement in parser:
            place = where(statement.location.line_num)
            if isinstance(statement, config_parser.ImportStatement):
                whole = not statement.is_from and not statement.alias
                yield Import(statement.module, statement.bound_name(), whole, place)
            elif isinstance(statement, config_parser.BindingStatement):
                scope = tuple(statement.scope.split("/")) if statement.scope else ()
                yield Binding(scope, statement.selector, statement.arg_name, statement.value, place)
            elif isinstance(statement, config_parser.IncludeStatement):
                yield statement.filename, place
            # A block's declaration says nothing that its bindings do not say again.
    except (SyntaxError, tokenize.TokenError, ValueError, TypeError, RecursionError) as error:
        line = _line(error)
        if line is None and parser is not None:
            line = parser.current_token.start[0]
        raise UserError(f"{where(line or 1)}: {_expectation(error)}") from None


def _line(error: Exception) -> int | None:
    if isinstance(error, SyntaxError):
        return error.lineno
    if isinstance(error, tokenize.TokenError) and len(error.args) > 1:
        return error.args[1][0]
    return None


def _expectation(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "the value is nested too deeply"
    if isinstance(error, tokenize.TokenError):
        return f"a bracket or string is not closed ({error.args[0]})"
    message = str(error.msg if isinstance(error, SyntaxError) else error)
    token = re.search(r"Failed to parse token '(.*)'", message, re.DOTALL)
    if token and re.fullmatch(r"-?\w+", token[1]):
        return f"{token[1]} is no value: expected quotes around a string ({token[1]!r}), or @ before a class"
    if token:
        return f"{token[1]!r} is no value: expected a number, a string in quotes, a list, @class or %macro"
    if message.startswith("Couldn't parse statement"):
        return "expected a statement such as `package.Class.argument = value`, or `import package`"
    if message.startswith("Unexpected token"):
        return "expected a name here: `package.Class.argument = value`"
    if message.startswith("Unable to parse value"):
        return "expected a value after `=`: a number, a string in quotes, a list, @class or %macro"
    if isinstance(error, TypeError):
        return f"a dictionary's key or a set's item cannot be hashed ({message})"
    return message


def find(name: str, *, beside: str | None = None) -> Path:
    """The file that `name` means: from the working folder, beside the including file, or shipped with the packages."""
    places = [place(name)]
    if beside is not None:
        places.append(place(beside).parent / name)
    places.append(Path(__file__).resolve().parent.parent / name)
    for path in places:
        if path.is_file():
            return path
    raise UserError(f"{name}: {'is a folder, expected a .gin file' if places[0].is_dir() else _no_file(places[0])}")


def _no_file(path: Path) -> str:
    near = []
    if path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.gin")], n=3, cutoff=0.4)
    return "no such file" + (f"; nearest: {', '.join(str(path.parent / n) for n in near)}" if near else "")


def read(name: str, *, beside: str | None = None, above: tuple[Path, ...] = ()) -> Source:
    """Read a file and, in place, the files that it includes.

    Errors: UserError for a missing or unreadable file, a circle of includes, and what does not parse.
    """
    path = find(name, beside=beside)
    if path.resolve() in above:
        raise UserError(f"{beside}: includes {name}, which includes it in turn: expected no circle of includes")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    found: list[Import | Binding | Source] = []
    dynamic = False
    seen: dict[tuple, Where] = {}
    for statement in statements(text, str(path)):
        if isinstance(statement, tuple):
            included, place = statement
            try:
                found.append(read(included, beside=str(path), above=(*above, path.resolve())))
            except UserError as error:
                if str(error).startswith(f"{included}:"):
                    raise UserError(f"{place}: includes {error}") from None
                raise
            seen = {}  # what follows an include may well rebind what the include bound
            continue
        if isinstance(statement, Import) and statement.module == FEATURE:
            dynamic = True
            continue
        if not dynamic and not (isinstance(statement, Binding) and not statement.argument):
            raise UserError(f"{statement.where}: expected `{HEADER}` before the first import")
        if isinstance(statement, Binding):
            key = (statement.scope, statement.name, statement.argument)
            if key in seen:
                raise UserError(
                    f"{statement.where}: {written(statement)} is bound on line {seen[key].line} already: keep one"
                )
            seen[key] = statement.where
        found.append(statement)
    return Source(str(path), tuple(found))


def written(binding: Binding) -> str:
    """A binding's left side as its author wrote it."""
    return "/".join([*binding.scope, ".".join(part for part in (binding.name, binding.argument) if part)])


def override(text: str) -> Binding:
    """Read one override, `Class.argument = value`.

    Errors: UserError for anything but exactly one binding.
    """
    found = list(statements(text, "", text))
    if len(found) != 1 or not isinstance(found[0], Binding):
        raise UserError(f"override {text!r}: expected one binding such as `Run.steps = 100`")
    return found[0]
