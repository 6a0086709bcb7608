"""Readers: a batch as a pure function of seed, step and control log."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from data import cache, tasks
from data.columns import TEXTS, MemorySplit, Split, Tokenized
from data.control import ControlEntry
from data.example_rows import ExampleRows
from data.sources import Record, fingerprint
from data.tasks import Task
from data.text_rows import INT, Batch, Rows, Shapes, TextRows
from data.tokenizers import Bytes, Specials, Tokenizer, TokenizerSpec
from partitioning.errors import UserError

MEMORY_WINDOW = 1024


class Reader(Protocol):
    """Batches by random access.

    Of a mixture, `names` are the sources in the order of a batch's `source` numbers and `weights` their shares at the
    start; of one split both are empty.
    """

    vocabulary: int
    specials: Specials
    tokenizer: Tokenizer
    names: Sequence[str]
    weights: Mapping[str, float]

    def spec(self, *, batch_size: int, length: int) -> Shapes:
        """Global shape and type of every array of a batch."""

    def rows(self, *, length: int) -> int:
        """Rows in one epoch."""

    def batch(
        self,
        step: int,
        *,
        batch_size: int,
        length: int,
        seed: int,
        start: int = 0,
        host: int = 0,
        hosts: int = 1,
        control: Sequence[ControlEntry] = (),
    ) -> Batch:
        """One host's share of the batch of a step.

        Global row i of the batch is row `start + step * batch_size + i` of the run, whatever the number of hosts.

        Arguments:
            step: counted from the beginning of the stage.
            batch_size: rows of the global batch.
            length: tokens in a row.
            seed: of every order.
            start: rows consumed by earlier stages.
            host, hosts: this host gets rows `host * batch_size / hosts` up to `(host + 1) * batch_size / hosts`.
            control: the control log so far.
        Returns: the arrays of `spec`, of this host's rows; `row` is the number of a row in the global batch.
        Errors: UserError when `batch_size` is not divisible by `hosts`.
        """

    def planned(self, steps: int, row: Callable[[int], int]) -> tuple[ControlEntry, ...]:
        """What the config itself changes over a run of so many steps; these entries belong to every `control`.

        Arguments:
            steps: of the run.
            row: from a step to the run's first row of it.
        """

    def epochs(self, row: int, *, length: int, seed: int, control: Sequence[ControlEntry] = ()) -> dict[str, float]:
        """How often what is read has been read before row `row` of the run, as figures to report."""

    def identity(self) -> dict[str, Any]:
        """What was read, as JSON: a resumed run compares it with what its checkpoint recorded."""

    def frequencies(self) -> Float[np.ndarray, " V"]:
        """The share of each id among the tokens of an epoch's texts, what is put before and after each included."""


