"""Links between pages: those of the repository are made the site's, and names of methods and configs become links."""

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

from docs.generator.configs import anchor

HOME = {"README.md": "index.md", "benchmarks/RESULTS.md": "results.md"}
# Blocks of code, indented ones in `???` boxes too, stay as they are.
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)


def linked(page: str, text: str, places: Mapping[str, str], root: Path) -> str:
    """A page's text with its links.

    Args:
      page: its path in the site.
      text: as it stands in the repository, or as it was generated.
      places: of methods: page and anchor by name.
      root: of the repository.

    Raises:
      ValueError: a link to a file that the repository has not.
    """
    parts = FENCE.split(text)
    return "".join(part if i % 2 else _prose(page, part, places, root) for i, part in enumerate(parts))


def _prose(page: str, text: str, places: Mapping[str, str], root: Path) -> str:
    here = posixpath.dirname(page)

    def to(target: str) -> str:
        path, hash_, name = target.partition("#")
        return posixpath.relpath(path, here or ".") + hash_ + name if path != page else f"#{name}"

    # Links that are written: relative to docs/, or to the root in the README.
    def own(found: re.Match) -> str:
        words, target = found[1], found[2]
        if re.match(r"\w+:|#", target) or page.startswith("methods/"):
            return found[0]
        path, hash_, name = target.partition("#")
        base = "" if page == "index.md" else "benchmarks" if page == "results.md" else "docs"
        path = posixpath.normpath(posixpath.join(base, path))
        if path in HOME:
            return f"[{words}]({to(HOME[path] + hash_ + name)})"
        if path.startswith("docs/"):
            return f"[{words}]({to(path.removeprefix('docs/') + hash_ + name)})"
        if not (root / path).exists():
            raise ValueError(f"{page}: a link to {path}, which is not there")
        return f"`{path}`"

    text = re.sub(r"(?<!\!)\[([^\]\n]+)\]\(([^)\s]+)\)", own, text)

    # Names in backticks, and pages and configs that are named.
    def method(found: re.Match) -> str:
        place = places.get(found[1])
        return found[0] if place is None or place.split("#")[0] == page else f"[`{found[1]}`]({to(place)})"

    def config(found: re.Match) -> str:
        name = found[1].strip("`")
        whole = f"{name}.gin".replace(".gin.gin", ".gin")
        if page == "configs.md" or not (root / whole).is_file():
            return found[0]
        return f"[{found[1]}]({to('configs.md#' + anchor(whole))})"

    lines = text.split("\n")
    for i, line in enumerate(lines):
        if line.startswith(("#", "    ", "???")):
            continue
        line = re.sub(
            r"(?<![\[`])`((?:data|models|objectives|training|evaluation|partitioning)\.\w+)(?:\(\))?`", method, line
        )
        line = re.sub(r"(?<![\[/\w`])(`configs/[\w/]+\.gin`|configs/[\w/]+\.gin)(?![\w`])", config, line)
        line = re.sub(
            r"(?<![\[/\w`(])docs/(\w+\.md)",
            lambda found: (
                f"[{found[1].removesuffix('.md')}]({to(found[1])})"
                if (root / "docs" / found[1]).is_file()
                else found[0]
            ),
            line,
        )
        lines[i] = line
    return "\n".join(lines)
