"""`python -m docs.generator [FOLDER]`: writes all pages into a folder, build/docs by default, for `make docs`."""

import shutil
import sys
from pathlib import Path

from docs.generator.command import command_page
from docs.generator.configs import config_page
from docs.generator.links import linked
from docs.generator.methods import entries, method_pages
from docs.generator.notebooks import notebook_pages

ROOT = Path(__file__).resolve().parents[2]


def pages() -> dict[str, str]:
    """All pages by path, links between them set."""
    found = {"index.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    found |= {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
    found["results.md"] = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    found["configs.md"] = config_page(ROOT / "configs")
    found |= notebook_pages(ROOT / "launch" / "notebooks")
    found["commands.md"] = command_page()
    methods = entries(ROOT)
    found |= method_pages(methods)
    places = {entry.name: entry.place for entry in methods}
    return {name: linked(name, text, places, ROOT) for name, text in found.items()}


def write(folder: Path) -> None:
    """Writes the pages, and the files that they link to, into a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in pages().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "assets", folder / "assets")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs")
