"""The methods that the code holds: every public class or function whose docstring names its source."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from launch.ours import ROOT

PACKAGES = ("data", "models", "objectives", "training", "evaluation")


@dataclasses.dataclass(frozen=True)
class Method:
    """One method: its name as a configuration writes it, what it does, and the paper it comes from."""

    name: str
    sentence: str
    source: str


def methods(root: Path = ROOT) -> list[Method]:
    """All methods, sorted by name. Files are parsed, not imported, so this needs none of what they need."""
    found: dict[str, Method] = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            for method in _in_file(path, package):
                found.setdefault(method.name, method)
    return sorted(found.values(), key=lambda method: method.name.lower())


def _in_file(path: Path, package: str) -> Iterator[Method]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        text = ast.get_docstring(node) or ""
        source = re.search(r"^Source: *(.+?)(?=\n\s*\n|\n\w+:|\Z)", text, re.MULTILINE | re.DOTALL)
        if source is not None:
            sentence = " ".join(text.split("\n\n")[0].split())
            yield Method(f"{package}.{node.name}", sentence, " ".join(source[1].split()))
