"""A small training on two hosts, hit at a random moment by a fault and started again, many times.

    make chaos; RUNS=20 SEED=700 make chaos
    for SEED in 0 10 20; do RUNS=10 SEED=$SEED TALLY=tally.jsonl make chaos; done    # in pieces: the section counts all of them
    python -m benchmarks chaos_plain    # the same without a copy of each checkpoint

Each run draws a fault, a host, a place and a moment from its seed. It must end in time, say what happened in a line, go on
from the newest whole checkpoint, lose no more steps than `most_lost`, and end in the bits of the run that was left alone.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.several import CONFIG, EVERY, STEPS, Several, steps

DAMAGED = ("a truncated file", "a flipped bit", "no newest folder")
FAULTS = ("kill -9", "SIGTERM", "a full disk", "a folder that vanishes meanwhile", *DAMAGED)
ROOM = 16_384
PATIENCE = 4
HEAD = (
    "fault",
    "runs",
    "checkpoints passed over",
    "steps lost",
    "may be lost",
    "longest from fault to the last host's end",
)


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Args:
      seed: of the run.
      fault: one of `FAULTS`.
      host: that it hit.
      reached: steps on file when all had ended.
      began: the step that the next start went on from.
      passed: checkpoints that were there and not gone on from.
      seconds: from the fault to the end of all hosts.
    """

    seed: int
    fault: str
    host: int
    reached: int
    began: int
    passed: int
    seconds: float

    @property
    def lost(self) -> int:
        """Steps that were taken, and taken again."""
        return max(0, self.reached - self.began)


def most_lost(fault: str, *, copied: bool) -> int:
    """Steps that a fault may cost: an interval, where each checkpoint is copied and steps wait for both.

    Where steps go on meanwhile, also those taken while the checkpoint at the interval's end was being written. A save waits
    for the one before it, so that is an interval at most. A harmed checkpoint of which there is no copy costs one more.
    """
    if copied:
        return EVERY
    return EVERY * (3 if fault in DAMAGED else 2)


def copy_of(out: Path) -> Path:
    """Where a run's checkpoints are copied to."""
    return out.with_name(f"{out.name}.copy")


def ended(out: Path) -> tuple[dict, dict[int, dict]]:
    """The last checkpoint's leaves with their checksums, and metrics by step; where the time went is no metric.

    A stop saves where the run left alone does not, and says there again what was spent: steps are compared, not lines.
    """
    metrics: dict[int, dict] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        known = metrics.setdefault(row["step"], {})
        for name, value in row.items():
            if not name.startswith(("goodput/", "hosts/")):
                assert known.setdefault(name, value) == value, f"step {row['step']}: {name} {known[name]} and {value}"
    return leaves(out), metrics


def leaves(place: Path) -> dict:
    """The last checkpoint's leaves with their checksums."""
    return json.loads((place / "checkpoints" / str(STEPS) / "metadata" / "metadata").read_text())["leaves"]


def reached(out: Path) -> int:
    """The last step on file; a line that a kill cut does not count."""
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def damage(folder: Path, fault: str, draw: random.Random) -> None:
    """Harms a checkpoint."""
    if fault == "no newest folder":
        shutil.rmtree(folder)
        return
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    path = draw.choices(files, [path.stat().st_size for path in files])[0]
    whole = bytearray(path.read_bytes())
    if fault == "a truncated file":
        whole = whole[: draw.randrange(len(whole))]
    else:
        whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    path.write_bytes(whole)


