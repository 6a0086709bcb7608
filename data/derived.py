"""Lists, pairs, preferences and prompts made from the text of the standard library, for the objectives that need them.

What is preferred or relevant is known by construction: a docstring belongs to its own function and not to another's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from data.chats import ChatTemplate
from data.corpora import PythonDocs, PythonSearch, first_sentence
from data.sources import Record


def _others(records: list[Record], i: int, count: int) -> list[Record]:
    """`count` records other than the i-th, at strides that differ from record to record."""
    stride = 1 + (7919 * i) % max(1, len(records) - 1)
    return [records[(i + (n + 1) * stride) % len(records)] for n in range(count)]


@dataclass(frozen=True)
class PythonLists:
    """Lists to rank: a sentence before its own function's source (`relevance` 1) and before other functions' (0).

    Arguments:
        split: `train`, `validation` or `test`.
        others: candidates beside the right one.
    """

    split: str = "train"
    others: int = 3

    def __iter__(self) -> Iterator[Record]:
        records = list(PythonSearch(split=self.split))
        for i, record in enumerate(records):
            sources = [record["positive"], *(other["positive"] for other in _others(records, i, self.others))]
            # The right one stands at another place in each list.
            place = i % len(sources)
            order = [*range(1, place + 1), 0, *range(place + 1, len(sources))]
            yield {
                "candidates": [f"{record['query']}\n{sources[k]}" for k in order],
                "relevance": [float(k == 0) for k in order],
            }


@dataclass(frozen=True)
class PythonSummaries:
    """Pairs of a docstring's first sentence (`query`) and the paragraphs behind its first (`positive`).

    Arguments:
        split: `train`, `validation` or `test`.
    """

    split: str = "train"

    def __iter__(self) -> Iterator[Record]:
        for record in PythonDocs(split=self.split):
            first, _, rest = record["text"].strip().partition("\n\n")
            if rest.strip():
                yield {"query": first_sentence(first), "positive": rest.strip() + "\n"}


@dataclass(frozen=True)
class PythonPreferences:
    """Preferences: after a function's source, its own first sentence is chosen and another function's rejected.

    Arguments:
        split: `train`, `validation` or `test`.
    """

    split: str = "train"

    def __iter__(self) -> Iterator[Record]:
        records = list(PythonSearch(split=self.split))
        for i, record in enumerate(records):
            other = _others(records, i, 1)[0]
            yield {"prompt": record["positive"], "chosen": record["query"], "rejected": other["query"]}


@dataclass(frozen=True)
class PythonPrompts:
    """Prompts to continue: first sentences of docstrings.

    Arguments:
        split: `train`, `validation` or `test`.
    """

    split: str = "train"

    def __iter__(self) -> Iterator[Record]:
        for record in PythonSearch(split=self.split):
            yield {"prompt": record["query"]}


@dataclass(frozen=True)
class PythonChats:
    """Conversations about two functions of the standard library: its source asks, its first sentence answers.

    Arguments:
        split: `train`, `validation` or `test`.
        template: a file with the chat template; None for `data.chats.PLAIN`.
    """

    split: str = "train"
    template: str | None = None

    def __iter__(self) -> Iterator[Record]:
        records, template = list(PythonSearch(split=self.split)), ChatTemplate(self.template)
        for i, record in enumerate(records):
            messages = [{"role": "system", "content": "Say in one sentence what a function does."}]
            for asked in (record, *_others(records, i, 1)):
                messages.append({"role": "user", "content": asked["positive"]})
                messages.append({"role": "assistant", "content": asked["query"]})
            yield {"chat": template.parts(messages, f"{type(self).__name__}, record {i}")}
