"""The house's own rules: floors, names, lengths, docstrings. They read the code and import none of it."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each package may import of the house; itself always.
FLOORS = {
    "partitioning": (),
    "checkpoints": ("partitioning",),
    "models": ("partitioning", "checkpoints"),
    "data": ("partitioning", "checkpoints"),
    "objectives": ("partitioning", "checkpoints", "models", "data"),
    "training": ("partitioning", "checkpoints", "models", "data", "objectives"),
    "evaluation": ("partitioning", "checkpoints", "models", "data", "objectives"),
    "launch": ("partitioning", "checkpoints", "models", "data", "objectives", "training", "evaluation"),
}
# Optional, or seconds to import: only inside the functions that need them.
LATE = ("tensorflow", "tensorflow_datasets", "seqio", "torch")
FORBIDDEN = re.compile(r"(^|_)(utils?|helpers?|common|misc|data2|stuff)(_|$)", re.IGNORECASE)
LONGEST = 500

FILES = sorted(path for package in FLOORS for path in (ROOT / package).rglob("*.py"))
PYTHON = [
    *FILES,
    *(path for folder in ("tests", "benchmarks", "docs") for path in sorted((ROOT / folder).rglob("*.py"))),
]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST, *, late: bool) -> Iterator[tuple[str, int]]:
    """Modules that a file imports; with `late`, inside its functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.module or "", node.lineno
        elif late or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, late=late)


def wrong_imports(package: str, source: str) -> list[str]:
    """What a file of `package` imports and may not, with lines."""
    tree = ast.parse(source)
    upward = [
        f"line {line}: {module}"
        for module, line in imports(tree, late=True)
        if module.split(".")[0] in (*FLOORS, "tests", "benchmarks", "configs")
        and module.split(".")[0] not in (package, *FLOORS[package])
    ]
    early = [f"line {n}: {m} at module level" for m, n in imports(tree, late=False) if m.split(".")[0] in LATE]
    return upward + early


@pytest.mark.parametrize("path", FILES, ids=name)
def test_floors(path):
    assert wrong_imports(path.relative_to(ROOT).parts[0], path.read_text()) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("models", "import data"),
        ("data", "def f():\n    from models.trunk import Trunk"),
        ("training", "import evaluation.scores as s"),
        ("objectives", "class A:\n    import torch"),
        ("objectives", "try:\n    import seqio\nexcept ImportError:\n    pass"),
        ("partitioning", "if True:\n    from checkpoints import save"),
    ],
)
def test_the_floors_are_seen(package, source):
    assert wrong_imports(package, source)


def test_what_the_floors_allow():
    assert wrong_imports("training", "import objectives\nimport jax\ndef f():\n    import torch") == []


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_length(path):
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_names(path):
    tree = ast.parse(path.read_text())
    defined = [n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    assert [n for n in (*path.relative_to(ROOT).with_suffix("").parts, *defined) if FORBIDDEN.search(n)] == []


def undocumented(tree: ast.Module) -> list[str]:
    """Public classes and functions without a docstring; a method may inherit its base's."""
    found = []
    if ast.get_docstring(tree) is None and tree.body:
        found.append("the module itself")
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None and not overload(node):
            found.append(f"line {node.lineno}: {node.name}")
        if isinstance(node, ast.ClassDef) and not node.bases:
            found += [
                f"line {method.lineno}: {node.name}.{method.name}"
                for method in node.body
                if isinstance(method, ast.FunctionDef)
                and not method.name.startswith("_")
                and ast.get_docstring(method) is None
                and not overload(method)
            ]
    return found


def overload(node: ast.ClassDef | ast.FunctionDef) -> bool:
    """Whether a decorator says that another definition documents this one."""
    return any(re.search("overload|override|setter", ast.unparse(d)) for d in node.decorator_list)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_docstrings(path):
    assert undocumented(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_is_left_for_later(path):
    source = path.read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", source)
    # What a subclass must give is an abstract method, not one that fails when it is called.
    assert "raise NotImplementedError(" not in source or "abstractmethod" in source


def method_names() -> list[str]:
    """The public classes of objectives/ that are objectives or controllers, however indirectly."""
    bases: dict[str, set[str]] = {}
    for path in sorted((ROOT / "objectives").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                bases[node.name] = {re.split(r"[.\[]", ast.unparse(base))[-1] for base in node.bases}
    contract = {"Objective", "Controller"}
    found: set[str] = set()
    while more := {n for n, above in bases.items() if above & (contract | found)} - found - contract:
        found |= more
    return sorted(found)


@pytest.mark.parametrize("package", ["launch", "training"])
def test_the_trainer_and_the_command_know_no_objective(package):
    """An objective is a file of objectives/ that nothing above has heard of."""
    for path in sorted((ROOT / package).rglob("*.py")):
        words = set(re.findall(r"\w+", path.read_text()))
        assert not words & set(method_names()), name(path)


def test_no_package_of_ours_hides_a_standard_module():
    assert not set(FLOORS) & set(sys.stdlib_module_names)