def global_rows(
    step: int, *, batch_size: int, start: int, host: int, hosts: int
) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
    """A host's row numbers: in the run, and in the batch."""
    if batch_size < 1 or hosts < 1 or batch_size % hosts:
        raise UserError(f"a batch of {batch_size} rows cannot be shared evenly by {hosts} hosts")
    share = batch_size // hosts
    row = np.arange(host * share, (host + 1) * share)
    return start + step * batch_size + row, row.astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How examples become rows.

    Arguments:
        pack: several documents a row (plain text only); otherwise one a row, truncated.
        begin, end: the special put before and after every document (`bos`, `eos`, `cls`, `sep`), or None.
        items: the number of a list's items that a row holds; None: as many as the longest list has.
        epochs: rows past so many epochs are all padding, so an evaluation that reads whole batches counts every row
            once; None: endless.
        shuffle: a new seeded order each epoch; False: the order of the cache.
    """

    pack: bool = True
    begin: str | None = "bos"
    end: str | None = "eos"
    items: int | None = None
    epochs: int | None = None
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name in ("begin", "end"):
            special = getattr(self, name)
            if special is not None and special not in {f.name for f in fields(Specials)}:
                raise UserError(
                    f"{type(self).__name__}.{name} = {special!r}: one of bos, eos, cls, sep or None is wanted"
                )
        for name in ("items", "epochs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{type(self).__name__}.{name} = {getattr(self, name)}: at least 1, or None, is wanted")

    def options(self) -> dict[str, Any]:
        """The options of reading, as JSON."""
        return {f.name: getattr(self, f.name) for f in fields(Reading)}

    def rows_over(self, split: Split, tokenizer: Tokenizer, window: int) -> Rows:
        """The rows of a split under these options."""
        begin, end = ([getattr(tokenizer.specials, n)] if n else [] for n in (self.begin, self.end))
        if self.pack and dict(split.kinds) == {"text": "text"}:
            return TextRows(split, tokenizer, window=window, begin=begin, end=end, shuffle=self.shuffle)
        return ExampleRows(split, tokenizer, window=window, begin=begin, end=end, most=self.items, shuffle=self.shuffle)


class SplitReader:
    """A reader over one split. It may be called from several threads."""

    names: Sequence[str] = ()
    weights: Mapping[str, float] = MappingProxyType({})

    def __init__(self, split: Split, tokenizer: Tokenizer, options: Reading, identity: Mapping[str, Any], window: int):
        self.tokenizer = tokenizer
        self.vocabulary, self.specials = tokenizer.vocabulary, tokenizer.specials
        self._rows = options.rows_over(split, tokenizer, window)
        self._split, self._options, self._epochs = split, options, options.epochs
        self._identity = {**identity, "tokenizer": tokenizer.identity, "options": options.options()}
        self._lock = threading.Lock()

    def identity(self) -> dict[str, Any]:
        """See `Reader`."""
        return dict(self._identity)

    def frequencies(self) -> Float[np.ndarray, " V"]:
        """See `Reader`."""
        return self._frequencies

    @cached_property
    def _frequencies(self) -> Float[np.ndarray, " V"]:
        split, around = self._split, [getattr(self.specials, n) for n in (self._options.begin, self._options.end) if n]
        counts = np.zeros(self.vocabulary)
        for name in (name for name, kind in split.kinds.items() if kind in TEXTS):
            counts += split.counts(name, self.vocabulary)
            texts = split.examples if split.kinds[name] == "text" else len(split.inner(name)) - 1
            np.add.at(counts, around, texts)
        return counts / counts.sum()

    def spec(self, *, batch_size: int, length: int) -> Shapes:
        """See `Reader`."""
        shapes = {name: ((batch_size, *shape), dtype) for name, (shape, dtype) in self._rows.shapes(length).items()}
        return {**shapes, "row": ((batch_size,), INT)}

    def rows(self, *, length: int) -> int:
        """See `Reader`."""
        with self._lock:
            return self._rows.count(length)

    def planned(self, steps: int, row: Callable[[int], int]) -> tuple[ControlEntry, ...]:
        """See `Reader`: nothing."""
        return ()

    def epochs(self, row: int, *, length: int, seed: int, control: Sequence[ControlEntry] = ()) -> dict[str, float]:
        """See `Reader`: `epoch`."""
        return {"epoch": row / self.rows(length=length)}

    def take(self, rows: Int[np.ndarray, " b"], *, length: int, seed: int) -> Batch:
        """The rows of these numbers of the run, without `row`."""
        if length < 4:
            raise UserError(f"length = {length}: at least 4 tokens a row are wanted")
        with self._lock:
            if self._epochs is None:
                return self._rows.take(rows, length=length, seed=seed)
            there = np.flatnonzero(rows < self._epochs * self._rows.count(length))
            found = self._rows.take(rows[there], length=length, seed=seed) if len(there) else {}
        if len(there) == len(rows):
            return found
        out = {}
        for name, (shape, dtype) in self._rows.shapes(length).items():
            blank = self.specials.pad if name.rsplit("/")[-1] == "tokens" else 0
            out[name] = np.full((len(rows), *shape), blank, dtype)
            if found:
                out[name][there] = found[name]
        return out

    def batch(
        self,
        step: int,
        *,
        batch_size: int,
        length: int,
        seed: int,
        start: int = 0,
        host: int = 0,
        hosts: int = 1,
        control: Sequence[ControlEntry] = (),
    ) -> Batch:
        """See `Reader`; a single split has nothing that a control log changes."""
        rows, row = global_rows(step, batch_size=batch_size, start=start, host=host, hosts=hosts)
        return {**self.take(rows, length=length, seed=seed), "row": row}


@dataclass(frozen=True, kw_only=True)
class Cached(Reading):
    """One split of a prepared task.

    Arguments:
        task: a `Task`, the name of an embedded corpus, or a path to text.
        split: `train`, `validation` or `test`.
        folder: the root of all caches, local or `gs://`; see `tasks.cache_root`.
        tokenizer: instead of the task's own.

    Errors: on opening, UserError when the task is unknown or not prepared, the split is not there, the cache was made
    with another tokenizer, or it was cut short.
    """

    task: str | Task = "python_docs"
    split: str = "train"
    folder: str | None = None
    tokenizer: TokenizerSpec | None = None

    def prepare(
        self, *, overwrite: bool = False, processes: int = 1, report: Callable[[str], None] = lambda line: None
    ) -> str:
        """Prepare the task where it is not, and return its folder; see `tasks.prepare`."""
        return tasks.prepare(
            self.task,
            self.folder,
            tokenizer=self.tokenizer,
            overwrite=overwrite,
            processes=processes,
            report=report,
        )

    def open(self) -> SplitReader:
        """Open the cache for reading."""
        task = tasks.find(self.task, self.tokenizer)
        target = task.folder(self.folder)
        if cache.read_manifest(target) is None:
            raise UserError(
                f"{target}: {task.name} is not prepared here; run `palmette prepare` on this config or task first"
            )
        opened = cache.Cache(target)
        made_with = opened.manifest["identity"]["tokenizer"]
        if made_with != tasks.described(task.reads_with):
            raise UserError(
                f"{target}: made with tokenizer {made_with['tag']}, not {task.reads_with.tag}; prepare again"
            )
        split = opened.split(self.split)
        identity = {"task": task.name, "split": self.split, "content": opened.manifest["content"]}
        return SplitReader(split, opened.tokenizer, self, identity, split.window)


@dataclass(frozen=True, kw_only=True)
class Records(Reading):
    """Examples given as Python values and tokenised in memory, for tests and notebooks; the same batches, no folder.

    Arguments:
        examples: records with the same fields each, as the sources yield.
        tokenizer: bytes by default; one that is trained is trained on the examples.
        window: examples in a window.
    """

    examples: Sequence[Record] = field(repr=False)
    tokenizer: TokenizerSpec | None = None
    window: int = MEMORY_WINDOW

    def open(self) -> SplitReader:
        """Tokenise and open."""
        spec: TokenizerSpec = self.tokenizer if self.tokenizer is not None else Bytes()
        tokenizer = tasks.train_tokenizer(spec, self.examples)
        tokenized = Tokenized(tokenizer, "records")
        tokenized.add(self.examples)
        identity = {"task": "records", "split": "train", "content": fingerprint(self.examples)}
        return SplitReader(MemorySplit(tokenized.columns()), tokenizer, self, identity, self.window)