def hit(run: Several, fault: str, host: int, place: Path, draw: random.Random) -> float:
    """Brings the fault about at a moment, waits for all hosts, and checks how they ended; seconds from fault to end.

    Args:
      run: that it hits.
      fault: one of `FAULTS`.
      host: which of the hosts.
      place: the run's folder or its copy, whose newest checkpoint is harmed.
      draw: the moment comes from it.
    """
    # Two checkpoints, where one of them is to be harmed.
    first = 2 * EVERY + 1 if fault in FAULTS[3:] else 0
    moment = draw.randrange(first, STEPS - 2)
    run.wait_for(lambda: reached(run.out) >= moment and (moment > 0 or (run.out / ".in_use").exists()))
    time.sleep(draw.uniform(0, 2.0 if moment == 0 else 0.3))
    started = reached(run.out) > 0
    if first:
        run.wait_for(lambda: len(steps(place)) > 1)
    begin = time.monotonic()
    other = 1 - host
    if fault == "kill -9":
        run.processes[host].send_signal(signal.SIGKILL)
        statuses = run.end()
        assert statuses[other] not in (0, -signal.SIGKILL), run.words()
        assert run.says(other, f"host {host} ("), run.words()
    elif fault == "SIGTERM":
        run.processes[host].send_signal(signal.SIGTERM)
        statuses = run.end()
        assert statuses == [0, 0] or not started, run.words()
    elif fault == "a full disk":
        import resource

        resource.prlimit(run.processes[host].pid, resource.RLIMIT_FSIZE, (ROOM, ROOM))
        statuses = run.end()
        assert statuses[host] == 2, run.words()
        assert statuses[other] == 3, run.words()
        assert re.search(r"no room on the disk|cannot be written", run.said[host].read_text()), run.words()
    elif fault in DAMAGED:
        for process in run.processes:
            process.send_signal(signal.SIGKILL)
        run.end()
        damage(place / "checkpoints" / str(steps(place)[-1]), fault, draw)
    else:
        shutil.rmtree(place / "checkpoints" / str(steps(place)[-1]), ignore_errors=True)
        run.end()
    return time.monotonic() - begin


def disturbed(seed: int, config: Path, out: Path, whole: tuple[dict, dict], patience: int, *, copied: bool) -> Outcome:
    """One run of the campaign.

    Raises:
      AssertionError: it hung, lost too much or ended otherwise than the run that was left alone.
    """
    draw = random.Random(seed)
    fault, host = FAULTS[seed % len(FAULTS)], draw.randrange(2)
    places = [out, copy_of(out)] if copied else [out]
    how = {"fork": True, "patience": patience, "copy": copy_of(out) if copied else None}
    run = Several(config, out, **how)
    seconds = hit(run, fault, host, draw.choice(places), draw)
    at, there = reached(out), {step for place in places for step in steps(place)}
    again = Several(config, out, **how)
    assert again.end() == [0, 0], again.words()
    words = re.search(r"goes on from the checkpoint of step (\d+)", again.said[0].read_text())
    began = int(words[1]) if words else 0
    passed = sum(step > began for step in there)
    assert passed <= (1 if fault in DAMAGED else 0), f"went on from {began} of {sorted(there)}: {again.words()}"
    assert ended(out) == whole, again.words()
    assert all(leaves(place) == whole[0] for place in places), again.words()
    outcome = Outcome(seed, fault, host, at, began, passed, seconds)
    most = most_lost(fault, copied=copied)
    assert outcome.lost <= most, f"{outcome} lost {outcome.lost} steps, more than {most}: {again.words()}"
    return outcome


def campaign(
    seeds: Sequence[int], say: Callable[[str], None], *, copied: bool, patience: int = PATIENCE
) -> tuple[list[Outcome], dict[int, str]]:
    """The run that is left alone, and then the others, whose hosts have this patience; Ctrl-C ends it early.

    Returns:
      What became of the runs that went on as they should, and what was wrong with the others, by seed.
    """
    # Before the first fork, and without touching a device.
    for module in ("evaluation", "training.loop", "launch.cli", "launch.verbs"):
        importlib.import_module(module)

    found: list[Outcome] = []
    wrong: dict[int, str] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = folder / "chaos.gin"
        config.write_text(CONFIG)
        alone = Several(config, folder / "alone", fork=True, patience=patience)
        assert alone.end() == [0, 0], alone.words()
        whole = ended(folder / "alone")
        with suppress(KeyboardInterrupt):
            for seed in seeds:
                try:
                    found.append(disturbed(seed, config, folder / str(seed), whole, patience, copied=copied))
                    say(str(found[-1]))
                except (AssertionError, OSError) as error:
                    wrong[seed] = f"{FAULTS[seed % len(FAULTS)]}: {error}"
                    say(f"seed {seed}: {wrong[seed]}")
                for place in (folder / str(seed), copy_of(folder / str(seed))):
                    shutil.rmtree(place, ignore_errors=True)
    return found, wrong


def sample(seeds: Sequence[int]) -> tuple[int, dict[int, str]]:
    """A few runs, for the test: how many went on as they should, and what was wrong with the others."""
    # Other tests share the cores: a host may be slow to end, and is not gone.
    say = lambda line: print(line, file=sys.stderr, flush=True)
    found, wrong = campaign(seeds, say, copied=True, patience=4 * PATIENCE)
    return len(found), wrong


