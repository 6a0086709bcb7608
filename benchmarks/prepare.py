"""Preparing a corpus with a tokenizer.json beside the `tokenizers` library alone.

    python -m benchmarks prepare

The modules of the running Python's standard library, a byte-level BPE of 8,192 tokens trained on them, one core. The plain
loop encodes one text after the other and counts the ids; the library's batches are its fastest way. `prepare` also checks
and hashes the records, shuffles them and writes the cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.harness import Contestant, alternate
from benchmarks.reader import on_one_core

TARGET = 0.8
SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]"]
OURS, LOOP, BATCHES = "palmette prepare", "a plain loop of `encode`", "`encode_batch_fast`, 1,000 texts at a time"


def _texts() -> list[str]:
    from data import corpora

    return [text.text for text in corpora.code()]


def trained(file: Path) -> None:
    """Writes the tokenizer.json that all use."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(_texts(), trainer)
    made.save(str(file))


def side(kind: str, file: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: all texts once."""
    on_one_core()
    import tokenizers

    import data
    from data.sources import InMemory
    from data.tokenizer_json import TokenizerJson

    texts = _texts()
    library = tokenizers.Tokenizer.from_file(file)
    records = InMemory(tuple({"text": text} for text in texts))

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            data.prepare(data.Task(name="benchmark", train=records, tokenizer=TokenizerJson(path=file)), folder)

    def loop() -> None:
        sum(len(library.encode(text, add_special_tokens=False).ids) for text in texts)

    def batches() -> None:
        parts = (texts[at : at + 1000] for at in range(0, len(texts), 1000))
        sum(len(e.ids) for part in parts for e in library.encode_batch_fast(part, add_special_tokens=False))

    turns = {OURS: ours, LOOP: loop, BATCHES: batches}
    return turns[kind], {"bytes": sum(len(text.encode()) for text in texts)}


def main() -> None:
    """Measures and writes the section."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        trained(file)
        sides = [Contestant(kind, __name__, "side", kind=kind, file=str(file)) for kind in (OURS, LOOP, BATCHES)]
        found = alternate(sides, wanted=3, times=1)
    size = found.facts[OURS]["bytes"] / 1e6
    rows = [
        (c.name, f"{size / found.seconds(c.name):.2f}", *(f"{found.ratio(o, c.name):.2f}" for o in (LOOP, BATCHES)))
        for c in sides
    ]
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            results.table(("work", "M bytes/s", "speed over the loop's", "over the batches'"), rows),
            "",
            f"Target: at least {TARGET} of the loop's speed. {found.ratio(LOOP, OURS):.2f}.",
            "",
            f"{found.note()}.",
        ]
    )
    results.write("prepare", "Preparing with a tokenizer.json", body)
