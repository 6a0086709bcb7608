"""The runs that are measured: a BERT-like encoder on random tokens, through the same plan, step and placement as any run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from data.tokenizers import Specials
from models import Attention, FeedForward, LayerNorm, LearnedPositions, TiedHead, Trunk
from objectives import MaskedLM, RandomTokens
from training import Run
from training.optimizers import AdamW
from training.plan import Plan

SPECIALS = Specials(pad=0, bos=1, eos=2, mask=3, cls=4, sep=5)


@dataclass(frozen=True)
class RandomText:
    """A reader of uniformly random full rows.

    Args:
      vocabulary: size.
    """

    # No mixture.
    names = ()
    weights = MappingProxyType({})

    vocabulary: int
    specials: Specials = SPECIALS
    tokenizer: Any = None

    def open(self) -> RandomText:
        """Itself."""
        return self

    def spec(self, *, batch_size: int, length: int) -> dict[str, Any]:
        """See `data.reader.Reader`."""
        text = ((batch_size, length), np.dtype(np.int32))
        return {"tokens": text, "segments": text, "positions": text, "row": ((batch_size,), np.dtype(np.int32))}

    def identity(self) -> dict[str, Any]:
        """See `data.reader.Reader`."""
        return {"task": "random", "vocabulary": self.vocabulary}

    def frequencies(self) -> np.ndarray:
        """See `data.reader.Reader`."""
        return np.full(self.vocabulary, 1 / self.vocabulary)

    def planned(self, steps: int, row: Any) -> tuple:
        """See `data.reader.Reader`."""
        return ()

    def epochs(self, row: int, **_: Any) -> dict[str, float]:
        """See `data.reader.Reader`."""
        return {}

    def batch(self, step: int, *, batch_size: int, length: int, **_: Any) -> dict[str, np.ndarray]:
        """See `data.reader.Reader`."""
        shape, draw = (batch_size, length), np.random.default_rng(step)
        return {
            "tokens": draw.integers(6, self.vocabulary, shape, dtype=np.int32),
            "segments": np.ones(shape, np.int32),
            "positions": np.ascontiguousarray(np.broadcast_to(np.arange(length, dtype=np.int32), shape)),
            "row": np.arange(batch_size, dtype=np.int32) + step * batch_size,
        }


@dataclass(frozen=True)
class RandomPairs(RandomText):
    """A reader of uniformly random full pairs, `query` of the stage's length and `positive` of another.

    Args:
      target: the length of `positive`.
    """

    target: int = 64

    def spec(self, *, batch_size: int, length: int) -> dict[str, Any]:
        """See `data.reader.Reader`."""
        return self._nested(lambda n: super(RandomPairs, self).spec(batch_size=batch_size, length=n), length)

    def batch(self, step: int, *, batch_size: int, length: int, **_: Any) -> dict[str, np.ndarray]:
        """See `data.reader.Reader`."""
        return self._nested(lambda n: super(RandomPairs, self).batch(step, batch_size=batch_size, length=n), length)

    def _nested(self, text: Callable[[int], dict[str, Any]], length: int) -> dict[str, Any]:
        sides = {"query": text(length), "positive": text(self.target)}
        row = {"row": sides["query"]["row"]}
        return row | {f"{side}/{k}": v for side, fields in sides.items() for k, v in fields.items() if k != "row"}


def bert(
    *,
    layers: int = 4,
    width: int = 256,
    heads: int = 4,
    vocabulary: int = 8192,
    length: int = 128,
    batch_size: int = 32,
    unroll: int = 1,
    weight_decay: float = 0.01,
    clip: float | None = 1.0,
) -> Run:
    """BERT's layout: post-norm, LayerNorm, exact GELU, biases, learned positions, a transform before the tied head."""
    model = partial(
        Trunk,
        width=width,
        layers=layers,
        mixer=partial(Attention, heads=heads, theta=None, bias=True),
        feed_forward=partial(FeedForward, activation="gelu", bias=True),
        norm=LayerNorm,
        placement="post",
        positions=partial(LearnedPositions, longest=length),
        embedding_norm=True,
        final_norm=False,
        head=partial(TiedHead, transform=True, bias=True),
        unroll=unroll,
    )
    return Run(
        model=model,
        data=RandomText(vocabulary),
        objective=MaskedLM(select=RandomTokens(rate=0.15)),
        steps=1000,
        batch_size=batch_size,
        length=length,
        optimizer=AdamW(learning_rate=1e-4, weight_decay=weight_decay),
        clip=clip,
    )


def stepping(run: Run) -> tuple[Callable[[], None], Plan, dict[str, int]]:
    """A turn that is a step of a run's first stage, placement of its batch included; the plan; and what the program takes.

    Returns:
      The turn, the plan, and `temporary` bytes and `parameters`.
    """
    plan = run.plan()
    stage = plan.stages[0]
    program, held = plan.compile(stage), [plan.init()]
    batches = [stage.reader.batch(i, batch_size=run.batch_size, length=run.length) for i in range(4)]
    count = itertools.count()

    def turn() -> None:
        held[0], out = program(held[0], plan.put(stage, batches[next(count) % 4]))
        jax.block_until_ready((held[0], out))

    parameters = sum(x.size for x in held[0].params.values())
    return turn, plan, {"temporary": program.memory_analysis().temp_size_in_bytes, "parameters": parameters}
