"""The verbs of the `palmette` command. Each imports what it needs when it runs, so that `--help` answers at once."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.checkpoints import RunFolder, place
from launch.checkpoints import app as checkpoints
from launch.tpu_vm.verbs import pods
from partitioning.errors import UserError

if TYPE_CHECKING:
    from launch.config import Resolved

app = typer.Typer(
    name="palmette",
    help="Trains text models: any architecture, any objective, any mesh, one gin file a run.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG.gin... [OVERRIDE]...",
        help='Configuration files, then overrides such as "RandomTokens.rate = 0.4".',
        show_default=False,
    ),
]
AllowImport = Annotated[
    list[str] | None,
    typer.Option(help="A further module that the configuration may import and call. May be given again."),
]
reading = typer.Typer(help="Look at what a run reads.", no_args_is_help=True)
app.add_typer(reading, name="data")
app.add_typer(pods, name="pod")
app.add_typer(checkpoints, name="checkpoints")


@app.command()
def prepare(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK... | CONFIG.gin... [OVERRIDE]...", help="Tasks by name, or a run's configuration."
        ),
    ],
    folder: Annotated[str | None, typer.Option(help="Where prepared data is kept, for tasks by name.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a cache made otherwise.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="How many processes tokenise.")] = 1,
    allow_import: AllowImport = None,
) -> None:
    """Tokenise text once into a cache: of a named task, or of what a configuration reads."""
    if any(_is_file(argument) for argument in what):
        if folder is not None:
            raise UserError("--folder goes with tasks by name: a configuration says itself where its data is kept")
        # What will be built may need the very data that is to be prepared, so nothing is built abstractly here.
        run = _resolve(what, allow_import, exercise=False).value
        run.prepare(overwrite=overwrite, processes=processes, report=typer.echo)
        return
    import data

    for task in what:
        done = data.prepare(task, folder=folder, overwrite=overwrite, processes=processes, report=typer.echo)
        typer.echo(done)


@reading.command()
def show(
    arguments: Arguments,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 4,
    step: Annotated[int, typer.Option(min=0, help="Of which step of the run.")] = 0,
    allow_import: AllowImport = None,
) -> None:
    """Print rows as the model sees them: packed, masked, coloured by segment."""
    from launch.rows import show as show_rows

    show_rows(_resolve(arguments, allow_import).value, step=step, rows=rows)


@app.command()
def train(
    arguments: Arguments,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder, local or gs://.", parser=place, show_default="runs/CONFIG")
    ] = None,
    copy: Annotated[
        Path | None, typer.Option(help="Another folder for every checkpoint; steps wait for both.", parser=place)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Resolve, check and count; train nothing.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Run unjitted and stop at the first NaN.")] = False,
    profile: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="Trace these steps for TensorBoard, into OUT/profile.")
    ] = None,
    dump: Annotated[
        bool, typer.Option("--dump", help="Write the compiled step and its memory into OUT/programs.")
    ] = False,
    hosts: Annotated[int | None, typer.Option(min=1, help="Of several hosts: how many.", show_default=False)] = None,
    host: Annotated[int | None, typer.Option(min=0, help="Which one this is, from 0.", show_default=False)] = None,
    coordinator: Annotated[
        str | None, typer.Option(metavar="ADDRESS:PORT", help="Of host 0, as all reach it.", show_default=False)
    ] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Ask a TPU pod, Slurm or Open MPI for these.")] = False,
    patience: Annotated[float, typer.Option(min=2, help="Seconds after which a silent host is gone.")] = 30.0,
    allow_import: AllowImport = None,
) -> None:
    """Train what a configuration describes; run again, it resumes."""
    from launch.hosts import Meeting, met

    folder = out if out is not None else Path("runs") / Path(_split(arguments)[0][-1]).stem
    _check_folder(folder)
    _check_folder(copy, "--copy")
    if dump and debug:
        raise UserError("--dump writes a compiled step, and --debug compiles none: leave one out")
    from training.watch import Watch

    watch = Watch.of(profile, dump)
    with met(Meeting(hosts, host, coordinator, cluster, patience)) as others:
        resolved = _resolve(arguments, allow_import)
        if others is not None:
            others.begin_alike(resolved.operative)
        if dry_run:
            resolved.value.describe()
            return
        resolved.value.train(out=folder, copy=copy, operative=resolved.operative, debug=debug, watch=watch)


@app.command()
def sweep(
    arguments: Arguments,
    out: Annotated[Path | None, typer.Option(help="The sweep's folder.", show_default="sweeps/SWEEP")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at once.", show_default="one a core, or one a GPU")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan every arm and count; train nothing.")] = False,
    jobs: Annotated[bool, typer.Option("--jobs", help="Print a shell command a run, for a cluster.")] = False,
    run: Annotated[
        str | None, typer.Option(metavar="ARM/SEED", help="Do this run only, in this process.", show_default=False)
    ] = None,
    allow_import: AllowImport = None,
) -> int:
    """Run what differs in one thing, with several seeds, at an equal budget; run again, it goes on."""
    from launch.sweep import command
    from launch.sweep.loading import Asked

    paths, overrides = _split(arguments)
    asked = Asked(tuple(paths), tuple(overrides), tuple(allow_import or ()))
    folder = out if out is not None else Path("sweeps") / Path(paths[0]).stem
    _check_folder(folder)
    if sum((dry_run, jobs, run is not None)) > 1:
        raise UserError("--dry-run, --jobs and --run are three ways: leave two out")
    if dry_run:
        command.dry_run(asked)
    elif jobs:
        command.jobs(asked, folder)
    elif run is not None:
        return command.one(asked, folder, run)
    else:
        return command.local(asked, folder, processes)
    return 0


@app.command()
def plan(
    arguments: Arguments,
    topology: Annotated[str, typer.Option(help="TPU chips, such as v5p:8x8x8.", show_default=False)],
    slices: Annotated[int, typer.Option(min=1, help="How many such slices work together.")] = 1,
    json: Annotated[Path | None, typer.Option(help="A file for the same figures as JSON.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Rank meshes, remat policies and micro-batches.")] = False,
    most: Annotated[int, typer.Option(min=1, help="How many of them --search compiles.")] = 12,
    allow_import: AllowImport = None,
) -> None:
    """Compile a run's step for TPU chips that are not here: memory, FLOPs, collectives, least time."""
    from launch.plan import asked, planned, ranked

    wanted = asked(*_split(arguments), topology, slices, allow_import or ())
    if search:
        ranked(wanted, most=most, out=json)
    else:
        planned(wanted, out=json)


@app.command()
def evaluate(
    run: RunFolder,
    json: Annotated[Path | None, typer.Option(help="A file for the same figures as JSON.")] = None,
    allow_import: AllowImport = None,
) -> None:
    """Evaluate a run's newest complete checkpoint as its configuration says."""
    figures = _saved(run, allow_import).value.evaluate(run)
    if json is not None:
        from training.metrics import write_json

        write_json(json, figures)


@app.command()
def fill(
    run: RunFolder,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help='Such as "The [MASK] of a list."')],
    count: Annotated[int, typer.Option(min=1, help="Guesses a mask.")] = 3,
    allow_import: AllowImport = None,
) -> None:
    """Fill the [MASK]s of texts with a trained run."""
    from launch.fill import check_text, show

    for text in texts:
        check_text(text)
    trunk, tokenizer = _saved(run, allow_import).value.restore(run)
    for text in texts:
        typer.echo(show(trunk, tokenizer, text, count=count))


@app.command()
def generate(
    run: RunFolder,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="Texts to go on with.", show_default=False)
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line, instead of arguments.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(min=1e-4, max=1e4, help="Draw from softmax(logits / this).")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from so many likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Draw from the likeliest tokens of this mass.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Draw from tokens this likely beside the likeliest.")
    ] = None,
    beams: Annotated[int | None, typer.Option(min=2, help="Beam search over so many sequences.")] = None,
    contrastive: Annotated[
        float | None, typer.Option(min=0, max=1, help="Contrastive search, its penalty's weight.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draws.", show_default="0")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Cut the text before this. May be given again.")] = None,
    capacity: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of prompt and text.", show_default="as trained")
    ] = None,
    allow_import: AllowImport = None,
) -> None:
    """Go on with prompts by a trained left-to-right run: greedy, sampling, beam or contrastive search."""
    from launch import generate as writing

    options = writing.Options(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        beams=beams,
        contrastive=contrastive,
        seed=seed,
    )
    wanted = writing.prompts_of(texts or [], prompts)
    value = _saved(run, allow_import).value
    prefix = writing.reads(value, run)
    trunk, tokenizer = value.restore(run)
    parts = value.parts()
    ids, ends = writing.encoded(tokenizer, parts[-1].data, wanted)
    writing.check_room(trunk, ids, tokens, max(part.length for part in parts) if capacity is None else capacity)
    done = writing.generate(
        trunk, tokenizer, ids, options=options, tokens=tokens, ends=ends, stops=stop or (), prefix=prefix
    )
    for prompt, text in zip(wanted, done.texts, strict=True):
        # An encoder-decoder answers, it does not go on.
        typer.echo(text if trunk.two_sided else f"{prompt}{text}")
    typer.echo(done.speed())


