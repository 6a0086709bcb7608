"""What was asked for on the command line, and the sweep that it describes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from launch.config import load
from launch.sweep.description import Sweep


@dataclass(frozen=True)
class Asked:
    """A sweep's configuration on the command line.

    Args:
      paths: gin files.
      overrides: bindings such as `Sweep.seeds = [0]`.
      allow_import: further modules that it and its runs may import and call.
    """

    paths: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    allow_import: tuple[str, ...] = ()

    def read(self) -> Sweep:
        """The sweep.

        Raises:
          UserError: whatever of it does not fit.
        """
        extra = ("launch.sweep", *self.allow_import)
        return load(
            self.paths, self.overrides, top="launch.sweep.Sweep", allow_import=extra, exercise=lambda sweep: None
        ).value

    def words(self) -> list[str]:
        """The same as words of a command line."""
        return [
            *self.paths,
            *self.overrides,
            *(word for name in self.allow_import for word in ("--allow-import", name)),
        ]

    def text(self) -> str:
        """As one word, for a process."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Asked:
        """The inverse of `text`."""
        return cls(**{name: tuple(value) for name, value in json.loads(text).items()})
