"""The ledger: of each sweep what a paper claims, what was measured and what follows, in one page.

A sweep's summary is a small file beside the page, from which the page is written again when the runs are gone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.comparison import verdict
from evaluation.intervals import Interval
from launch.report.numbers import bounds, number, probability, spread
from launch.report.page import write
from launch.report.parts import rounded
from launch.report.sweep_folder import LEVEL, SweepFolder
from partitioning.errors import UserError

KINDS = {"tokens": "tokens", "flops": "FLOPs", "time": "seconds of training"}
INTRODUCTION = """\
# The ledger

What papers claim, and what came of it here, at this scale: small models, small budgets, the texts that every Python ships. `palmette
ledger SWEEP...` writes this page from sweeps.

A figure is the mean ± half its 95 % interval (Student's, over seeds). A difference is that from the baseline, paired by seed, with an
interval that holds for all arms of the sweep at once (Bonferroni's); p is of the paired t-test, corrected by Holm. Where the interval
holds 0 the finding is noise, and the verdict on a claim is null: that, too, is a result. A verdict speaks of this scale alone.
"""


def ledger(sweeps: Sequence[Path], out: Path) -> list[str]:
    """Keeps summaries of sweeps beside a page, and writes the page of all that are kept.

    Args:
      sweeps: their folders; none to write the page again.
      out: the page; summaries lie in the folder of its name without `.md`.

    Returns:
      What was written, in lines.

    Raises:
      UserError: a folder that is no sweep's, two sweeps of one name, nothing kept, or a place that cannot be written.
    """
    if out.is_dir() or not out.suffix:
        raise UserError(f"--out {out}: expected a file to write, such as docs/ledger.md")
    kept = out.with_suffix("")
    found = [SweepFolder.read(path) for path in sweeps]
    names = Counter(sweep.name for sweep in found)
    twice = [str(sweep.path) for sweep in found if names[sweep.name] > 1]
    if twice:
        raise UserError(f"{' and '.join(twice)} are sweeps of one name: keep one of them")
    texts = {sweep.name: json.dumps(summary(sweep), indent=1, ensure_ascii=False) + "\n" for sweep in found}
    for name, text in texts.items():
        write(kept / f"{name}.json", text)
    paths = sorted(kept.glob("*.json"))
    if not paths:
        raise UserError(f"{kept}: no summary of a sweep is kept there yet: name a sweep's folder")
    write(out, page([_read(path) for path in paths]))
    return [*(f"{kept / name}.json" for name in texts), f"{out}: {len(paths)} sweep(s)"]


def summary(sweep: SweepFolder) -> dict[str, Any]:
    """All of a sweep that the page says, as JSON; the same runs give the same text."""
    told, compared = sweep.told, sweep.compared()
    arms = []
    for arm in sweep.arms:
        own: dict[str, Any] = {
            "name": arm.name,
            "lines": list(arm.lines),
            "seeds": len(arm.done()),
            "of": len(arm.trials),
        }
        own |= {what: _plain(arm.mean(what)) for what in ("steps", "tokens", "flops")}
        found = compared.get(arm.name)
        if found is not None:
            own |= {"mean": _ends(found.mean), "difference": _ends(found.difference), "p": _plain(found.p)}
            own |= {"finding": "baseline" if arm.name == sweep.baseline else found.effect}
            expected = told.get("expected", {}).get(arm.name)
            if expected and found.difference is not None:
                own |= {"expected": expected, "verdict": verdict(found.difference, best=sweep.best, expected=expected)}
        arms.append(own)
    return {
        "name": sweep.name,
        "config": told.get("config"),
        **{what: told.get(what) or "" for what in ("question", "claim", "source")},
        **{what: told[what] for what in ("metric", "budget", "seeds", "baseline")},
        "level": LEVEL,
        "machines": _machines(sweep),
        "arms": arms,
    }


def page(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    rows = [(f"[{s['name']}](#{_anchor(s['name'])})", s["claim"] or s["question"], overall(s)) for s in summaries]
    parts = [INTRODUCTION, _table(("sweep", "claim", "verdict at this scale"), rows)]
    return "\n".join([*parts, *map(_entry, summaries)])


def overall(told: Mapping[str, Any]) -> str:
    """The verdict on a sweep's claim: that of its arms where they are of one mind, else how many say what."""
    found = Counter(arm["verdict"] for arm in told["arms"] if "verdict" in arm)
    if not found:
        return "no claim on an arm"
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{found[what]} {what}" for what in ("agrees", "null", "disagrees") if found[what])


def _entry(told: Mapping[str, Any]) -> str:
    metric, best = told["metric"]
    kind = KINDS.get(told["budget"]["kind"], told["budget"]["kind"])
    lines = ["", f"## {told['name']}", ""]
    lines += [f"{told['question']}", ""] if told["question"] else []
    source = f" ({told['source']})" if told["source"] else ""
    lines += [f"Claim: {told['claim']}{source}", ""] if told["claim"] else []
    lines += [f"Verdict: **{overall(told)}**.", ""]
    lines.append(
        f"Measured: {metric} ({'smaller' if best == 'min' else 'larger'} is better) at equal {kind}, "
        f"{number(float(told['budget']['amount']))} a run; seeds {', '.join(map(str, told['seeds']))}; baseline `{told['baseline']}`."
    )
    head = ("arm", metric, "difference", "p (Holm)", "finding", "claimed", "verdict", "seeds", "tokens", "FLOPs")
    lines += ["", _table(head, [_row(arm, told["level"]) for arm in told["arms"]])]
    if told["config"]:
        lines += [f"Command: `palmette sweep {told['config']}`", ""]
    lines += [f"Ran on: {'; '.join(told['machines'])}.", ""] if told["machines"] else []
    return "\n".join(lines).rstrip() + "\n"


def _row(arm: Mapping[str, Any], level: float) -> tuple[str, ...]:
    count = f"{arm['seeds']}" if arm["seeds"] == arm["of"] else f"{arm['seeds']} of {arm['of']}"
    spent = (number(arm["tokens"]), number(arm["flops"]))
    if "mean" not in arm:
        return (f"`{arm['name']}`", "–", "–", "–", "no run has ended", "–", "–", count, *spent)
    difference = "–" if arm["difference"] is None else bounds(_interval(arm["difference"], level))
    cells = (spread(_interval(arm["mean"], level)), difference, probability(arm["p"]), arm["finding"])
    return (f"`{arm['name']}`", *cells, arm.get("expected", "–"), arm.get("verdict", "–"), count, *spent)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _anchor(name: str) -> str:
    """What a heading of this name is called in an address."""
    return "".join(c for c in name.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _machines(sweep: SweepFolder) -> list[str]:
    found: dict[str, None] = {}
    for by_seed in sweep.runs.values():
        for run in by_seed.values():
            for start in run.environment:
                devices, host = start.get("devices", {}), start.get("host", {})
                jax = start.get("packages", {}).get("jax", "?")
                cores = f"{host.get('processor', '?')}, {host.get('cores', '?')} cores"
                found[f"{devices.get('count', '?')} × {devices.get('kind', '?')} ({cores}), jax {jax}"] = None
    return sorted(found)


def _ends(interval: Interval | None) -> dict[str, Any] | None:
    """An interval as JSON; ends that are infinite are null."""
    if interval is None:
        return None
    mean, low, high = rounded([interval.mean, interval.low, interval.high])
    return {"mean": mean, "low": low, "high": high, "count": interval.count}


def _interval(told: Mapping[str, Any], level: float) -> Interval:
    end = lambda value, infinite: infinite if value is None else float(value)
    low, high = end(told["low"], -float("inf")), end(told["high"], float("inf"))
    return Interval(float(told["mean"]), low, high, told["count"], level)


def _plain(value: float | None) -> Any:
    return None if value is None else rounded([float(value)])[0]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert {"name", "metric", "budget", "seeds", "arms", "level"} <= found.keys()
    except (ValueError, AttributeError, AssertionError):
        raise UserError(
            f"{path}: is no summary of a sweep: remove it, or run `palmette ledger` on the sweep again"
        ) from None
    return found
