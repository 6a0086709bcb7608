"""What a sweep costs beside the training of its arms: starts, plans, compilation, evaluation, checkpoints.

    python -m benchmarks sweep              # 24 arms of one seed: every arm's step is compiled
    ARMS=8 SEEDS=3 python -m benchmarks sweep    # three seeds share a step
    ARMS=2 SEEDS=1 SECONDS=3 python -m benchmarks sweep    # a short one, to try it

A causal decoder of two layers on docstrings in bytes, its arms at different learning rates, and no program kept from before.
A first run of one arm tells how many steps take so many seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.harness import ALLOWED, Reading

TARGET = 1.25
BASE = """from __gin__ import dynamic_registration
import data
import evaluation
import models
import objectives
import optax
import training

steps = 20
training.Run.data = @data.Cached()
data.Cached.task = 'python_docs'
training.Run.model = @models.Trunk
models.Trunk.width = 128
models.Trunk.layers = 2
models.Trunk.mixer = @models.Attention
models.Attention.heads = 4
training.Run.objective = @objectives.CausalLM()
training.Run.steps = %steps
training.Run.batch_size = 32
training.Run.length = 128
training.Run.optimizer = @training.AdamW()
training.AdamW.learning_rate = @optax.cosine_decay_schedule()
optax.cosine_decay_schedule.init_value = 1e-3
optax.cosine_decay_schedule.decay_steps = %steps
training.Run.evaluators = [@evaluation.CausalPerplexity()]
evaluation.CausalPerplexity.data = @held_out/data.Cached()
evaluation.CausalPerplexity.most_rows = 128
held_out/data.Cached.split = 'validation'
"""
SWEEP = """from __gin__ import dynamic_registration
from launch import sweep

sweep.Sweep.base = 'base.gin'
sweep.Sweep.axes = [@sweep.Values()]
sweep.Values.name = 'rate'
sweep.Values.binding = 'optax.cosine_decay_schedule.init_value'
sweep.Values.values = {values}
sweep.Sweep.seeds = {seeds}
sweep.Sweep.budget = @sweep.Tokens()
sweep.Tokens.amount = {tokens}
sweep.Sweep.metric = ('causal/bits_per_token', 'min')
"""


def swept(place: Path, name: str, *, arms: int, seeds: int, steps: int, processes: int) -> list[dict[str, Any]]:
    """Runs a sweep from a cold start; the results of its runs."""
    from launch.sweep import folder

    values = [float(f"{1e-3 * 1.05**i:.6g}") for i in range(arms)]
    text = SWEEP.format(values=values, seeds=list(range(seeds)), tokens=steps * 32 * 128)
    (place / f"{name}.gin").write_text(text)
    words = ["sweep", f"{name}.gin", "--out", name, "--processes", str(processes)]
    root = Path(__file__).resolve().parent.parent
    programs = {"JAX_COMPILATION_CACHE_DIR": str(place / f"programs_{name}"), "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-m", "launch.cli", *words], cwd=place, env=os.environ | programs, check=True)
    told = folder.read_sweep(place / name)
    found = folder.results(place / name, [arm["name"] for arm in told["arms"]], told["seeds"])
    return [end for runs in found.values() for end in runs.values()]


def main() -> None:
    """Measures and writes the section."""
    arms, seeds = int(os.environ.get("ARMS", "24")), int(os.environ.get("SEEDS", "1"))
    wanted, processes = float(os.environ.get("SECONDS", "30")), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "base.gin").write_text(BASE)
        # As many at once as later: cores share their memory's speed.
        tried = swept(place, "tried", arms=processes, seeds=1, steps=100, processes=processes)
        each = sum(end["seconds"]["train"] for end in tried) / sum(end["steps"] for end in tried)
        steps = max(1, round(wanted / each))
        before, began = Reading.now([]), time.perf_counter()
        ends = swept(place, "measured", arms=arms, seeds=seeds, steps=steps, processes=processes)
        wall, others = time.perf_counter() - began, Reading.now([]).others_since(before)
    total = {kind: sum(end["seconds"][kind] for end in ends) for kind in ends[0]["seconds"]}
    share = total["train"] / processes
    kinds = {
        "steps, waits for data included": "train",
        "imports aside, start: plan, initial state": "start",
        "compilation": "compile",
        "evaluation": "evaluate",
        "checkpoints": "checkpoint",
    }
    rows = [(words, f"{total[kind]:.0f}", f"{total[kind] / len(ends):.1f}") for words, kind in kinds.items()]
    noise = f"others used {others:.2f} cores" + (": CONTENDED, not a measurement" if others > ALLOWED else "")
    body = f"""A causal decoder of two layers of width 128 on docstrings in bytes, its arms at different learning rates.
{arms} arms, {seeds} seed{"s" * (seeds > 1)}, {len(ends)} runs of {steps} steps on {processes} processes with a core each, from a cold
start with no program kept: {wall:.0f} s in all, imports and the sharing out included; {noise}.

{results.table(("seconds of", "all runs", "a run"), rows)}

Over the runs' own training by the processes, {share:.0f} s: **{wall / share:.3f}**. Target: at most {TARGET}.
With `ARMS={arms} SEEDS={seeds}`."""
    results.write("sweep", "A sweep beside its arms", body)


if __name__ == "__main__":
    main()
