"""The page of a sweep: seconds to write it, and its size.

    python -m benchmarks report

A made-up sweep of 24 arms, each of three seeds and 1,000 logged steps with ten evaluations: `palmette report` as a user starts
it, imports included. The page holds plotly.js's bundle of lines and bars, which is a quarter of the whole library, and each
arm's curves as means over its seeds in six digits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results

ARMS, SEEDS, STEPS, ROUNDS = 24, (0, 1, 2), 1000, 3
MOST_S, MOST_MB = 10.0, 6.0
METRIC = "masked/bits_per_token"


def made_up(
    folder: Path,
    *,
    arms: int = ARMS,
    seeds: tuple[int, ...] = SEEDS,
    steps: int = STEPS,
    effect: float = 0.05,
    noise: float = 0.01,
) -> Path:
    """Writes a sweep's folder as `palmette sweep` would, its figures drawn at random.

    Args:
      folder: of the sweep.
      arms: how many; every arm is better than the one before it by `effect`.
      seeds: of each arm's runs.
      steps: logged, one line each; a tenth of them are judged.
      effect: between two arms, bits a token.
      noise: standard deviation over seeds, bits a token.
    """
    names = [f"rate=0.{10 + i}" for i in range(arms)]
    told = {
        "config": "configs/ablations/made_up.gin",
        "base": "configs/quickstart.gin",
        "question": "Which rate is best?",
        "claim": "More is better.",
        "source": "A made-up paper, 2026.",
        "expected": dict.fromkeys(names[1:], "better"),
        "metric": [METRIC, "min"],
        "budget": {"kind": "tokens", "amount": 2000 * steps},
        "seeds": list(seeds),
        "axes": [{"name": "rate", "options": [name.partition("=")[2] for name in names]}],
        "arms": [
            {
                "name": name,
                "options": {"rate": name[5:]},
                "overrides": [f"RandomTokens.rate = {name[5:]}"],
                "configs": [],
            }
            for name in names
        ],
        "baseline": names[0],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(told))
    for i, name in enumerate(names):
        for seed in seeds:
            _trial(folder / "arms" / name / str(seed), i, seed, name, steps, effect, noise)
    return folder


def _trial(folder: Path, arm: int, seed: int, name: str, steps: int, effect: float, noise: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([arm, seed])
    last = 8.0 - effect * arm + noise * rng.standard_normal()
    (folder / "config.gin").write_text(
        "from __gin__ import dynamic_registration\nimport objectives\nimport training\n\n"
        f"training.Run.objective = @objectives.MaskedLM()\ntraining.Run.steps = {steps}\ntraining.Run.seed = {seed}\n"
        f"objectives.RandomTokens.rate = {name[5:]}\n"
    )
    lines: list[dict[str, Any]] = []
    kinds = {"start": 2.0, "compile": 5.0, "data": 0.1, "checkpoint": 0.5, "evaluation": 1.0, "lost": 0.0}
    for step in range(1, steps + 1):
        value = last + 2 * np.exp(-4 * step / steps)
        loss = {"loss": float(value * np.log(2) + 0.05 * rng.standard_normal()), "learning_rate": 1e-3}
        norms = {
            f"norms/{what}/trunk/{part}": 1.0
            for what in ("gradients", "parameters", "updates")
            for part in ("stack", "embed")
        }
        lines.append({"step": step, **loss, **norms, "spent/tokens": 2000 * step, "spent/flops": 8.9e9 * step})
        if step % max(steps // 10, 1) == 0:
            lines.append({"step": step, f"evaluation/{METRIC}": float(value), f"evaluation/{METRIC}/unigram": 8.4})
        split = kinds | {"step": 0.03 * step}
        wall = sum(split.values())
        lines.append(
            {"step": step, **{f"goodput/{kind}": s / wall for kind, s in split.items()}, "goodput/wall_s": wall}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seconds = {"start": 2.0, "compile": 5.0, "train": 0.03 * steps, "evaluate": 1.0}
    spent = {"steps": steps, "tokens": 2000 * steps, "flops": 8.9e9 * steps}
    figures = {
        METRIC: lines[-2][f"evaluation/{METRIC}"],
        "masked/accuracy": 0.2 + 0.01 * arm + noise * rng.standard_normal(),
    }
    result = {"status": "done", "error": None, "figures": figures, **spent, "seconds": seconds}
    (folder / "result.json").write_text(json.dumps(result))


def main() -> None:
    """Measures and writes the section."""
    with tempfile.TemporaryDirectory() as folder:
        sweep, page = made_up(Path(folder) / "sweep"), Path(folder) / "page.html"
        command = [sys.executable, "-m", "launch.cli", "report", str(sweep), "--out", str(page)]
        taken = []
        for _ in range(ROUNDS):
            before = time.perf_counter()
            subprocess.run(command, check=True, env=os.environ)
            taken.append(time.perf_counter() - before)
        size = page.stat().st_size / 1e6
    rows = [(ARMS, len(SEEDS), f"{STEPS:,}", f"{sorted(taken)[ROUNDS // 2]:.1f}", f"{size:.2f}")]
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            results.table(("arms", "seeds", "logged steps a run", "seconds", "MB"), rows),
            "",
            f"Target: under {MOST_S:.0f} s and {MOST_MB:.0f} MB. The median of {ROUNDS}; they took "
            f"{', '.join(f'{seconds:.1f}' for seconds in sorted(taken))} s.",
        ]
    )
    results.write("report", "The page of a sweep", body)
