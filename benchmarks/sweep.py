"""What a sweep costs beside the training of its arms: starts, plans, compilation, evaluation, checkpoints.

    python -m benchmarks sweep    # 24 runs twice: 8 arms of three seeds, which share a step, and 24 arms of one
    SHAPES=2x1 SECONDS=3 python -m benchmarks sweep    # a short one, to try it

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


def measured(place: Path, shape: str, *, steps: int, processes: int) -> tuple[list[dict[str, Any]], float, float]:
    """Results of a sweep's runs, its wall time in seconds, and the cores that others used meanwhile."""
    arms, seeds = map(int, shape.split("x"))
    before, began = Reading.now([]), time.perf_counter()
    ends = swept(place, f"sweep_{shape}", arms=arms, seeds=seeds, steps=steps, processes=processes)
    return ends, time.perf_counter() - began, Reading.now([]).others_since(before)


def main() -> None:
    """Measures and writes the section."""
    shapes = os.environ.get("SHAPES", "8x3 24x1").split()
    wanted, processes = float(os.environ.get("SECONDS", "30")), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "base.gin").write_text(BASE)
        # As many at once as later: cores share their memory's speed.
        tried = swept(place, "tried", arms=processes, seeds=1, steps=100, processes=processes)
        each = sum(end["seconds"]["train"] for end in tried) / sum(end["steps"] for end in tried)
        steps = max(1, round(wanted / each))
        found = {shape: measured(place, shape, steps=steps, processes=processes) for shape in shapes}
    kinds = {"steps": "train", "start": "start", "compilation": "compile"}
    kinds |= {"evaluation": "evaluate", "checkpoints": "checkpoint"}
    rows = []
    for shape, (ends, wall, _) in found.items():
        seconds = {kind: sum(end["seconds"][kind] for end in ends) for kind in kinds.values()}
        share = seconds["train"] / processes
        each_run = [f"{seconds[kind] / len(ends):.1f}" for kind in kinds.values()]
        arms, seeds = shape.split("x")
        rows.append((arms, seeds, *each_run, f"{wall:.0f}", f"{share:.0f}", f"**{wall / share:.3f}**"))
    others = max(other for *_, other in found.values())
    noise = f"others used {others:.2f} cores" + (": CONTENDED, not a measurement" if others > ALLOWED else "")
    head = ("arms", "seeds", *(f"{words}, s a run" for words in kinds), "wall, s", "steps' share, s", "ratio")
    body = f"""A causal decoder of two layers of width 128 on docstrings in bytes, its arms at different learning rates, which are
constants of the step: each arm's is compiled, once for all its seeds. Runs of {steps} steps, waits for data included, on
{processes} processes with a core each, from a cold start with no program kept, imports and the sharing out included; {noise}.

{results.table(head, rows)}

The ratio is the wall time over the runs' own training by the processes. Target: at most {TARGET}."""
    results.write("sweep", "A sweep beside its arms", body)


if __name__ == "__main__":
    main()
