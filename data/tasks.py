"""Tasks: which records make each split, and which tokenizer reads them; and preparing one into a cache."""

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from data import cache, cache_writing, corpora
from data.chats import ChatLines
from data.derived import PythonChats, PythonLists, PythonPreferences, PythonPrompts, PythonSummaries
from data.local import ENDINGS, local_source, own_splits
from data.sources import SPLITS, Portion, Record, Source, fingerprint
from data.tokenizers import Bytes, Tokenizer, TokenizerSpec
from partitioning.errors import UserError

CACHE_VARIABLE = "PALMETTE_CACHE"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A named corpus with its splits and its tokenizer.

    The fields of its records say what a batch holds: `text` packs into rows; any other fields (`query`, `positive`,
    `candidates`, `prompt`, `chosen`, ...) give one example a row, see `data.reader`.

    Arguments:
        name: the name of its cache folder: letters, digits, `-`, `_` and `.`.
        train, validation, test: the records of each split; None where there is none.
        tokenizer: what reads the texts, trained on `train` when the task is prepared; bytes by default.
        version: what else makes a cache of this task differ, e.g. the Python that it reads; part of the folder.
    """

    name: str
    train: Source
    validation: Source | None = None
    test: Source | None = None
    tokenizer: TokenizerSpec | None = None
    version: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise UserError(f"task name {self.name!r}: letters, digits, '-', '_' and '.' are wanted")

    @property
    def reads_with(self) -> TokenizerSpec:
        """The tokenizer, by default bytes."""
        return self.tokenizer if self.tokenizer is not None else Bytes()

    def splits(self) -> dict[str, Source]:
        """The splits that there are, by name."""
        given = {name: getattr(self, name) for name in SPLITS}
        return {name: source for name, source in given.items() if source is not None}

    def folder(self, root: str | None = None) -> str:
        """Where this task's cache lies below a root (see `cache_root`)."""
        name = "-".join(part for part in (self.name, self.version, self.reads_with.tag) if part)
        return cache.join(cache_root(root), name)


def cache_root(folder: str | None = None) -> str:
    """The folder of all caches: the argument, else the variable PALMETTE_CACHE, else `~/.cache/palmette`."""
    root = folder or os.environ.get(CACHE_VARIABLE) or "~/.cache/palmette"
    return root if cache.is_remote(root) else os.path.abspath(os.path.expanduser(root))


def _embedded(name: str, source: Callable[..., Source]) -> Task:
    import platform

    splits: dict[str, Any] = {split: source(split=split) for split in SPLITS}
    return Task(name=name, version=f"py{platform.python_version()}", **splits)


TASKS: dict[str, Task] = {
    "python_docs": _embedded("python_docs", corpora.PythonDocs),
    "python_code": _embedded("python_code", corpora.PythonCode),
    "python_search": _embedded("python_search", corpora.PythonSearch),
    "python_summaries": _embedded("python_summaries", PythonSummaries),
    "python_lists": _embedded("python_lists", PythonLists),
    "python_preferences": _embedded("python_preferences", PythonPreferences),
    "python_prompts": _embedded("python_prompts", PythonPrompts),
    "python_chats": _embedded("python_chats", PythonChats),
}


def _split_task(
    whole: Source,
    name: str,
    validation: Source | None,
    test: Source | None,
    held_out: float,
    spec: TokenizerSpec | None,
) -> Task:
    """A task of a source, which gives up `held_out` of itself for each other split where there is neither."""
    if validation is None and test is None:
        train, validation, test = (Portion(whole, split, held_out) for split in SPLITS)
        return Task(name=name, train=train, validation=validation, test=test, tokenizer=spec)
    return Task(name=name, train=whole, validation=validation, test=test, tokenizer=spec)


def _name_of(path: str, otherwise: str) -> str:
    return re.sub(r"[^\w.-]+", "_", Path(path).stem).strip("._-") or otherwise


def chat_task(
    path: str,
    *,
    template: str | None = None,
    name: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    held_out: float = 0.05,
    tokenizer: TokenizerSpec | None = None,
) -> Task:
    """A task over conversations in JSON lines, of which the assistant's answers are learned; see `data.chats`.

    Arguments:
        path: the training conversations, a `.jsonl` file or a folder.
        template: a file with a Jinja2 chat template; a plain one by default.
        name, validation, test, held_out, tokenizer: as in `text_task`.

    Errors: UserError naming the path.
    """
    source = lambda where: None if where is None else ChatLines(where, template)
    return _split_task(
        ChatLines(path, template), name or _name_of(path, "chat"), source(validation), source(test), held_out, tokenizer
    )


def text_task(
    path: str,
    *,
    name: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    field: str = "text",
    held_out: float = 0.05,
    tokenizer: TokenizerSpec | None = None,
) -> Task:
    """A task over what lies at a path.

    That is a `.txt`, `.jsonl` or `.parquet` file, a folder of one of these, a folder that Hugging Face `datasets` saved,
    or one in the BEIR layout, whose positive judgements are pairs.

    Arguments:
        path: the training text. A folder that comes divided into train, validation and test keeps its own splits.
        name: the task's name; the path's own by default.
        validation, test: paths of the held-out text. Where there is neither, `held_out` of `path` is kept for each.
        field: the key or column of the text, where there are several.
        held_out: the share of each held-out split, by the hash of a document, or by lines where documents are few.
        tokenizer: bytes by default.

    Errors: UserError naming the path.
    """
    own = own_splits(path, field)
    if own and "train" not in own:
        raise UserError(f"{path}: no split 'train'; there is {', '.join(own)}")
    source = lambda split, where: own.get(split) if where is None else local_source(where, field)
    return _split_task(
        own["train"] if own else local_source(path, field),
        name or _name_of(path, "text"),
        source("validation", validation),
        source("test", test),
        held_out,
        tokenizer,
    )


def find(task: str | Task, tokenizer: TokenizerSpec | None = None) -> Task:
    """The task of a name or path, with another tokenizer where one is given.

    Errors: UserError naming the tasks there are.
    """
    if isinstance(task, str):
        if task in TASKS:
            task = TASKS[task]
        elif "/" in task or task.endswith(ENDINGS) or Path(task).is_dir():
            task = text_task(task)
        else:
            raise UserError(f"no task {task!r}: one of {', '.join(TASKS)}, or a path to text, is wanted")
    return task if tokenizer is None else replace(task, tokenizer=tokenizer)


def prepare(
    task: str | Task,
    folder: str | None = None,
    *,
    tokenizer: TokenizerSpec | None = None,
    overwrite: bool = False,
    processes: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> str:
    """Tokenise a task once into its cache and return the cache's folder; one of the same identity is reused.

    Interrupted, it goes on where it was when it is called again. A cache is the same whatever the number of processes.

    Arguments:
        task: a task, the name of an embedded one, or a path to text.
        folder: the root of all caches, see `cache_root`.
        tokenizer: instead of the task's own.
        overwrite: replace a cache of another identity instead of refusing.
        processes: how many tokenise; a script that asks for several keeps its own work under `if __name__ == "__main__"`.
        report: takes one line about each thing done, and now and then one about how fast it goes.

    Errors: UserError for bad text (file and line), for a cache of another identity (what differs), and when the cache
    cannot be written. Nothing half-written is left, and what was there stays.
    """
    task = find(task, tokenizer)
    target = task.folder(folder)
    splits = task.splits()
    identity = {"task": task.name, "tokenizer": described(task.reads_with), "shuffle": cache_writing.SHUFFLE_SEED}
    if processes < 1:
        raise UserError(f"processes = {processes}: at least 1 is wanted")
    if _reusable(target, identity, splits, overwrite):
        cache_writing.clear_stale(target)
        report(f"{target}: already prepared")
        return target
    trained = train_tokenizer(task.reads_with, task.train)
    splits = {name: source for name, source in splits.items() if name == "train" or _holds_any(source)}
    cache_writing.write(
        target,
        task=task.name,
        identity=identity,
        tokenizer=trained,
        tag=task.reads_with.tag,
        splits=splits,
        processes=processes,
        report=report,
    )
    report(f"{target}: prepared")
    return target


def train_tokenizer(spec: TokenizerSpec, records: Iterable[Record]) -> Tokenizer:
    """Train on the records, or on the tasks that the tokenizer itself names."""
    named = getattr(spec, "corpora", ())
    sources = [find(name).train for name in named] or [records]
    return spec.train(text for source in sources for record in source for text in texts_of(record))


def _reusable(target: str, identity: dict[str, Any], splits: dict[str, Source], overwrite: bool) -> bool:
    try:
        manifest = cache.read_manifest(target)
    except UserError:
        if not overwrite:
            raise
        return False
    if manifest is None:
        return False
    found = dict(manifest["identity"])
    sources = found.pop("sources")
    differs = [key for key in identity if found.get(key) != identity[key]]
    if not differs:
        now = {name: fingerprint(source) for name, source in splits.items() if name in sources or _holds_any(source)}
        differs = [
            f"the {name} text" for name in sorted(now.keys() | sources.keys()) if now.get(name) != sources.get(name)
        ]
    if differs:
        if overwrite:
            return False
        raise UserError(f"{target}: made from another {', '.join(differs)}; prepare with --overwrite to replace it")
    if not overwrite:
        cache.Cache(target)
        return True
    try:
        cache.Cache(target)
    except UserError:
        return False
    return all(cache.counted(column) for split in manifest["splits"].values() for column in split["columns"].values())


def _holds_any(source: Source) -> bool:
    return next(iter(source), None) is not None


def texts_of(record: dict[str, Any]) -> list[str]:
    """All texts of a record."""
    found: list[str] = []
    for value in record.values():
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(item for item in value if isinstance(item, str))
    return found


def described(spec: TokenizerSpec) -> dict[str, Any]:
    """A tokenizer's configuration as JSON, which a cache records and must agree with."""
    given = asdict(spec) if is_dataclass(spec) and not isinstance(spec, type) else {"repr": repr(spec)}
    # A saved tokenizer is known by what it is, which its tag says, and may lie anywhere.
    given.pop("folder", None)
    return json.loads(json.dumps({"tag": spec.tag, **given}))
