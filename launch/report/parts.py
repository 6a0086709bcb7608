"""What a page is made of: tables, figures, texts; each knows itself as JSON, as CSV and by a name that files have."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["curves", "intervals", "shares", "map"]
DIGITS = 6
"""Of the numbers in figures."""


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first cell of a row names it.

    Args:
      name: of its files, unique on the page.
      caption: what it shows, in a sentence.
      head: names of the columns.
      rows: cells as text.
      words: columns (by number) whose cells are words, set to the left as the first is.
      bars: columns (by number) whose cells are shares, drawn as bars behind the number too.
    """

    name: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = ()
    bars: Sequence[int] = ()

    def csv(self) -> str:
        """Head and rows, as comma-separated values."""
        return _csv([self.head, *self.rows])

    def width(self, row: int, column: int) -> float:
        """The share of a bar's cell over the largest of its table."""
        shares = [_share(cells[at]) for cells in self.rows for at in self.bars]
        return 100 * _share(self.rows[row][column]) / max([*shares, 1e-30])


def _share(cell: str) -> float:
    try:
        return float(cell.rstrip("%"))
    except ValueError:
        return 0.0


@dataclass(frozen=True)
class Series:
    """Points of one name.

    Args:
      name: in the legend.
      x: places by axis, of which a reader chooses one.
      y: values, or row names of a map.
      low, high: ends of intervals, where they have any.
      text: of each point.
      steady: a value that is the same everywhere, drawn as a thin line.
    """

    name: str
    x: Mapping[str, Sequence[Any]]
    y: Sequence[Any]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    text: Sequence[str] | None = None
    steady: bool = False


@dataclass(frozen=True)
class Figure:
    """A plot; the page draws it, and these are its numbers.

    Args:
      name: of its files, unique on the page.
      title, caption: what it shows.
      kind: curves over a choice of axes; a mean and an interval for each name; shares of a whole, stacked; a map of places.
      y: what its values are, with their unit.
      series: at least one.
      line: a value to compare with, of `intervals`.
      order: of the names, of `intervals`.
    """

    name: str
    title: str
    caption: str
    kind: Kind
    y: str
    series: Sequence[Series]
    line: float | None = None
    order: Sequence[str] = ()

    def axes(self) -> list[str]:
        """The axes that all of its series have, in order."""
        first, *rest = (series.x for series in self.series)
        return [axis for axis in first if all(axis in other for other in rest)]

    def spec(self) -> dict[str, Any]:
        """What the page's script draws it by."""
        found = []
        for series in self.series:
            own: dict[str, Any] = {"name": series.name, "x": {axis: rounded(series.x[axis]) for axis in self.axes()}}
            own["y"] = rounded(series.y)
            own |= {"low": rounded(series.low), "high": rounded(series.high)} if series.low and series.high else {}
            own |= {"text": list(series.text)} if series.text else {}
            own |= {"steady": True} if series.steady else {}
            found.append(own)
        told = {"kind": self.kind, "title": self.title, "y": self.y, "axes": self.axes(), "series": found}
        told |= {"order": list(self.order)} if self.order else {}
        return told | ({} if self.line is None else {"line": self.line})

    def csv(self) -> str:
        """A row for each point, as comma-separated values; the page's own link gives the same."""
        told, axes = self.spec()["series"], self.axes()
        extra = [name for name in ("low", "high", "text") if any(name in series for series in told)]
        rows: list[Sequence[Any]] = [["series", *axes, self.y, *extra]]
        for series in told:
            for i, y in enumerate(series["y"]):
                more = [series[name][i] if name in series else "" for name in extra]
                rows.append([series["name"], *(series["x"][axis][i] for axis in axes), y, *more])
        return _csv(rows)


@dataclass(frozen=True)
class Text:
    """Lines of text in their own box, such as a configuration.

    Args:
      name: unique on the page.
      title: of the box.
      text: as it is.
      folded: whether a reader opens it first.
    """

    name: str
    title: str
    text: str
    folded: bool = True


@dataclass(frozen=True)
class Passage:
    """A text in runs, some of which are marked.

    Args:
      label: what stands before it.
      runs: (text, kind), where kind is `text`, `special`, `hidden` (from the model), `given` (by it) or `true` (what was there).
    """

    label: str
    runs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Passages:
    """Texts that a model saw or wrote.

    Args:
      name: unique on the page.
      caption: what they are, and how marks are to be read.
      passages: in order.
    """

    name: str
    caption: str
    passages: Sequence[Passage]


@dataclass(frozen=True)
class Section:
    """A part of the page under its own heading.

    Args:
      name: its anchor.
      title: its heading.
      words: sentences before the parts.
      parts: tables, figures and texts.
    """

    name: str
    title: str
    words: Sequence[str] = ()
    parts: Sequence[Table | Figure | Text | Passages] = field(default_factory=list)


def slug(name: str) -> str:
    """A name as a part of an address or a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "x"


def rounded(values: Sequence[Any] | None) -> list[Any]:
    """Numbers in six digits; what is not finite is null, as JSON has no word for it."""
    return [_rounded(value) for value in values or ()]


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    if value != value or value in (float("inf"), float("-inf")):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short == int(short) else short


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(["" if cell is None else cell for cell in row] for row in rows)
    return out.getvalue()
