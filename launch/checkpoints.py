"""`palmette checkpoints`: look at a run's checkpoints, check them, average them, lay them out for another mesh."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from partitioning.errors import UserError

app = typer.Typer(help="Look at a run's checkpoints, check, average and rewrite them.", no_args_is_help=True)


def place(address: str) -> Path:
    """A folder to read, of the file system or of a bucket."""
    from checkpoints import folder

    return folder.place(address)


RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder, local or gs://.", parser=place, show_default=False)
]
Steps = Annotated[list[int] | None, typer.Option("--step", help="Of which step; may be given again.", min=0)]
Out = Annotated[Path, typer.Option(help="The run's folder to write.", show_default=False)]


@app.command("list")
def list_(run: RunFolder) -> None:
    """Print each checkpoint: its step, size, time, and the figures it was judged by."""
    from datetime import datetime

    from checkpoints.faults import BrokenError

    store = _opened(run)
    for step in store.steps():
        size, written = _size(store.folder / str(step))
        try:
            record = store.record(step)
        except BrokenError as error:
            typer.echo(f"{step:>9}  {_mib(size)}  broken: {error}")
            continue
        when = datetime.fromtimestamp(written).strftime("%Y-%m-%d %H:%M:%S")
        figures = "  ".join(f"{name} {value:.4f}" for name, value in record["metadata"].get("figures", {}).items())
        typer.echo(f"{step:>9}  {_mib(size)}  {when}  {len(record['leaves'])} arrays  {figures}".rstrip())


@app.command()
def verify(run: RunFolder, step: Steps = None) -> None:
    """Read checkpoints whole and compare every array with its checksum; exit 2 where one is broken."""
    store = _opened(run)
    broken = []
    for number in _chosen(store, run, step):
        try:
            store.verify(number)
            typer.echo(f"{number:>9}  whole")
        except UserError as error:
            broken.append(number)
            typer.echo(f"{number:>9}  broken: {str(error).partition(': ')[2]}")
    if broken:
        raise UserError(
            f"{run}: {len(broken)} broken: step {', '.join(map(str, broken))}: a run goes on from the others"
        )


@app.command()
def average(run: RunFolder, out: Out, step: Steps = None) -> None:
    """Write the mean of the parameters of several checkpoints (all, or those of --step) as a run to evaluate or export."""
    from training.averaging import averaged

    store = _opened(run)
    typer.echo(averaged(run, _chosen(store, run, step), out))


@app.command()
def reshard(
    run: RunFolder,
    out: Out,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OVERRIDE]...", help='Such as "Run.rules = @partitioning.fsdp()".', show_default=False),
    ] = None,
    allow_import: Annotated[list[str] | None, typer.Option(help="As in `palmette train`.")] = None,
) -> None:
    """Write a run's newest checkpoint in the pieces of this machine's devices under other rules.

    Every checkpoint restores onto any mesh: this only spares each device of the new one reading more than its part.
    JAX_NUM_CPU_DEVICES stands in for devices that are not there.
    """
    import jax

    from checkpoints.folder import checkpoints_in
    from launch.config import load
    from training.store import Store

    _opened(run)
    _new(out)
    resolved = load([str(run / "config.gin")], overrides or [], allow_import=allow_import or ())
    plan = resolved.value.plan()
    state, control = Store(plan, checkpoints_in(run)).restore()
    written = Store(plan, checkpoints_in(out))
    with written.checkpoints:
        written.start(state)
        written.save(state, control)
    (out / "config.gin").write_text(resolved.operative, encoding="utf-8")
    mesh = ", ".join(f"{name} {size}" for name, size in plan.placement.mesh.shape.items() if size > 1) or "one device"
    typer.echo(f"{out}: step {int(state.step)}, in the pieces of {len(jax.devices())} devices ({mesh})")


def _opened(run: Path) -> Any:
    from checkpoints.folder import checkpoints_in
    from checkpoints.store import Checkpoints

    store = Checkpoints(checkpoints_in(run))
    if not store.steps():
        raise UserError(f"{run}: has no checkpoints, expected the folder of a run")
    return store


def _chosen(store: Any, run: Path, asked: list[int] | None) -> list[int]:
    there = store.steps()
    unknown = sorted(set(asked or []) - set(there))
    if unknown:
        raise UserError(f"{run}: no checkpoint of step {unknown[0]}; steps there: {', '.join(map(str, there))}")
    return sorted(set(asked)) if asked else there


def _new(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out}: is there already: expected a new folder")


def _below(folder: Any) -> Iterator[Any]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _below(path)
        else:
            yield path


def _size(folder: Any) -> tuple[int, float]:
    """Bytes of a checkpoint's files, in whatever store they are, and when the last was written."""
    files = [path.stat() for path in _below(folder)]
    return sum(file.length for file in files), max(file.mtime for file in files)


def _mib(size: int) -> str:
    return f"{size / 2**20:>10,.1f} MiB"
