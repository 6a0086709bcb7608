"""What a step costs the host beside the device's work.

    python -m benchmarks host_overhead

A run's own calls with an idle device: placing the batch (`Plan.put`), and dispatching the compiled step until it returns,
before its result is there. The model is the quickstart's in depth and number of leaves, and so narrow that the device's
work is little; on CPU that work shares the cores with the dispatch, so what is printed is an upper bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.harness import Contestant, alternate
from benchmarks.runs import bert

MOST, SHARE = 2e-3, 0.02
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.gin"


def _setup(run: Any) -> tuple[Any, Any, Any, list[Any], list[Any]]:
    """Plan, stage, program, state and batches of a run."""
    plan = run.plan()
    stage = plan.stages[0]
    shape = {"batch_size": stage.stage.batch_size, "length": stage.stage.length}
    batches = [stage.reader.batch(i, **shape, seed=0) for i in range(4)]
    return plan, stage, plan.compile(stage), [plan.init()], batches


def host(part: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """Contestant: seconds of one part of the host's work, 'place' or 'dispatch'."""
    import jax

    plan, stage, program, held, batches = _setup(bert(width=16, heads=2, vocabulary=512, length=32, batch_size=2))
    count = iter(range(1 << 40))

    def turn() -> float:
        jax.block_until_ready(held)
        begin = time.perf_counter()
        placed = plan.put(stage, batches[next(count) % 4])
        middle = time.perf_counter()
        held[0], _out = program(held[0], placed)
        end = time.perf_counter()
        return middle - begin if part == "place" else end - middle

    return turn, {"leaves": len(jax.tree.leaves(held[0]))}


def step() -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: a step of the quickstart, or of `bert_step`'s encoder where its corpus has not been prepared."""
    import jax

    name, run = "quickstart's", None
    try:
        from launch.config import load

        found = _setup(load([str(QUICKSTART)]).value)
    except Exception as error:
        name, run = f"`bert_step`'s ({QUICKSTART.name}: {str(error).splitlines()[0]})", bert()
        found = _setup(run)
    plan, stage, program, held, batches = found

    def turn() -> None:
        held[0], out = program(held[0], plan.put(stage, batches[0]))
        jax.block_until_ready((held[0], out))

    return turn, {"name": name}


def main() -> None:
    """Measures and writes the section."""
    contestants = [
        Contestant("placing the batch", __name__, "host", part="place"),
        Contestant("dispatch", __name__, "host", part="dispatch"),
        Contestant("step", __name__, "step"),
    ]
    found = alternate(contestants, wanted=5)
    place, dispatch, whole = (found.seconds(c.name) for c in contestants)
    total = place + dispatch
    name = found.facts["step"]["name"]
    rows = [(c.name, f"{1e3 * found.seconds(c.name):.3f} ms") for c in contestants[:2]]
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            results.table(("of the host's work in a step", "time"), rows),
            "",
            f"Together {1e3 * total:.2f} ms (target: at most {1e3 * MOST:.0f} ms), {found.facts['dispatch']['leaves']} arrays "
            f"of state. A step of the {name}: {1e3 * whole:.0f} ms, so the host has {100 * total / whole:.2f} % of it "
            f"(target: at most {100 * SHARE:.0f} %).",
            "",
            f"{found.note()}.",
        ]
    )
    results.write("host_overhead", "The host's part of a step", body)
