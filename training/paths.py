"""Rules that name parameters by regular expressions on their paths, and that never silently do nothing."""

import difflib
import re
from collections.abc import Iterable, Sequence

from partitioning.errors import UserError


def nearest(pattern: str, names: Iterable[str], count: int = 3) -> str:
    """The names that look most like `pattern`, quoted, for an error message."""
    names = sorted(names)
    plain = re.sub(r"[\\^$.*+?()\[\]{}|]", "", pattern)
    found = difflib.get_close_matches(plain, names, n=count, cutoff=0.0)
    return ", ".join(repr(name) for name in found) or "none: there are no parameters"


def first_match(patterns: Sequence[str], names: Iterable[str], *, owner: str) -> dict[str, int]:
    """Index of the first pattern that matches each name in full; a name that none matches is left out.

    Args:
      patterns: regular expressions, tried in order with `re.fullmatch`.
      names: parameter paths such as "trunk/embed/tokens/table".
      owner: what the patterns belong to, for the message ("AdamW.decay").

    Raises:
      UserError: a pattern is no regular expression, matches no name, or is shadowed by those before it.
    """
    names = list(names)
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError(f"{owner}: {pattern!r} is not a regular expression: {error}") from None
    chosen = {}
    for name in names:
        for index, expression in enumerate(compiled):
            if expression.fullmatch(name):
                chosen[name] = index
                break
    for index, pattern in enumerate(patterns):
        if index in chosen.values():
            continue
        shadowed = [name for name in names if compiled[index].fullmatch(name)]
        if shadowed:
            raise UserError(
                f"{owner}: {pattern!r} never applies: earlier patterns take {shadowed[0]!r} and all it matches"
            )
        raise UserError(f"{owner}: {pattern!r} matches no parameter (in full); nearest: {nearest(pattern, names)}")
    return chosen


def found_by(patterns: Sequence[str], names: Iterable[str], *, owner: str) -> set[str]:
    """The names in which one of the patterns is found (`re.search`).

    Raises:
      UserError: a pattern is no regular expression, or is found in no name.
    """
    names, found = list(names), set()
    for pattern in patterns:
        try:
            hits = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"{owner}: {pattern!r} is not a regular expression: {error}") from None
        if not hits:
            raise UserError(f"{owner}: {pattern!r} matches no parameter; nearest: {nearest(pattern, names)}")
        found |= hits
    return found


def multipliers(rules: Sequence[tuple[str, float]], names: Iterable[str], *, owner: str) -> dict[str, float]:
    """The factor that the first matching rule gives to each name; names without a rule are left out.

    Raises:
      UserError: as `first_match`.
    """
    chosen = first_match([pattern for pattern, _ in rules], names, owner=owner)
    return {name: float(rules[index][1]) for name, index in chosen.items()}
