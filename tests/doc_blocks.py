"""The blocks of code of a page, with what its comments say of them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Neither run: what they show is no command and no config.
SHOWN = ("text", "json")
COMMENT = r"(?:<!-- (?P<word>over|not run|not built): (?P<words>[^\n]*?) -->\n)?"
BLOCK = re.compile(rf"^{COMMENT}```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
      place: page and line.
      language: `sh`, `python`, `gin`; empty for what a terminal shows.
      text: the code.
      word, words: of a comment just before it. `over: FILE` says which config a fragment of gin goes behind; `not run: WHY`
        that it is not run; `not built: FILE; WHY` that a fragment's run is not built.
    """

    place: str
    language: str
    text: str
    word: str
    words: str


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            f"{page.name}:{text[: found.start('text')].count(chr(10))}",
            found["language"],
            found["text"],
            found["word"] or "",
            found["words"] or "",
        )
        for found in BLOCK.finditer(text)
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block as words; a quoted word may go over several lines."""
    held = ""
    for line in text.replace("\\\n", " ").splitlines(keepends=True):
        held += line
        try:
            words = shlex.split(held, comments=True)
        except ValueError:
            continue
        held = ""
        if words:
            yield words
    assert not held, f"a quote is left open: {held}"


def sessions(text: str) -> list[tuple[list[str], str]]:
    """What a terminal shows: each command, and what it answers."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    return [(shlex.split(part.partition("\n")[0]), part.partition("\n")[2]) for part in parts]
