"""Plain text as Markdown that shows it as it is."""

import re

SPECIAL = re.compile(r"([\\*_\[\]<>|#~^])")


def plain(text: str) -> str:
    """Text whose only markup is code between backticks."""
    parts = re.split(r"(`[^`\n]*`)", text)
    return "".join(part if part.startswith("`") and len(part) > 1 else _escaped(part) for part in parts)


def cell(text: str) -> str:
    """As `plain`, in one line of a table."""
    parts = re.split(r"(`[^`\n]*`)", " ".join(text.split()))
    return "".join(p.replace("|", "\\|") if p.startswith("`") and len(p) > 1 else _escaped(p) for p in parts)


def slug(text: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text.lower())).strip("-")


def _escaped(text: str) -> str:
    return SPECIAL.sub(lambda found: {"<": "&lt;", ">": "&gt;"}.get(found[1], "\\" + found[1]), text)
