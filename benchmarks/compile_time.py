"""Compile time of a training step by depth: scanned layers are one program however many there are.

    python -m benchmarks compile_time

The BERT-like encoder of `bert_step`, width 64, 8 rows of 32 tokens: tracing, lowering and compiling, persistent cache off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import results
from benchmarks.harness import Contestant, alternate
from benchmarks.runs import bert

SHALLOW, DEEP, MOST = 6, 48, 1.3


def compiling(layers: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: plans a run and compiles its step from nothing."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)

    def turn() -> None:
        jax.clear_caches()
        plan = bert(layers=layers, width=64, vocabulary=512, length=32, batch_size=8).plan()
        plan.compile(plan.stages[0])

    return turn, {}


def main() -> None:
    """Measures and writes the section."""
    names = {layers: f"{layers} layers" for layers in (SHALLOW, DEEP)}
    contestants = [Contestant(name, __name__, "compiling", layers=layers) for layers, name in names.items()]
    found = alternate(contestants, wanted=3, times=1)
    low, high = found.ratios(names[DEEP], names[SHALLOW])
    rows = [(name, f"{found.seconds(name):.2f} s") for name in names.values()]
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            results.table(("a step of", "to compile"), rows),
            "",
            f"Ratio: {found.ratio(names[DEEP], names[SHALLOW]):.2f} ({low:.2f} to {high:.2f}; target: at most {MOST}).",
            "",
            f"{found.note()}.",
        ]
    )
    results.write("compile_time", "Compile time by depth", body)
