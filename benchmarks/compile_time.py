"""Compile time of a training step by depth: scanned layers are one program however many there are.

    python -m benchmarks compile_time

Tracing, lowering and compiling the step of `bert_step`'s BERT-like encoder, persistent cache off: width 64, 8 rows of 32
tokens, for this machine; and width 512, 8 rows of 128 tokens, bfloat16, splash attention, full rematerialisation and `fsdp`,
for four TPU v5p chips that are not here, as `palmette plan` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks import results
from benchmarks.harness import Contestant, alternate
from benchmarks.runs import bert

TOPOLOGY, MOST = "v5p:2x2x1", 1.3


def compiling(layers: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: plans a run and compiles its step from nothing, for this machine."""
    return _turn(lambda: bert(layers=layers, width=64, vocabulary=512, length=32, batch_size=8).plan())


def planning(layers: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: the same for TPU chips."""
    from models import Attention
    from partitioning import fsdp
    from partitioning.topologies import topology

    devices = topology(TOPOLOGY).devices()

    def plan() -> Any:
        run = bert(layers=layers, width=512, heads=4, vocabulary=512, length=128, batch_size=8)
        mixer = partial(Attention, heads=4, theta=None, bias=True, backend="splash")
        model = partial(run.model, mixer=mixer, dtype="bfloat16", remat="full")
        return replace(run, model=model, rules=fsdp()).plan(devices)

    return _turn(plan)


def _turn(plan: Callable[[], Any]) -> tuple[Callable[[], None], dict[str, Any]]:
    import jax

    jax.config.update("jax_enable_compilation_cache", False)

    def turn() -> None:
        jax.clear_caches()
        planned = plan()
        planned.compile(planned.stages[0])

    return turn, {}


def main() -> None:
    """Measures and writes the section."""
    rows, notes = [], []
    for where, function, shallow, deep in (("this machine", "compiling", 6, 48), (TOPOLOGY, "planning", 8, 64)):
        names = {layers: f"{layers} layers" for layers in (shallow, deep)}
        contestants = [Contestant(name, __name__, function, layers=layers) for layers, name in names.items()]
        # The first turns import, and find what the compiler is.
        found = alternate(contestants, wanted=3, times=1)
        low, high = found.ratios(names[deep], names[shallow])
        ratio = f"{found.ratio(names[deep], names[shallow]):.2f} ({low:.2f} to {high:.2f})"
        rows.append((where, *(f"{name}: {found.seconds(name):.2f} s" for name in names.values()), ratio))
        notes.append(f"For {where}: {found.note()}.")
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            results.table(("compiled for", "shallow", "deep", f"ratio (target: at most {MOST})"), rows),
            "",
            *notes,
        ]
    )
    results.write("compile_time", "Compile time by depth", body)
