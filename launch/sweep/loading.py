"""Reads a sweep's configuration."""

from __future__ import annotations

from collections.abc import Sequence

from launch.config import load
from launch.sweep.description import Sweep


def read(config: str, allow_import: Sequence[str] = ()) -> Sweep:
    """The sweep that a gin file describes.

    Raises:
      UserError: whatever of it does not fit.
    """
    extra = ("launch.sweep", *allow_import)
    return load([config], top="launch.sweep.Sweep", allow_import=extra, exercise=lambda sweep: None).value
