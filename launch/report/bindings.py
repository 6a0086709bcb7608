"""What two configurations bind otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launch.syntax import Binding, Macro, Reference, statements, written


@dataclass(frozen=True)
class Change:
    """A name that is bound otherwise.

    Args:
      name: of the binding.
      base, other: its values as gin writes them; None where it is not bound.
    """

    name: str
    base: str | None
    other: str | None


def bindings_of(text: str, file: str) -> dict[str, str]:
    """The values of a configuration without includes, by name, as gin writes them; nothing is imported.

    Args:
      text: of the configuration.
      file: where it stands, for messages.

    Raises:
      UserError: it does not parse.
    """
    return {written(s): shown(s.value) for s in statements(text, file) if isinstance(s, Binding)}


def changes(base: Mapping[str, str], other: Mapping[str, str], *, seed: bool = False) -> list[Change]:
    """Where `other` departs from `base`, by name.

    Args:
      base, other: from `bindings_of`.
      seed: whether the run's seed counts.
    """
    names = [name for name in sorted({*base, *other}) if seed or name != "training.Run.seed"]
    return [Change(n, base.get(n), other.get(n)) for n in names if base.get(n) != other.get(n)]


def shown(value: object) -> str:
    """A value as gin writes it."""
    if isinstance(value, Reference):
        return "@" + "/".join((*value.scope, value.name)) + ("()" if value.call else "")
    if isinstance(value, Macro):
        return f"%{value.name}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{shown(k)}: {shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))}{',' if len(value) == 1 else ''})"
    return repr(value)
