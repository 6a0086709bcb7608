"""What a pod is, from a file, and the cloud's command for each thing that is done with it.

The pod is a queued resource: a request that waits for its chips, has them until it is deleted or preempted, and is one or
several slices. `gcloud compute tpus queued-resources` does all of it, on every worker of every slice.
"""

from __future__ import annotations

import dataclasses
import shlex
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from launch.check import expected
from partitioning.errors import UserError
from partitioning.ranges import Range

Command = tuple[str, ...]
ARCHIVE = "palmette.tar.gz"
LOG = "palmette.log"

# The virtual environment is made by uv: images of TPU machines have a Python that is too old.
INSTALL = f"""
mkdir -p palmette && tar -xzf {ARCHIVE} -C palmette && cd palmette &&
{{ command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh; }} &&
{{ test -d .venv || ~/.local/bin/uv venv --quiet --python 3.12 .venv; }} &&
~/.local/bin/uv pip install --quiet --python .venv/bin/python -e '.[tpu,gcs]'
"""

# Behind the run its status: `watch` reads it. A run that is going is not started a second time.
START = """
set -e
if test -e palmette.pid && kill -0 "$(cat palmette.pid)" 2>/dev/null; then echo 'a run is going here' >&2; exit 1; fi
echo starting > {log}
cd palmette
nohup sh -c {run} >> ~/{log} 2>&1 < /dev/null &
echo $! > ~/palmette.pid
"""


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod and what runs on it.

    Args:
      name: of the queued resource.
      zone: where.
      type: accelerator type of one slice, such as v5p-512.
      runtime: image of the machines, such as v2-alpha-tpuv5.
      run: what stands behind `palmette train`.
      project: None for gcloud's own.
      slices: how many.
      spot: cheaper, and may be preempted.
      reserved: from a reservation.
    """

    name: str
    zone: str
    type: str
    runtime: str
    run: list[str]
    project: str | None = None
    slices: Annotated[int, Range(1, 4096)] = 1
    spot: bool = False
    reserved: bool = False

    @classmethod
    def read(cls, path: Path) -> Pod:
        """From a TOML file with these keys.

        Raises:
          UserError: no such file, no TOML, a key that is missing, unknown or of another type.
        """
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: expected a file as launch/tpu_vm/example.toml") from None
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path}: no TOML: {error}") from None
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in found:
            if key not in fields:
                raise UserError(f"{path}: unknown key {key!r}: expected one of {', '.join(fields)}")
        annotations = typing.get_type_hints(cls, include_extras=True)
        for name, field in fields.items():
            if name not in found and field.default is dataclasses.MISSING:
                raise UserError(f"{path}: the key {name!r} is missing")
            if name in found and (wanted := expected(found[name], annotations[name])) is not None:
                raise UserError(f"{path}: {name} = {found[name]!r}: expected {wanted}")
        return cls(**found)

    def __str__(self) -> str:
        kind = " (spot)" if self.spot else " (reserved)" if self.reserved else ""
        return f"{self.slices} x {self.type}{kind} in {self.zone}"

    def _gcloud(self, *words: str) -> Command:
        place = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
        return ("gcloud", "compute", "tpus", "queued-resources", *words, *place)

    def create(self) -> Command:
        """Asks for the chips; returns before they are there."""
        several = (f"--node-count={self.slices}", f"--node-prefix={self.name}")
        nodes = (f"--node-id={self.name}",) if self.slices == 1 else several
        kind = [f"--{name}" for name in ("spot", "reserved") if getattr(self, name)]
        what = (f"--accelerator-type={self.type}", f"--runtime-version={self.runtime}", *nodes, *kind)
        return self._gcloud("create", self.name, *what, "--async")

    def state(self) -> Command:
        """Prints the request's state."""
        return self._gcloud("describe", self.name, "--format=value(state.state)")

    def copy(self, archive: Path) -> Command:
        """Copies a file to every worker."""
        return self._gcloud("scp", str(archive), f"{self.name}:{ARCHIVE}", "--node=all", "--worker=all")

    def everywhere(self, script: str) -> Command:
        """Runs a script on every worker."""
        return self._gcloud("ssh", self.name, "--node=all", "--worker=all", f"--command={script.strip()}")

    def install(self) -> Command:
        """Unpacks and installs what was copied."""
        return self.everywhere(INSTALL)

    def start(self) -> Command:
        """Starts the run on every worker, and leaves it."""
        # The workers find each other by what the cloud tells each of them.
        run = shlex.join([".venv/bin/palmette", "train", *self.run, "--cluster"])
        return self.everywhere(START.format(log=LOG, run=shlex.quote(f"{run}; echo exit $?")))

    def log(self) -> Command:
        """Prints the end of the first worker's log."""
        return self._gcloud("ssh", self.name, "--node=0", "--worker=0", f"--command=tail -n 5 {LOG}")

    def delete(self) -> Command:
        """Gives the chips back, and waits until they are gone."""
        return self._gcloud("delete", self.name, "--force", "--quiet")
