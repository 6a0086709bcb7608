"""Sections as one HTML file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launch.report.parts import Figure, Section, Table
from partitioning.errors import UserError

PAGE = Path(__file__).parent / "page"
PLOTLY = PAGE / "plotly-basic.min.js"
"""plotly.js 4.1.1, the bundle of lines, bars and pies (npm: plotly.js-basic-dist-min): a quarter of the whole."""


def rendered(title: str, kind: str, sections: Sequence[Section]) -> str:
    """The page.

    Args:
      title: of the page.
      kind: what it is about: a run, or a sweep.
      sections: in order.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    found = list(figures(sections))
    specs = json.dumps({figure.name: figure.spec() for figure in found}, separators=(",", ":"), allow_nan=False)
    axes = dict.fromkeys(axis for figure in found if figure.kind == "curves" for axis in figure.axes())
    # Nothing in the data may end the script that it stands in.
    inert: dict[str, Any] = {"specs": specs.replace("<", "\\u003c")}
    inert |= {"plotly": PLOTLY.read_text(encoding="utf-8")}
    inert |= {
        name: (PAGE / file).read_text(encoding="utf-8") for name, file in (("style", "page.css"), ("script", "page.js"))
    }
    return environment.from_string((PAGE / "page.html").read_text(encoding="utf-8")).render(
        title=title,
        kind=kind,
        sections=sections,
        axes=list(axes),
        version=version("palmette"),
        **{name: jinja2.utils.markupsafe.Markup(text) for name, text in inert.items()},
    )


def figures(sections: Iterable[Section]) -> Iterable[Figure]:
    """The figures of all sections."""
    return (part for section in sections for part in section.parts if isinstance(part, Figure))


def write_csv(folder: Path, sections: Iterable[Section]) -> list[Path]:
    """Writes every table and figure as a file of comma-separated values, by its name on the page.

    Raises:
      UserError: they cannot be written there.
    """
    parts = [part for section in sections for part in section.parts if isinstance(part, Table | Figure)]
    return [write(folder / f"{part.name}.csv", part.csv()) for part in parts]


def write(path: Path, text: str) -> Path:
    """Writes a file in one go, and the folder that it is to lie in.

    Raises:
      UserError: it cannot be written there.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a file to write, such as {path / 'report.html'}")
    aside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    return path
