"""Whether the top-level packages are this project's: their names are plain words, and another folder may take them."""

import importlib.machinery
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

OURS = ("partitioning", "checkpoints", "models", "data", "objectives", "training", "evaluation", "configs")
ROOT = Path(__file__).resolve().parent.parent


def foreign(packages: Iterable[str] = OURS) -> str | None:
    """One line about the first package that is not ours: what Python would import in its place. None if all are.

    Nothing is imported to find out, this project's own errors included.
    """
    for name in packages:
        if not (ROOT / name / "__init__.py").is_file():
            continue  # a folder of files, such as configs, is not imported
        spec = find_spec(name)
        found = _home(spec)
        if found is None:
            return f"the package {name} is not on Python's path: expected {ROOT / name}; install the project"
        if found.resolve() != ROOT / name:
            return (
                f"{found} takes the place of this project's package {name} ({ROOT / name}): rename it, take its folder "
                "off PYTHONPATH, or start the command elsewhere"
            )
    return None


def _home(spec: importlib.machinery.ModuleSpec | None) -> Path | None:
    if spec is None:
        return None
    if spec.origin is None or spec.origin == "namespace":
        return Path(next(iter(spec.submodule_search_locations or [""])))
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin
