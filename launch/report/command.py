"""`palmette report`: from folders to one page, and its figures and tables as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.report.page import rendered, write, write_csv
from launch.report.parts import Section
from partitioning.errors import UserError


def report(
    paths: Sequence[Path],
    *,
    out: Path,
    csv: Path | None = None,
    png: Path | None = None,
    allow_import: Sequence[str] = (),
) -> list[str]:
    """Writes the page of some runs, or of a sweep.

    Args:
      paths: runs' folders, or one sweep's.
      out: the page's file.
      csv: a folder for every figure and table as comma-separated values.
      png: a folder for them as pictures; needs a Chromium.
      allow_import: further modules that the runs' configurations may import.

    Returns:
      What was written, in lines.

    Raises:
      UserError: folders that are none of a run or sweep, or that have logged nothing; places that cannot be written.
    """
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder, expected a file to write, such as {out / 'report.html'}")
    for option, folder in (("--csv", csv), ("--png", png)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"{option} {folder}: is a file, expected a folder")
    if png is not None:
        from launch.report.browser import chromium

        program = chromium()
    title, kind, sections = _sections(paths, allow_import)
    sections = distinct(sections)
    page = rendered(title, kind, sections)
    write(out, page)
    said = [line for section in sections if section.name == "examples" for line in section.words]
    said.append(f"{out}: {len(page.encode()) / 1e6:.1f} MB")
    if csv is not None:
        said.append(f"{csv}: {len(write_csv(csv, sections))} files")
    if png is not None:
        from launch.report.browser import write_png

        said.append(f"{png}: {len(write_png(program, out, png, sections))} pictures")
    return said


def distinct(sections: Sequence[Section]) -> list[Section]:
    """The same with a number behind each name that stands twice: names are the page's anchors and the files' names."""
    seen: dict[str, int] = {}

    def once(name: str) -> str:
        seen[name] = seen.get(name, 0) + 1
        return name if seen[name] == 1 else f"{name}-{seen[name]}"

    named = [replace(section, name=once(section.name)) for section in sections]
    return [
        replace(section, parts=[replace(part, name=once(part.name)) for part in section.parts]) for section in named
    ]


def _sections(paths: Sequence[Path], allow_import: Sequence[str]) -> tuple[str, str, list[Section]]:
    from launch.report.sweep_folder import SweepFolder, is_sweep

    sweeps = [path for path in paths if is_sweep(path)]
    if sweeps and len(paths) > 1:
        raise UserError(f"{sweeps[0]}: is a sweep, which has a page of its own: give it alone")
    if sweeps:
        from launch.report import sweep_page

        sweep = SweepFolder.read(sweeps[0])
        return sweep.name, "a sweep", sweep_page.sections(sweep)
    from launch.report import run_page
    from launch.report.inside import inside
    from launch.report.run_folder import RunFolder

    runs = [RunFolder.read(path, name) for path, name in zip(paths, run_page.named(paths), strict=True)]
    found = run_page.sections(runs)
    # Before the configuration and the environment.
    found[-2:-2] = inside(runs, allow_import)
    return ", ".join(run.name for run in runs), "a run" if len(runs) == 1 else "runs", found
