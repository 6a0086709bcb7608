"""Data that are somewhere else: what a run must know of them to be planned, and nothing to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NoReturn

import numpy as np
from jaxtyping import Float, Int

from data.columns import Column, MemorySplit
from data.reader import Reading, SplitReader
from data.tokenizers import ByPiece, Specials
from partitioning.errors import UserError
from partitioning.ranges import Range, check_fields

UNREAD = (
    "this config describes its data and has none to read: it can be planned as it is; to train, bind "
    "training.Run.data = @data.Cached() and prepare its task"
)


class Unread(ByPiece):
    """A tokenizer of which only the number of its tokens is known.

    Arguments:
        size: that number, specials included.
    """

    specials = Specials()
    identity = "unread"

    def __init__(self, size: int):
        self.size = size

    @property
    def vocabulary(self) -> int:
        """See `data.tokenizers.Tokenizer`."""
        return self.size

    def encode(self, text: str) -> Int[np.ndarray, " S"]:
        """Refuses: no token is known."""
        raise UserError(UNREAD)

    def encode_many(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        """Refuses: no token is known."""
        raise UserError(UNREAD)


class DescribedReader(SplitReader):
    """The shapes of batches, and no batch."""

    def identity(self) -> NoReturn:
        """Refuses: nothing can be read, so nothing can be trained on."""
        raise UserError(UNREAD)

    def frequencies(self) -> Float[np.ndarray, " V"]:
        """None is known: all alike, in their place."""
        return np.full(self.vocabulary, 1 / self.vocabulary)


@dataclass(frozen=True, kw_only=True)
class Described(Reading):
    """Data by their shape alone, so that a run is planned on a machine that has none of them.

    Arguments:
        vocabulary: how many tokens the tokenizer has, specials included.
        texts: the fields of a record that are texts: `text`, or such as `query` and `positive`.

    Errors: UserError for a number out of range; on training, since there is nothing to read.
    """

    vocabulary: Annotated[int, Range(8, 1 << 31)]
    texts: Sequence[str] = ("text",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)

    def open(self) -> SplitReader:
        """A reader of the shapes."""
        one = Column("text", np.ones(1, np.int64), None, np.zeros(1, np.int32))
        return DescribedReader(MemorySplit(dict.fromkeys(self.texts, one)), Unread(self.vocabulary), self, {}, 1)
