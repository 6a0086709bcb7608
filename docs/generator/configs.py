"""The page of shipped configs: each with its header and its text."""

from pathlib import Path

from docs.generator.markdown import plain

FOLDERS = {
    "": ("Runs", "Each trains as it stands: `palmette train configs/NAME.gin`. Two cores are enough."),
    "ablations": ("Sweeps", "Each changes one thing at an equal budget: `palmette sweep configs/ablations/NAME.gin`."),
    "pods": ("Pods", "Published sizes for TPU slices; `palmette plan configs/pods/NAME.gin --topology ...` first."),
    "ablations/parts": ("Parts of sweeps", "What the arms of sweeps are put together of."),
    "parts": ("Parts", "What several runs share, included by `include 'parts/NAME.gin'`: sizes of published models."),
}


def config_page(root: Path) -> str:
    """The page of all files under configs/."""
    lines = ["# Configs", "", "The header of each says what it trains, what was measured, and what to override."]
    for folder, (title, words) in FOLDERS.items():
        files = sorted((root / folder).glob("*.gin"))
        if files:
            lines += ["", f"## {title}", "", words]
        for path in files:
            lines += _entry(path, path.relative_to(root.parent).as_posix())
    return "\n".join(lines) + "\n"


def anchor(path: str) -> str:
    """The anchor of a config: `configs/pods/llama_8b.gin` is `pods-llama_8b`."""
    return path.removeprefix("configs/").removesuffix(".gin").replace("/", "-")


def _entry(path: Path, name: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    header = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        # A line that ends a sentence ends what it says.
        header.append(plain(line.lstrip("# ")) + ("<br>" if line.endswith(".") else ""))
    shown = [f"    {line}".rstrip() for line in ("```gin", *text.rstrip().splitlines(), "```")]
    return ["", f"### {path.stem} {{ #{anchor(name)} }}", "", *header, "", f'??? example "`{name}`"', "", *shown]
