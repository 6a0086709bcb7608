"""A sweep's folder: what it is, what is done, and what its runs left behind.

sweep.json                  the sweep
arms/ARM/arm.json           what the budget pays for, worked out once
arms/ARM/SEED/              a run, as `palmette train` writes it
arms/ARM/SEED/result.json   its end; a run without one is not finished
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.sweep.description import Arm, Sweep
from partitioning.errors import UserError

GOODPUT = "goodput/"


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Where a run of a sweep is."""
    return out / "arms" / arm / str(seed)


def described(config: str, sweep: Sweep) -> dict[str, Any]:
    """A sweep as `sweep.json` has it."""
    return {
        "config": config,
        "base": sweep.base,
        "question": sweep.question,
        "claim": sweep.claim,
        "source": sweep.source,
        "expected": dict(sweep.expected),
        "metric": list(sweep.metric),
        "budget": {"kind": sweep.budget.kind, "amount": sweep.budget.amount},
        "seeds": list(sweep.seeds),
        "axes": [{"name": axis.name, "options": list(axis.options)} for axis in sweep.named()],
        "arms": [
            {
                "name": arm.name,
                "options": dict(arm.options),
                "overrides": list(arm.overrides),
                "configs": list(arm.configs),
            }
            for arm in sweep.arms()
        ],
        "baseline": sweep.first,
    }


def claim(out: Path, config: str, sweep: Sweep) -> None:
    """Makes a folder this sweep's, or sees that it is: more arms, seeds and words are fine.

    Raises:
      UserError: it holds another sweep, or something else.
    """
    path, new = out / "sweep.json", described(config, sweep)
    if path.exists():
        old = read_sweep(out)
        here = {arm["name"]: arm for arm in new["arms"]}
        for what in ("base", "metric", "budget"):
            if old.get(what) != new[what]:
                raise _other(out, f"{what} {_short(old.get(what))}", f"{_short(new[what])} here")
        for arm in old.get("arms", []):
            if arm["name"] in here and arm != here[arm["name"]]:
                told = _short([*arm["configs"], *arm["overrides"]])
                raise _other(out, f"arm {arm['name']}: {told}", "another here")
        if not {arm["name"] for arm in old.get("arms", [])} & set(here):
            raise _other(out, f"arms {_short([arm['name'] for arm in old.get('arms', [])])}", "none of them here")
    elif out.exists() and any(path.name != ".in_use" for path in out.iterdir()):
        raise UserError(f"{out}: holds something else than a sweep (no sweep.json): use another --out")
    out.mkdir(parents=True, exist_ok=True)
    _write(path, new)


@contextmanager
def claimed(out: Path, config: str, sweep: Sweep) -> Iterator[None]:
    """A folder that is this sweep's for the block; what is refused before any run has begun leaves it as it was.

    Raises:
      UserError: as `claim`.
    """
    path = out / "sweep.json"
    before = path.read_text(encoding="utf-8") if path.exists() else None
    claim(out, config, sweep)
    try:
        yield
    except UserError:
        if before is not None:
            path.write_text(before, encoding="utf-8")
        elif not any((out / "arms").glob("*/*/")):
            shutil.rmtree(out / "arms", ignore_errors=True)
            for file in (path, *out.glob("worker_*.log")):
                file.unlink(missing_ok=True)
        raise


def read_sweep(out: Path) -> dict[str, Any]:
    """A folder's `sweep.json`.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = out / "sweep.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{out}: no sweep.json in it, expected a sweep's folder (`palmette sweep ... --out`)") from None
    except ValueError:
        raise UserError(f"{path}: is not JSON: restore it, or use another --out") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object")
    return found


def result(out: Path, arm: str, seed: int) -> dict[str, Any] | None:
    """A run's `result.json`; None where it is not finished."""
    path = run_folder(out, arm, seed) / "result.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path}: is not JSON: remove it, and the run ends again") from None


def results(out: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[int, dict[str, Any]]]:
    """All results that are there, by arm and seed."""
    found = {arm: {seed: result(out, arm, seed) for seed in seeds} for arm in arms}
    return {arm: {seed: end for seed, end in runs.items() if end is not None} for arm, runs in found.items()}


def keep_result(path: Path, status: str, **what: Any) -> dict[str, Any]:
    """Writes a run's `result.json` in one go, and returns it."""
    end = {
        "status": status, "error": None, "figures": {}, "steps": 0, "tokens": 0, "flops": 0, "seconds": {},
    } | what  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    _write(path / "result.json", end)
    return end


def last_figures(run: Path, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """What a run's metrics say after its last step: figures, and seconds by what they went to.

    Returns:
      Two empty dictionaries where the run has not come so far.
    """
    figures: dict[str, float] = {}
    goodput: dict[str, float] = {}
    judged = False
    path = run / "metrics.jsonl"
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a kill
        if line.get("step") != steps:
            continue
        numbers = {name: float(value) for name, value in line.items() if not isinstance(value, list)}
        judged |= "goodput/wall_s" in numbers
        goodput |= {name.removeprefix(GOODPUT): v for name, v in numbers.items() if name.startswith(GOODPUT)}
        figures |= {n.removeprefix("evaluation/"): v for n, v in numbers.items() if n.startswith("evaluation/")}
        figures |= {"loss": numbers["loss"]} if "loss" in numbers else {}
    if not judged:
        return {}, {}
    wall = goodput.pop("wall_s")
    seconds = {kind: share * wall for kind, share in goodput.items()}
    return figures, {
        "start": seconds.get("start", 0.0),
        "compile": seconds.get("compile", 0.0),
        "train": seconds.get("step", 0.0) + seconds.get("data", 0.0),
        "evaluate": seconds.get("evaluation", 0.0),
        "checkpoint": seconds.get("checkpoint", 0.0),
        "lost": seconds.get("lost", 0.0),
    }


@dataclass(frozen=True)
class Record:
    """An arm's `arm.json`.

    Args:
      path: None for one that is not kept.
    """

    path: Path | None

    def read(self, bindings: str) -> dict[str, Any] | None:
        """What is known of the arm, if anything.

        Raises:
          UserError: it was begun with other bindings.
        """
        if self.path is None or not self.path.exists():
            return None
        found = json.loads(self.path.read_text(encoding="utf-8"))
        if found["bindings"] != bindings:
            raise UserError(
                f"{self.path.parent}: was begun with another configuration than it now has: use another --out"
            )
        return found

    def write(self, what: Mapping[str, Any]) -> None:
        """Keeps it."""
        if self.path is not None:
            _write(self.path, what)


@contextmanager
def locked(out: Path, arm: Arm) -> Iterator[Record]:
    """An arm's record, for one process at a time: jobs of a cluster may begin together, and one of them measures."""
    path = out / "arms" / arm.name
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".planning").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield Record(path / "arm.json")


@contextmanager
def unlocked() -> Iterator[Record]:
    """A record that is not kept."""
    yield Record(None)


def _write(path: Path, what: Mapping[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def _other(out: Path, there: str, here: str) -> UserError:
    return UserError(f"{out}: holds another sweep ({there} there, {here}): use another --out")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
