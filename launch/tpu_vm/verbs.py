"""The `palmette pod` verbs: create, sync, run, watch, resume, delete."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from launch.ours import OURS, ROOT
from launch.tpu_vm.pod import ARCHIVE, Command, Pod
from partitioning.errors import UserError

pods = typer.Typer(help="A pod of Cloud TPUs and the run on it.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="POD.toml", help="As launch/tpu_vm/example.toml.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the commands; call none.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask before what costs money or deletes.")]
Every = Annotated[float, typer.Option(min=0.01, help="Seconds between two looks.")]

# Exit status of `watch` when the chips are gone and `resume` would bring them back.
PREEMPTED = 75
GONE = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING")


@pods.command()
def create(file: File, yes: Yes = False, dry_run: DryRun = False) -> None:
    """Ask for the chips. COSTS MONEY from the moment they are there until `delete`."""
    pod = Pod.read(file)
    _ask(f"{pod}: billed from ACTIVE until `palmette pod delete {file}`", yes or dry_run)
    _call(pod.create(), dry_run)


@pods.command()
def sync(file: File, dry_run: DryRun = False) -> None:
    """Copy this project to every worker and install it there."""
    pod = Pod.read(file)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / ARCHIVE
        if not dry_run:
            _pack(archive)
        _call(pod.copy(archive), dry_run)
    _call(pod.install(), dry_run)


@pods.command()
def run(file: File, dry_run: DryRun = False) -> None:
    """Start the run on every worker; it goes on when this machine is gone."""
    _call(Pod.read(file).start(), dry_run)


@pods.command()
def watch(file: File, every: Every = 30.0, dry_run: DryRun = False) -> None:
    """Print state and log until the run ends, and exit with its status; with 75 when the chips were taken away."""
    pod = Pod.read(file)
    if dry_run:
        _call(pod.state(), dry_run)
        return _call(pod.log(), dry_run)
    seen = ""
    while True:
        state = _asked(pod.state())
        if state in GONE:
            typer.echo(f"{state}: palmette pod resume {file}")
            raise typer.Exit(PREEMPTED)
        lines = _asked(pod.log()) if state == "ACTIVE" else ""
        if (now := f"{state}\n{lines}".strip()) != seen:
            typer.echo(now)
            seen = now
        last = lines.splitlines()[-1] if lines else ""
        if last.startswith("exit "):
            raise typer.Exit(int(last.removeprefix("exit ")))
        time.sleep(every)


@pods.command()
def resume(file: File, yes: Yes = False, every: Every = 30.0, dry_run: DryRun = False) -> None:
    """Ask again for chips that were taken away, and go on with the run. COSTS MONEY as `create`."""
    pod = Pod.read(file)
    _ask(f"{pod}: billed again from ACTIVE until `palmette pod delete {file}`", yes or dry_run)
    if dry_run or _asked(pod.state()) in GONE:
        _call(pod.delete(), dry_run)
        _call(pod.create(), dry_run)
    if dry_run:
        _call(pod.state(), dry_run)
    while not dry_run and (state := _asked(pod.state())) != "ACTIVE":
        if state in GONE:
            raise UserError(
                f"{pod.name}: {state} before it was active: look at `gcloud compute tpus queued-resources list`"
            )
        time.sleep(every)
    sync(file, dry_run)
    run(file, dry_run)


@pods.command()
def delete(file: File, yes: Yes = False, dry_run: DryRun = False) -> None:
    """Give the chips back: billing ends, and what is on their disks is lost."""
    pod = Pod.read(file)
    _ask(f"{pod}: deleted with its disks; what a run wrote elsewhere stays", yes or dry_run)
    _call(pod.delete(), dry_run)


def _ask(what: str, yes: bool) -> None:
    typer.echo(what)
    if not yes:
        typer.confirm("Go on?", abort=True)


def _call(command: Command, dry_run: bool) -> None:
    """Runs a command, its output on the screen."""
    if dry_run:
        typer.echo(shlex.join(command))
        return
    _check()
    status = subprocess.run(command, check=False).returncode
    if status:
        raise UserError(f"`{shlex.join(command[:6])} ...` ended with status {status}: see above")


def _asked(command: Command) -> str:
    """What a command prints."""
    _check()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise UserError(f"`{shlex.join(command[:6])} ...` ended with status {done.returncode}: {said[-1]}")
    return done.stdout.strip()


def _check() -> None:
    if shutil.which("gcloud") is None:
        raise UserError("gcloud is not on PATH: install the Google Cloud CLI, or look with --dry-run")


def _pack(archive: Path) -> None:
    """The project's packages and what installs them; no caches, runs or environments."""
    keep = lambda item: None if "__pycache__" in item.name else item
    with tarfile.open(archive, "w:gz") as out:
        for name in ("pyproject.toml", "README.md", *OURS, "launch"):
            out.add(ROOT / name, name, filter=keep)
