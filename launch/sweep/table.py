"""A sweep's results as a table: every arm's figure beside the baseline's, its tokens and FLOPs, and what is noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from evaluation.comparison import Comparison, compare, verdict

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
HEAD = ("arm", "seeds", "mean", "95 %", "beside the baseline", "p (Holm)", "", "steps", "tokens", "FLOPs")


def compared(sweep: Mapping[str, Any], results: Results) -> dict[str, Comparison]:
    """Every arm with figures beside the baseline; nothing where the baseline has none.

    Args:
      sweep: as in `sweep.json`.
      results: as in `result.json`, by arm and seed.
    """
    metric, best = sweep["metric"]
    values = {
        arm: {seed: end["figures"][metric] for seed, end in runs.items() if end["status"] == "done"}
        for arm, runs in results.items()
    }
    return compare(values, baseline=sweep["baseline"], best=best) if values.get(sweep["baseline"]) else {}


def table(sweep: Mapping[str, Any], results: Results) -> list[list[str]]:
    """Rows of words, the head first."""
    found, rows = compared(sweep, results), [list(HEAD)]
    for arm in (arm["name"] for arm in sweep["arms"]):
        done = [end for end in results.get(arm, {}).values() if end["status"] == "done"]
        count = f"{len(done)}/{len(sweep['seeds'])}"
        if not done or arm not in found:
            rows.append([arm, count, *[""] * (len(HEAD) - 2)])
            continue
        own = found[arm]
        rows.append(
            [arm, count, f"{own.mean.mean:.4g}", _half(own.mean.half), *_beside(sweep, arm, own), *_spent(done)]
        )
    return rows


def _beside(sweep: Mapping[str, Any], arm: str, own: Comparison) -> list[str]:
    if arm == sweep["baseline"]:
        return ["the baseline", "", ""]
    if own.difference is None:
        return ["no seed in common", "", ""]
    words: str = own.effect
    if own.difference.count < 2:
        words = "one pair says nothing"
    elif arm in sweep.get("expected", {}):
        words += f": {verdict(own.difference, best=sweep['metric'][1], expected=sweep['expected'][arm])}"
    p = "" if own.p is None else f"{own.p:.2g}"
    return [f"{own.difference.mean:+.4g} {_half(own.difference.half)}".strip(), p, words]


def _spent(done: list[Mapping[str, Any]]) -> list[str]:
    mean = lambda name: sum(end[name] for end in done) / len(done)
    return [f"{mean('steps'):,.0f}", f"{mean('tokens'):.3g}", f"{mean('flops'):.3g}"]


def _half(half: float) -> str:
    return f"± {half:.2g}" if math.isfinite(half) else ""
