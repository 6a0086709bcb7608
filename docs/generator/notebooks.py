"""The notebooks as pages: what they say, and their code."""

import json
from pathlib import Path


def notebook_pages(folder: Path) -> dict[str, str]:
    """A page a notebook."""
    return {f"notebooks/{path.stem}.md": _page(path) for path in sorted(folder.glob("*.ipynb"))}


def _page(path: Path) -> str:
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    # Below the title, which every first cell begins with.
    title, _, rest = "\n\n".join(parts).partition("\n")
    return f"{title}\n\nA notebook: `launch/notebooks/{path.name}`, for Colab's CPUs, GPUs and TPUs.\n{rest}\n"
