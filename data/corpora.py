"""The embedded corpora: real text and code that every CPython carries, read from its sources and never imported.

A split holds whole top-level modules (`email`, `json`, ...), chosen by the hash of the module's name, so nothing of a
module that is held out is seen in training; documentation topics go by their own names. Identical texts are kept once,
in the module whose name comes first.
"""

import ast
import hashlib
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data.sources import SPLITS, Record, split_of
from partitioning.errors import UserError

HELD_OUT = 0.1
TESTS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
MIN_CHARACTERS = 16
MIN_QUERY_WORDS = 4


@dataclass(frozen=True)
class Text:
    """A text and the top-level module (or topic) that it comes from."""

    module: str
    text: str


@dataclass(frozen=True)
class Function:
    """A documented function: its module, where it stands, its docstring, and its source without the docstring."""

    module: str
    place: str
    docstring: str
    source: str


@cache
def stdlib() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def module_of(file: Path) -> str:
    """The top-level module of a file of the standard library; `_x` counts as `x`, which it usually implements."""
    first = file.relative_to(stdlib()).parts[0]
    return first.removesuffix(".py").strip("_")


def split_of_module(module: str) -> str:
    """The split that a module or topic belongs to."""
    return split_of(f"palmette {module}", HELD_OUT)


@cache
def _sources() -> tuple[tuple[Path, str], ...]:
    found = []
    for file in sorted(stdlib().rglob("*.py")):
        inside = file.relative_to(stdlib())
        if TESTS.intersection(inside.parts) or inside.parts[0] == "pydoc_data":
            continue
        if inside.name.startswith("test_") or inside.parts[0].startswith("config-"):
            continue
        try:
            found.append((file, file.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, OSError):
            # A few sources declare another encoding on purpose.
            continue
    if not found:
        raise UserError(f"{stdlib()}: this Python ships no standard-library sources; use a local text corpus")
    return tuple(found)


def _once(texts: Iterable[Text]) -> tuple[Text, ...]:
    seen: set[bytes] = set()
    kept = []
    for text in sorted(texts, key=lambda t: t.module):
        key = hashlib.sha256(" ".join(text.text.split()).encode()).digest()
        if key not in seen:
            seen.add(key)
            kept.append(text)
    return tuple(kept)


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class _Extracted:
    """What one pass over all syntax trees gives; the trees themselves would fill gigabytes."""

    docstrings: tuple[Text, ...]
    functions: tuple[Function, ...]


@cache
def _extracted() -> _Extracted:
    docstrings, found = [], []
    for file, text in _sources():
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        module, place = module_of(file), file.relative_to(stdlib()).as_posix()
        lines = text.encode().splitlines(keepends=True)
        for node in _documented(tree):
            docstring = (ast.get_docstring(node) or "").strip()
            if len(docstring) < MIN_CHARACTERS:
                continue
            docstrings.append(Text(module, docstring + "\n"))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
                source = _without_docstring(node, lines)
                found.append(Function(module, f"{place}:{node.lineno}", docstring, source))
    return _Extracted(tuple(docstrings), tuple(found))


def _documented(node: ast.AST) -> Iterator[Documented]:
    """The module, its classes and functions at any depth; only statements are visited, not their expressions."""
    if isinstance(node, Documented):
        yield node
    for part in ("body", "orelse", "handlers", "finalbody", "cases"):
        children = getattr(node, part, ())
        for child in children if isinstance(children, list) else ():
            yield from _documented(child)


@cache
def docs() -> tuple[Text, ...]:
    """The topics of `pydoc` and the docstrings of modules, classes and functions."""
    return _once([*_topics(), *_extracted().docstrings])


def _topics() -> Iterator[Text]:
    topics = stdlib() / "pydoc_data" / "topics.py"
    if topics.is_file():
        for line in ast.parse(topics.read_text(encoding="utf-8")).body:
            if isinstance(line, ast.Assign) and isinstance(line.value, ast.Dict):
                for name, text in ast.literal_eval(line.value).items():
                    yield Text(f"topic {name}", text.strip() + "\n")


@cache
def code() -> tuple[Text, ...]:
    """The sources of the standard library, a file a document."""
    return _once([Text(module_of(file), text) for file, text in _sources() if text.strip()])


@cache
def functions() -> tuple[Function, ...]:
    """The documented functions with a body besides their docstring, each source once."""
    kept = []
    seen = set()
    for function in sorted(_extracted().functions, key=lambda f: (f.module, f.place)):
        if len(first_sentence(function.docstring).split()) >= MIN_QUERY_WORDS and function.source not in seen:
            seen.add(function.source)
            kept.append(function)
    return tuple(kept)


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[bytes]) -> str:
    quoted = node.body[0]
    assert quoted.end_lineno is not None
    assert quoted.end_col_offset is not None
    assert node.end_lineno is not None
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    before = [*lines[first - 1 : quoted.lineno - 1], lines[quoted.lineno - 1][: quoted.col_offset]]
    after = [
        lines[quoted.end_lineno - 1][quoted.end_col_offset :].lstrip(b" ;"),
        *lines[quoted.end_lineno : node.end_lineno],
    ]
    if not before[-1].strip() and not after[0].strip():
        before, after = before[:-1], after[1:]
    return textwrap.dedent(b"".join(before + after).decode()).strip() + "\n"


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, on one line."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    line = " ".join(paragraph.split())
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!etc)[.!?](?=\s|$)", line)
    return line[: end.end()] if end else line


def _named(split: str) -> str:
    if split not in SPLITS:
        raise UserError(f"split {split!r}: one of {', '.join(SPLITS)} is wanted")
    return split


@dataclass(frozen=True)
class PythonDocs:
    """Topics and docstrings of the running Python, as records with `text`.

    Arguments:
        split: `train`, `validation` or `test`.
    """

    split: str = "train"

    def __iter__(self) -> Iterator[Record]:
        split = _named(self.split)
        return ({"text": t.text} for t in docs() if split_of_module(t.module) == split)


@dataclass(frozen=True)
class PythonCode:
    """Standard-library sources of the running Python without its tests, as records with `text`.

    Arguments:
        split: `train`, `validation` or `test`.
    """

    split: str = "train"

    def __iter__(self) -> Iterator[Record]:
        split = _named(self.split)
        return ({"text": t.text} for t in code() if split_of_module(t.module) == split)


@dataclass(frozen=True)
class PythonSearch:
    """Pairs of a docstring's first sentence (`query`) and that function's source without the docstring (`positive`).

    Arguments:
        split: `train`, `validation` or `test`.
    """

    split: str = "train"

    def __iter__(self) -> Iterator[Record]:
        split = _named(self.split)
        for function in functions():
            if split_of_module(function.module) == split:
                yield {"query": first_sentence(function.docstring), "positive": function.source}
