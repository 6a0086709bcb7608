"""What writing checkpoints costs the steps that go on meanwhile.

    python -m benchmarks checkpoint

A BERT-like encoder of 8 layers and width 768, 30,720 tokens of vocabulary, AdamW: a state of about 1 GB. A turn is 20 steps;
the writer's begins with a checkpoint that is written during them, and ends when it is written: what a write takes longer
than the interval, the next one would wait for. 'Blocked' is how long the loop waits in the call that saves: the copy, the
checksums and the layers by index.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import results
from benchmarks.harness import Contestant, alternate

STEPS = 20
TARGET = 1.15
SIZE = {"layers": 8, "width": 768, "heads": 12, "vocabulary": 30_720, "length": 64, "batch_size": 8}


def stepping(saves: bool, size: dict[str, int]) -> tuple[Callable[[], float], dict[str, Any]]:
    """Contestant: seconds of a step among 20, which begin with a checkpoint or do not."""
    import jax

    from benchmarks.runs import bert
    from training.store import Store

    plan = bert(**size).plan()
    stage, state = plan.stages[0], plan.init()
    program, held = plan.compile(stage), [state]
    batch = plan.put(stage, stage.reader.batch(0, batch_size=size["batch_size"], length=size["length"]))
    folder = tempfile.TemporaryDirectory()
    store = Store(plan, folder.name)
    facts: dict[str, Any] = {
        "gigabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.kept())) / 1e9,
        "blocked": [],
        "written": [],
    }
    del state

    def turn(folder: Any = folder) -> float:
        # The default keeps the folder for as long as there are turns.
        begin = time.perf_counter()
        if saves:
            store.save(held[0], {})
            facts["blocked"].append(1e3 * (time.perf_counter() - begin))
        for _ in range(STEPS):
            held[0], _ = program(held[0], batch)
        jax.block_until_ready(held[0])
        store.checkpoints.wait()
        return (time.perf_counter() - begin) / STEPS

    with plan.placement.scope():
        if saves:
            # Two: the first compiles what it needs.
            for _ in range(2):
                turn()
                begin = time.perf_counter()
                store.save(held[0], {})
                facts["blocked"].append(1e3 * (time.perf_counter() - begin))
                store.checkpoints.wait()
                facts["written"].append(time.perf_counter() - begin)
                held[0], _ = program(held[0], batch)
    return turn, facts


def main() -> None:
    """Measures and writes the section."""
    names = {"a checkpoint every 20 steps": True, "none": False}
    paired = alternate(
        [Contestant(name, __name__, "stepping", saves=saves, size=SIZE) for name, saves in names.items()],
        wanted=5,
        times=1,
        patience=600,
    )
    writer, plain = names
    facts = paired.facts[writer]
    low, high = paired.ratios(writer, plain)
    rows = [(name, f"{paired.seconds(name):.3f} s") for name in names]
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            results.table(("writes", "a step"), rows),
            "",
            f"Ratio {paired.ratio(writer, plain):.3f} ({low:.3f} to {high:.3f}), target: at most {TARGET}. The state has "
            f"{facts['gigabytes']:.2f} GB; the loop is blocked for {facts['blocked'][-1]:.0f} ms a checkpoint; written alone, it "
            f"takes {facts['written'][-1]:.1f} s.",
            "",
            f"{paired.note()}.",
        ]
    )
    results.write("checkpoint", "Checkpoints", body)
