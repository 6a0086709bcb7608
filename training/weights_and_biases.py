"""Weights & Biases: a run's figures on its service, or kept for it offline."""

import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partitioning.errors import UserError

FILE = "wandb.json"
"""In a run's folder: which run of the service it is."""
BINDING = re.compile(r"^([\w/.]+) = ", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class WeightsAndBiases:
    """A run of Weights & Biases that has the figures of `metrics.jsonl` by step, and the config.

    A run that is resumed goes on in the same run there. The service keeps what it was told first of a step: of steps that
    are done again after a kill it shows the first figures, the file the last ones. The package's own environment says the
    rest: `WANDB_MODE=offline` keeps all in the run's folder for `wandb sync`, `WANDB_API_KEY` is the key.

    Args:
      project: the project there.
      entity: a user or team; None for the account's own.
      name: the run's name there; None for the end of its folder's path.

    Raises:
      UserError: the package `wandb` is not installed, or there is no key, or the service does not answer.
    """

    project: str = "palmette"
    entity: str | None = None
    name: str | None = None

    def check(self) -> None:
        """Whether the package is there."""
        _package()

    def open(self, folder: Path, *, step: int) -> "OpenRun":
        """Begins a run, or goes on with the one that this folder's earlier starts began."""
        wandb = _package()
        path = folder / FILE
        known = json.loads(path.read_text(encoding="utf-8"))["id"] if path.exists() else secrets.token_hex(8)
        try:
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                name=self.name or "/".join(folder.absolute().parts[-2:]),
                id=known,
                resume="allow",
                dir=str(folder),
                # Whoever calls may have a run of theirs, and what is printed is theirs too.
                reinit="create_new",
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise UserError(f"Weights & Biases: {error}") from None
        path.write_text(json.dumps({"id": known}) + "\n", encoding="utf-8")
        return OpenRun(run, wandb.Histogram)


class OpenRun:
    """An open run of Weights & Biases.

    Args:
      run: as `wandb.init` returns it.
      histogram: makes one of a list of finite numbers.
    """

    def __init__(self, run: Any, histogram: Any):
        self._run, self._histogram = run, histogram

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds numbers by name, at one step, and lists of numbers as histograms."""
        found: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, list):
                finite = [number for number in map(float, value) if math.isfinite(number)]
                found |= {name: self._histogram(finite)} if finite else {}
            else:
                found[name] = float(value)
        self._run.log(found, step=step)

    def text(self, step: int, name: str, value: str) -> None:
        """Adds a text to the run's config: a configuration by its bindings, so that runs can be compared by them."""
        names = [*BINDING.finditer(value)]
        ends = [*(found.start() for found in names[1:]), len(value)]
        bindings = {found[1]: value[found.end() : end].strip() for found, end in zip(names, ends, strict=True)}
        self._run.config.update(bindings or {name: value}, allow_val_change=True)

    def close(self, *, failed: bool) -> None:
        """Ends the run: what is left is sent first."""
        self._run.finish(exit_code=int(failed))


def _package() -> Any:
    try:
        import wandb

        # Offline runs leave folders called wandb, which Python takes for a package without anything in it.
        _ = wandb.init
    except (ImportError, AttributeError):
        raise UserError(
            "training.WeightsAndBiases needs the package wandb: pip install 'palmette[wandb]', or leave the binding out"
        ) from None
    return wandb