@app.command("import")
def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="With config.json and safetensors.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(help="The part of a configuration to write, such as bert.gin.", show_default=False)
    ],
) -> None:
    """Check a model in the Hugging Face layout, and write the part of a configuration that trains on from it."""
    from launch.exchange import imported

    for line in imported(folder, out):
        typer.echo(line)


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    to: Annotated[str, typer.Option(help="The layout: hf, for Hugging Face.")] = "hf",
    allow_import: AllowImport = None,
) -> None:
    """Write a run's newest trunk in another layout."""
    from launch.exchange import exported

    if to != "hf":
        raise UserError(f"--to {to}: expected hf")
    for line in exported(_saved(run, allow_import).value, run, out):
        typer.echo(line)


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN... | SWEEP", help="Runs' folders, or one sweep's.", parser=place, show_default=False
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The page's file.", show_default="FOLDER/report.html")] = None,
    csv: Annotated[Path | None, typer.Option(help="A folder for every figure and table as CSV.")] = None,
    png: Annotated[Path | None, typer.Option(help="A folder for them as pictures; needs a Chromium.")] = None,
    allow_import: AllowImport = None,
) -> None:
    """Write one HTML page of runs or of a sweep: curves, tables with intervals, examples, configuration."""
    from launch.report.command import report as write_report

    page = folders[0] / "report.html" if out is None else out
    for line in write_report(folders, out=page, csv=csv, png=png, allow_import=allow_import or ()):
        typer.echo(line)


@app.command()
def ledger(
    sweeps: Annotated[
        list[Path] | None, typer.Argument(metavar="SWEEP...", help="Sweeps' folders to add.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="The page; a summary of each sweep lies in the folder of its name.")] = Path(
        "docs/ledger.md"
    ),
) -> None:
    """Write what papers claim and what sweeps have found: figure, interval, seeds, cost and verdict."""
    from launch.report.ledger import ledger as write_ledger

    for line in write_ledger(sweeps or [], out):
        typer.echo(line)


@app.command()
def config(arguments: Arguments, allow_import: AllowImport = None) -> None:
    """Print the whole resolved configuration, and what may be overridden."""
    resolved = _resolve(arguments, allow_import)
    typer.echo(resolved.operative)
    typer.echo("# What may be overridden: argument, what it takes, its own default.")
    names = max((len(p.name) for p in resolved.available), default=0)
    kinds = min(max((len(p.kind) for p in resolved.available), default=0), 60)
    for parameter in resolved.available:
        typer.echo(f"# {parameter.name:{names}}  {parameter.kind:{kinds}}  {parameter.default}")


@app.command()
def methods() -> None:
    """List every method: its name, what it does, and its source."""
    from launch.methods import methods as found

    for method in found():
        typer.echo(f"{method.name}: {method.sentence} [{method.source}]")


def _is_file(argument: str) -> bool:
    return argument.endswith(".gin") and "=" not in argument


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    paths = [a for a in arguments if _is_file(a)]
    overrides = [a for a in arguments if not _is_file(a)]
    for text in overrides:
        if "=" not in text:
            raise UserError(f"{text!r}: expected a file that ends in .gin, or an override `Class.argument = 1`")
    if not paths:
        raise UserError("no configuration given: expected a file that ends in .gin, such as configs/quickstart.gin")
    return paths, overrides


def _resolve(arguments: list[str], allow_import: list[str] | None, *, exercise: bool = True) -> "Resolved":
    paths, overrides = _split(arguments)
    from launch.config import load

    build = (lambda run: run.abstract()) if exercise else None
    return load(paths, overrides, allow_import=allow_import or (), exercise=build)


def _saved(run: Path, allow_import: list[str] | None) -> "Resolved":
    path = run / "config.gin"
    if not path.is_file():
        raise UserError(f"{run}: no config.gin in it, expected the folder of a run (`palmette train ... --out {run}`)")
    return _resolve([str(path)], allow_import)


def _check_folder(folder: Path | None, option: str = "--out") -> None:
    if folder is None or str(folder).startswith("gs://"):
        return
    if re.match(r"\w+:/", str(folder)):
        raise UserError(f"{option} {folder}: a sweep's folder is one of the file system")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{option} {folder}: {there} is a file, expected a folder")
