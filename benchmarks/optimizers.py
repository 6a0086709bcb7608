"""What each optimizer costs: a step's time beside AdamW's, and the bytes of its state.

    python -m benchmarks optimizers

The BERT-like encoder of `bert_step`, 4 layers of width 256, 2,048 tokens of vocabulary, 8 rows of 128 tokens. Conda, GaLore
and Fira search for a basis every so many steps, GaLore's search being Fira's: their own rows are steps between two searches,
those named so are steps that search, and the lines below share a search out over the steps that use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from benchmarks import results
from benchmarks.harness import Contestant, Paired, alternate
from benchmarks.runs import bert

ADAMW = "AdamW"
# Name in the table -> class, and what differs from its defaults.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    ADAMW: ("AdamW", {}),
    "AdamW, moments in bfloat16": ("AdamW", {"moments": "bfloat16"}),
    "Sgd with momentum": ("Sgd", {"momentum": 0.9}),
    "Lion": ("Lion", {}),
    "Adafactor": ("Adafactor", {}),
    "LAMB": ("Lamb", {}),
    "Muon": ("Muon", {}),
    "Conda": ("Conda", {}),
    "Conda, searching": ("Conda", {"every": 1}),
    "GaLore, rank 32": ("GaLore", {"rank": 32}),
    "Fira, rank 32": ("Fira", {"rank": 32}),
    "Fira, rank 32, searching": ("Fira", {"rank": 32, "every": 1}),
}
SEARCHING = ", searching"


def side(row: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: a step of the run, placement of its batch included; the state's bytes and the parameters'."""
    import jax

    import training

    kind, options = OPTIMIZERS[row]
    optimizer = getattr(training, kind)(learning_rate=1e-4, weight_decay=0.01, **options)
    plan = replace(bert(batch_size=8, vocabulary=2048), optimizer=optimizer).plan()
    stage = plan.stages[0]
    program, held = plan.compile(stage), [plan.init()]
    batch = stage.reader.batch(0, batch_size=8, length=128)

    def turn() -> None:
        held[0], out = program(held[0], plan.put(stage, batch))
        jax.block_until_ready((held[0], out))

    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    # The step that searches first is over before the first turn that counts.
    turn()
    return turn, {"state": size(held[0].optimizer), "params": size(held[0].params)}


def measured(name: str, **how: Any) -> Paired:
    """One optimizer and AdamW in turns: all at once would want a gigabyte each."""
    return alternate([Contestant(row, __name__, "side", row=row) for row in (ADAMW, name)], **how)


def line(name: str, found: Paired) -> tuple[str, str, str, str]:
    """A row of the table."""
    low, high = found.ratios(name, ADAMW)
    state, params = found.facts[name]["state"], found.facts[name]["params"]
    return (
        name,
        f"{found.ratio(name, ADAMW):.2f} ({low:.2f} to {high:.2f})",
        f"{state / 2**20:.1f} MiB",
        f"{state / params:.2f}",
    )


def shared_out(name: str, found: Mapping[str, Paired]) -> str:
    """What a search adds to each step at the class's own interval."""
    import training

    plain, search = (found[row].ratio(row, ADAMW) for row in (name, name + SEARCHING))
    every = getattr(training, OPTIMIZERS[name][0]).every
    return f"- {name}: a search every {every:,} steps adds {(search - plain) / every:.3f} of AdamW's step to each."


def main() -> None:
    """Measures and writes the section."""
    # A step that searches takes many times as long as others.
    found = {
        name: measured(name, wanted=3, times=2 if name.endswith(SEARCHING) else 5, patience=60.0)
        for name in OPTIMIZERS
        if name != ADAMW
    }
    rows = [line(ADAMW, next(iter(found.values()))), *(line(name, pair) for name, pair in found.items())]
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            results.table(("optimizer", "a step over AdamW's", "its state", "over the parameters' bytes"), rows),
            "",
            *(shared_out(name, found) for name in OPTIMIZERS if name + SEARCHING in OPTIMIZERS),
            "",
            *(f"- {name}: {pair.note()}." for name, pair in found.items()),
        ]
    )
    results.write("optimizers", "What optimizers cost", body)
