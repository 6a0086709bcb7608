"""What a run's model does with texts, and what its objective hides from it: by its newest checkpoint and its own data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from launch.report.numbers import number
from launch.report.parts import Figure, Passage, Passages, Section, Series, Table, slug
from launch.report.run_folder import RunFolder
from partitioning.errors import UserError

TEXTS, TOKENS, PROMPT, WRITTEN = 4, 40, 16, 32
"""How many texts; tokens of one that is filled, of a prompt, and of what is written."""
RANKS, CUT = 3, 120
"""Documents of a query, and characters of one."""
ROWS, PLACES = 8, 128
"""Of a map."""


def inside(runs: Sequence[RunFolder], allow_import: Sequence[str]) -> list[Section]:
    """Examples and maps of all runs; what cannot be shown is said in their place."""
    examples, maps, silent = [], [], []
    for run in runs:
        try:
            value = _value(run, allow_import)
            found = _examples(run, value)
            maps += _map(run, value)
        except UserError as error:
            silent.append(f"No examples of {run.name}: {error}")
            continue
        examples += found
        if not found:
            silent.append(
                f"{run.name} neither fills masks, nor goes on with a text, nor is judged by a search: no examples."
            )
    sections = [Section("examples", "Examples", silent, examples)]
    if maps:
        words = ["What the objective hides at the run's last step, drawn as in training."]
        sections.append(Section("hidden", "What is hidden", words, maps))
    return sections


def _value(run: RunFolder, allow_import: Sequence[str]) -> Any:
    if not run.config:
        raise UserError("it was started by a program, and its folder has no configuration to build it by")
    from launch.config import load

    return load([str(run.path / "config.gin")], allow_import=allow_import).value


def _examples(run: RunFolder, value: Any) -> list[Any]:
    from evaluation import MaskedLikelihood, Retrieval
    from training.judging import restored

    objective = value.parts()[-1].objective
    fills = hasattr(objective, "hide") or any(isinstance(judge, MaskedLikelihood) for judge in value.evaluators)
    searches = [judge for judge in value.evaluators if isinstance(judge, Retrieval)]
    if not (fills or searches or objective.continues):
        return []
    plan, values = restored(value, run.path)
    found: list[Any] = []
    if fills:
        found += _filled(run, plan, values, *_texts(value, plan.tokenizer))
    if objective.continues:
        found += _written(run, value, plan, values, *_texts(value, plan.tokenizer))
    return found + [part for judge in searches for part in _searched(run, judge, plan, values)]


def _texts(value: Any, tokenizer: Any) -> tuple[list[np.ndarray], str]:
    """The first documents of what evaluators read, of each source as many, or of the training text where none reads any; and
    which of the two it is."""
    from evaluation.reading import opened

    last = value.parts()[-1]
    held_out = next((judge.data for judge in value.evaluators if getattr(judge, "data", None) is not None), None)
    what = "text that it was trained on" if held_out is None else "held-out text"
    readers = opened(last.data if held_out is None else held_out, tokenizer)
    specials = sorted(vars(tokenizer.specials).values())
    found: list[list[np.ndarray]] = []
    for reader in readers:
        batch = reader.batch(0, batch_size=16, length=last.length, seed=0)
        tokens, segments = (
            next(v for k, v in batch.items() if k.rpartition("/")[2] == n) for n in ("tokens", "segments")
        )
        rows = [
            t[s == 1] for t, s in zip(tokens.reshape(-1, last.length), segments.reshape(-1, last.length), strict=True)
        ]
        plain = [row[~np.isin(row, specials)] for row in rows]
        found.append([row for row in plain if len(row) >= 12])
    # By turns, so that every source is seen.
    turns = [rows[i] for i in range(TEXTS) for rows in found if i < len(rows)][:TEXTS]
    if not turns:
        raise UserError("what it reads has no text of twelve tokens among the first rows")
    return turns, what


def _filled(run: RunFolder, plan: Any, values: Any, texts: Sequence[np.ndarray], what: str) -> list[Any]:
    from launch.fill import MARK, fill

    trunk, tokenizer = plan.trees.models(**values).module("trunk"), plan.tokenizer
    passages, rows = [], []
    for count, ids in enumerate((row[:TOKENS] for row in texts), 1):
        places = [len(ids) // 3, 2 * len(ids) // 3]
        ends = [0, *(place + 1 for place in places)]
        parts = [tokenizer.decode(ids[a:b]) for a, b in zip(ends, [*places, len(ids)], strict=True)]
        hidden = [tokenizer.decode(ids[place : place + 1]) for place in places]
        text = MARK.join(parts)
        if text.count(MARK) != len(places):
            continue  # the text itself speaks of masks
        guesses = fill(trunk, tokenizer, text, count=3)
        runs = [(parts[0], "text")]
        for at, (true, own) in enumerate(zip(hidden, guesses, strict=True), 1):
            runs += [(_line(own[0].text), "given"), (_line(true), "true"), (parts[at], "text")]
            told = [f"{guess.text!r} {guess.probability:.1%}" for guess in own]
            rows.append([f"text {count}, mask {at}", repr(true), *told])
        passages.append(Passage(f"text {count}", runs))
    caption = (
        f"{run.name} fills masks in {what}: bold in a box what it puts there, underlined with dots what had been there."
    )
    head = ["mask", "true", "first guess", "second", "third"]
    guessed = Table(slug(f"guesses {run.name}"), f"{run.name}: the likeliest fillings.", head, rows, words=range(5))
    return [Passages(slug(f"filled {run.name}"), caption, passages), guessed]


def _written(run: RunFolder, value: Any, plan: Any, values: Any, texts: Sequence[np.ndarray], what: str) -> list[Any]:
    from launch.generate import Options, check_room, encoded, generate, reads

    trunk, tokenizer = plan.trees.models(**values).module("trunk"), plan.tokenizer
    prompts = [tokenizer.decode(row[:PROMPT]) for row in texts]
    ids, ends = encoded(tokenizer, value.parts()[-1].data, prompts)
    capacity = max(part.length for part in value.parts())
    tokens = min(WRITTEN, capacity - max(map(len, ids)))
    check_room(trunk, ids, tokens, capacity)
    prefix = reads(value, run.path)
    done = generate(trunk, tokenizer, ids, options=Options(), tokens=tokens, ends=ends, prefix=prefix)
    passages = [
        Passage(f"text {i}", [(prompt, "text"), (text, "given")])
        for i, (prompt, text) in enumerate(zip(prompts, done.texts, strict=True), 1)
    ]
    caption = f"{run.name} goes on with {what}, always by the likeliest token: bold in a box is what it wrote."
    return [Passages(slug(f"written {run.name}"), caption, passages)]


def _searched(run: RunFolder, judge: Any, plan: Any, values: Any) -> list[Any]:
    search: Callable[[Any], Any] = judge.search(
        models=plan.trees.models, placement=plan.placement, tokenizer=plan.tokenizer
    )
    found = search(values)
    rows = []
    for at in range(min(TEXTS, len(found.queries))):
        query = found.queries[at]
        for rank in range(min(RANKS, found.numbers.shape[1])):
            document = found.documents[found.numbers[at, rank]]
            right = "✓ yes" if found.collection.qrels[query].get(document, 0) > 0 else "no"
            label = _short(found.collection.queries[query]) if rank == 0 else ""
            score = number(float(found.scores[at, rank]))
            rows.append([f"{at + 1}.{rank + 1}", label, right, score, _short(found.collection.corpus[document])])
    head = ["query and rank", "query", "relevant", "score", "document"]
    caption = f"{run.name}: the first documents of the first queries of {judge.name}."
    return [Table(slug(f"found {run.name} {judge.name}"), caption, head, rows, words=(1, 2, 4))]


def _line(text: str) -> str:
    return text.replace("\n", "⏎")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= CUT else f"{text[: CUT - 1]}…"


def _map(run: RunFolder, value: Any) -> list[Any]:
    """Which places of some rows are hidden, as a map and as text; nothing where the objective hides within its loss."""
    from launch.rows import batch_of, lines, spelt

    if not hasattr(value.parts()[-1].objective, "hide"):
        return []
    batch, tokenizer, what = batch_of(value, sum(part.steps for part in value.parts()) - 1)
    rows = range(min(ROWS, len(batch["tokens"])))
    specials = {int(i): f"<{name}>" for name, i in vars(tokenizer.specials).items()}
    shown = lambda i: specials.get(int(i)) or tokenizer.decode(np.array([i]))
    series = []
    for name, wanted in (("hidden", True), ("seen", False)):
        places = [
            (place, row)
            for row in rows
            for place in np.flatnonzero((batch["hidden"][row] == wanted) & (batch["segments"][row] > 0))
            if place < PLACES
        ]
        text = [shown(batch["tokens"][row, place]) for place, row in places]
        series.append(Series(name, {"place": [int(p) for p, _ in places]}, [f"row {r}" for _, r in places], text=text))
    caption = f"{run.name}, {what}: filled squares are hidden, small circles seen, and where there is nothing there is no text."
    found: list[Any] = [Figure(slug(f"map {run.name}"), "Hidden places", caption, "map", "row", series)]
    passages = [
        Passage(f"{line.name}, segment {line.segment}", spelt(line, tokenizer))
        for row in rows[:2]
        for line in lines(batch, row)
    ]
    caption = f"{run.name}: the first rows as the model sees them; double underlined is what stands in for hidden text."
    return [*found, Passages(slug(f"rows {run.name}"), caption, passages)]
