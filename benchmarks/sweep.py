"""What a sweep costs beside the training of its arms: starts, plans, compilation, evaluation, checkpoints.

    python -m benchmarks sweep    # 24 arms that share a step, and 24 each of which has its own
    ARMS=2 SECONDS=3 python -m benchmarks sweep    # a short one, to try it

A causal decoder of two layers on docstrings in bytes, and no program kept from before.
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
AXES = {"learning rates": "optax.cosine_decay_schedule.init_value", "weight decays": "AdamW.weight_decay"}
KINDS = {"steps": "train", "start": "start", "compilation": "compile", "evaluation": "evaluate"}
KINDS |= {"checkpoints": "checkpoint"}
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
sweep.Values.name = 'value'
sweep.Values.binding = '{binding}'
sweep.Values.values = {values}
sweep.Sweep.seeds = [0]
sweep.Sweep.budget = @sweep.Tokens()
sweep.Tokens.amount = {tokens}
sweep.Sweep.metric = ('causal/bits_per_token', 'min')
"""


def swept(place: Path, name: str, binding: str, *, arms: int, steps: int, processes: int) -> list[dict[str, Any]]:
    """Runs a sweep from a cold start; the results of its runs."""
    from launch.sweep import folder

    values = [float(f"{1e-3 * 1.05**i:.6g}") for i in range(arms)]
    (place / f"{name}.gin").write_text(SWEEP.format(binding=binding, values=values, tokens=steps * 32 * 128))
    words = ["sweep", f"{name}.gin", "--out", name, "--processes", str(processes)]
    root = Path(__file__).resolve().parent.parent
    programs = {"JAX_COMPILATION_CACHE_DIR": str(place / f"programs_{name}"), "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-m", "launch.cli", *words], cwd=place, env=os.environ | programs, check=True)
    told = folder.read_sweep(place / name)
    found = folder.results(place / name, [arm["name"] for arm in told["arms"]], told["seeds"])
    return [end for runs in found.values() for end in runs.values()]


def main() -> None:
    """Measures and writes the section."""
    arms, wanted = int(os.environ.get("ARMS", "24")), float(os.environ.get("SECONDS", "30"))
    processes = len(os.sched_getaffinity(0))
    rows, noise = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "base.gin").write_text(BASE)
        # As many at once as later: cores share their memory's speed.
        tried = swept(place, "tried", AXES["learning rates"], arms=processes, steps=100, processes=processes)
        each_step = sum(end["seconds"]["train"] for end in tried) / sum(end["steps"] for end in tried)
        steps = max(1, round(wanted / each_step))
        for name, binding in AXES.items():
            before, began = Reading.now([]), time.perf_counter()
            ends = swept(place, name.replace(" ", "_"), binding, arms=arms, steps=steps, processes=processes)
            wall = time.perf_counter() - began
            noise = max(noise, Reading.now([]).others_since(before))
            seconds = {kind: sum(end["seconds"][kind] for end in ends) for kind in KINDS.values()}
            share = seconds["train"] / processes
            each = [f"{seconds[kind] / len(ends):.1f}" for kind in KINDS.values()]
            rows.append((name, *each, f"{wall:.0f}", f"{share:.0f}", f"**{wall / share:.3f}**"))
    head = ("arms differ in their", *(f"{words}, s a run" for words in KINDS), "wall, s", "steps' share, s", "ratio")
    others = f"others used {noise:.2f} cores" + (": CONTENDED, not a measurement" if noise > ALLOWED else "")
    body = f"""A causal decoder of two layers of width 128 on docstrings in bytes: {arms} runs of {steps} steps, waits for data
included, on {processes} processes with a core each, from a cold start with no program kept; {others}. Learning rates are given
to the step, so the arms share it: the first compile it, the others trace it and find it. Weight decay is a constant of the
step, so every arm compiles its own.

{results.table(head, rows)}

The ratio is the wall time, imports and the sharing out included, over the runs' own training by the processes. Target: at
most {TARGET}."""
    results.write("sweep", "A sweep beside its arms", body)


if __name__ == "__main__":
    main()