def main(*, copied: bool = True) -> None:
    """Runs the campaign and writes the section.

    RUNS and SEED say how many and from where. A campaign in pieces names a file, TALLY, to which each piece adds what became
    of its runs, as a line of JSON.
    """
    runs, first, file = int(os.environ.get("RUNS", "100")), int(os.environ.get("SEED", "0")), os.environ.get("TALLY")
    seeds = range(first, first + runs)
    earlier = Path(file).read_text().splitlines() if file and Path(file).exists() else []
    pieces = [json.loads(line) for line in earlier]
    if twice := sorted(set(seeds) & set(joined(pieces)[0])):
        sys.exit(f"chaos: {file} has the runs of seeds {', '.join(map(str, twice))}: set SEED to another")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as programs:
        os.environ.update(one_device(programs))
        found, wrong = campaign(seeds, lambda line: print(line, file=sys.stderr, flush=True), copied=copied)
    if not found and not wrong:
        return
    pieces.append({"found": [asdict(one) for one in found], "wrong": wrong, "minutes": (time.monotonic() - begin) / 60})
    if file:
        Path(file).write_text("".join(json.dumps(piece) + "\n" for piece in pieces))
    write(*joined(pieces), copied=copied)
    if wrong:
        sys.exit(f"chaos: {len(wrong)} of {len(wrong) + len(found)} runs did not go on as they should: {wrong}")


def joined(pieces: Sequence[dict]) -> tuple[list[int], list[Outcome], dict[int, str], float]:
    """The pieces of a campaign as one: seeds, what became of the runs, what was wrong with the others, minutes."""
    found = [Outcome(**one) for piece in pieces for one in piece["found"]]
    # JSON's keys are strings.
    wrong = {int(seed): text for piece in pieces for seed, text in piece["wrong"].items()}
    return sorted([*(one.seed for one in found), *wrong]), found, wrong, sum(piece["minutes"] for piece in pieces)


def one_device(programs: str) -> dict[str, str]:
    """What jax reads when it is imported: a device for each host, and a folder where programs are kept."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


HOW = {
    True: """Each checkpoint is written to two folders, and steps wait for both. A harmed checkpoint
is the newest of one of them, all hosts killed; 'steps lost' were taken, and taken again: an interval at most.""",
    False: """Checkpoints are written while steps go on, in one folder. A harmed one is the newest, all
hosts killed; 'steps lost' were taken, and taken again. A fault may cost an interval and the steps taken while the checkpoint at
its end was being written, which are an interval at most, since a save waits for the one before it; a harmed checkpoint costs an
interval more.""",
}


def write(seeds: list[int], found: list[Outcome], wrong: dict[int, str], minutes: float, *, copied: bool) -> None:
    """The section of the results."""
    from benchmarks import results

    rows: list[tuple] = []
    ends = [seed for seed in seeds if seed + 1 not in seeds]
    begins = [seed for seed in seeds if seed - 1 not in seeds]
    span = ", ".join(f"{begin} to {end}" for begin, end in zip(begins, ends, strict=True))
    for fault in FAULTS:
        of = [outcome for outcome in found if outcome.fault == fault]
        if of:
            lost = [outcome.lost for outcome in of]
            rows.append(
                (
                    fault,
                    len(of),
                    sum(outcome.passed for outcome in of),
                    f"{sum(lost) / len(lost):.1f}, at most {max(lost)}",
                    most_lost(fault, copied=copied),
                    f"{max(outcome.seconds for outcome in of):.0f} s",
                )
            )
    body = f"""
Runs of {STEPS} steps on two hosts of this machine, a checkpoint every {EVERY} steps, patience of {PATIENCE} s. Each is hit once, at a
moment and on a host drawn from its seed, from the time that the hosts have met; then both are started again. Faults take
turns, `seed mod {len(FAULTS)}`. {HOW[copied]}

{results.table(HEAD, rows)}

{len(found)} of {len(seeds)} runs, seeds {span}, {minutes:.0f} minutes: these ended in time, went on from the
newest whole checkpoint, and ended with the parameters, optimizer state and metrics of the run that was left alone, bit for
bit. Otherwise: {"; ".join(f"{seed}: {text.splitlines()[0]}" for seed, text in wrong.items()) or "none"}.
"""
    name, title = ("chaos", "Faults") if copied else ("chaos_plain", "Faults, without a copy of each checkpoint")
    results.write(name, title, body)
