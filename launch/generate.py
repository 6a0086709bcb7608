"""Goes on with prompts by a trained trunk that reads from left to right."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from partitioning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """How tokens are chosen, as the command line says it; greedy where it says nothing.

    Args:
      temperature, top_k, top_p, min_p: of sampling; `top_k` is the number of candidates beside `contrastive`.
      beams: of a beam search.
      contrastive: the penalty's weight in contrastive search.
      seed: of the draws; 0 by default.

    Raises:
      UserError: options of two ways to choose.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    beams: int | None = None
    contrastive: float | None = None
    seed: int | None = None

    def __post_init__(self):
        names = ("temperature", "top_k", "top_p", "min_p", "beams", "contrastive", "seed")
        given = [name for name in names if getattr(self, name) is not None]
        draws = [name for name in given if name not in ("beams", "contrastive", "seed")]
        flag = lambda name: f"--{name.replace('_', '-')}"
        if self.beams is not None and (other := [name for name in given if name != "beams"]):
            raise UserError(f"--beams and {flag(other[0])}: a beam search draws nothing, give one of them")
        if self.contrastive is not None and (other := [n for n in given if n not in ("contrastive", "top_k")]):
            raise UserError(
                f"--contrastive and {flag(other[0])}: only --top-k, its candidates, goes with --contrastive"
            )
        if self.seed is not None and not draws:
            raise UserError("--seed alone: without --temperature, --top-k, --top-p or --min-p nothing is drawn")

    def strategy(self) -> Any:
        """The strategy, a `models.decoding.Strategy`."""
        from models.decoding import Beam, Contrastive, Greedy, MinP, Sampler, TopK, TopP

        if self.beams is not None:
            return Beam(beams=self.beams)
        if self.contrastive is not None:
            return Contrastive(alpha=self.contrastive, candidates=4 if self.top_k is None else self.top_k)
        filters: list[Any] = []
        filters += [] if self.top_k is None else [TopK(k=self.top_k)]
        filters += [] if self.top_p is None else [TopP(p=self.top_p)]
        filters += [] if self.min_p is None else [MinP(p=self.min_p)]
        if self.temperature is None and not filters:
            return Greedy()
        return Sampler(temperature=1.0 if self.temperature is None else self.temperature, filters=tuple(filters))


@dataclass(frozen=True)
class Written:
    """What was generated.

    Args:
      texts: the continuations.
      read, chosen: tokens of the prompts, and tokens that the loop chose.
      prefill, decoding, compiling: seconds.
    """

    texts: list[str]
    read: int
    chosen: int
    prefill: float
    decoding: float
    compiling: float

    def speed(self) -> str:
        """One line of tokens a second."""
        told = f"read {self.read} tokens at {self.read / self.prefill:,.0f} a second"
        if self.chosen:
            told += f", wrote {self.chosen} at {self.chosen / self.decoding:,.0f} a second"
        return f"{told}; compiled in {self.compiling:.1f} s"


def prompts_of(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts: arguments, or the lines of a file.

    Raises:
      UserError: both, neither, or a file that cannot be read or has no line.
    """
    if bool(given) == (file is not None):
        both = "both arguments and --prompts" if given else "neither an argument nor --prompts"
        raise UserError(f"prompts by {both}: expected one of them")
    if file is None:
        return list(given)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not lines:
        raise UserError(f"--prompts {file}: no line in it, expected a prompt a line")
    return lines


def reads(run: Any, folder: Path) -> bool:
    """Whether the run's trunk sees a prompt in both directions (a prefix), by what its last stage learned.

    Raises:
      UserError: it learned no continuation.
    """
    objective = run.parts()[-1].objective
    if objective.continues is None:
        name = type(objective).__name__
        raise UserError(
            f"{folder}: its objective {name} trains no left-to-right model, so there is nothing to go on with"
        )
    return objective.continues == "prefix"


def encoded(tokenizer: Any, data: Any, prompts: Sequence[str]) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """Prompts as ids, each begun as the run's documents begin, and the ids that end a text.

    Args:
      tokenizer: of the run.
      data: what the run read; of a mixture the first source decides.
      prompts: texts.

    Raises:
      UserError: a prompt without a token.
    """
    source = next(iter(data.sources.values())) if hasattr(data, "sources") else data
    special = lambda name: [getattr(tokenizer.specials, name)] if name else []
    begin = special(getattr(source, "begin", None))
    ids = [np.concatenate([np.array(begin, np.int32), tokenizer.encode(text)]).astype(np.int32) for text in prompts]
    for number, row in enumerate(ids, 1):
        if not len(row):
            raise UserError(
                f"prompt {number} is empty: expected text, since no special token begins a document of this run"
            )
    return ids, tuple(sorted({tokenizer.specials.eos, *special(getattr(source, "end", None))}))


def check_room(trunk: Any, ids: Sequence[np.ndarray], tokens: int, capacity: int) -> None:
    """Refuses prompts that do not fit with their continuation.

    Args:
      trunk: may have learned positions.
      ids: the prompts.
      tokens: most new ones.
      capacity: most of both.

    Raises:
      UserError: names the first prompt that is too long.
    """
    sides = (trunk.encoder, trunk.decoder) if trunk.two_sided else (trunk,)
    for longest in (getattr(side.positions, "longest", capacity) for side in sides):
        if capacity > longest:
            raise UserError(f"--capacity {capacity}: the run's learned positions end at {longest}")
    for number, row in enumerate(ids, 1):
        # An encoder-decoder writes beside its prompt.
        if (max(len(row), tokens) if trunk.two_sided else len(row) + tokens) > capacity:
            raise UserError(
                f"prompt {number} has {len(row)} tokens, and {tokens} more do not fit into {capacity}: "
                "shorten it, take fewer --tokens or a larger --capacity"
            )


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of some strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def generate(
    trunk: Any,
    tokenizer: Any,
    ids: Sequence[np.ndarray],
    *,
    options: Options,
    tokens: int,
    ends: tuple[int, ...],
    stops: Sequence[str] = (),
    prefix: bool = False,
) -> Written:
    """Continuations of all prompts in one batch.

    A stop string is looked for in the finished text, which costs the tokens behind it and misses no spelling of it.

    Args:
      trunk: of a run.
      tokenizer: decodes.
      ids: the prompts, none empty.
      options: how tokens are chosen.
      tokens: most new ones.
      ends: ids that end a text.
      stops: strings before which a text is cut.
      prefix: whether prompts are read in both directions.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from models.decoding import Prompts, Stop, decoder_of, finish, unrolled

    width = max(len(row) for row in ids)
    filled, here = np.full((len(ids), width), trunk.vocabulary.pad, np.int32), np.zeros((len(ids), width), np.int32)
    for row, own in enumerate(ids):
        filled[row, : len(own)], here[row, : len(own)] = own, 1
    graph, weights = nnx.split(unrolled(trunk))
    strategy, stop = options.strategy(), Stop(length=tokens, ends=ends, pad=trunk.vocabulary.pad)
    model = lambda weights: decoder_of(nnx.merge(graph, weights), prefix=prefix)
    keys = jax.random.split(jax.random.key(options.seed or 0), len(ids))
    given = Prompts(jnp.asarray(filled), jnp.asarray(here))

    began = time.perf_counter()
    begin = jax.jit(lambda w, given, keys: strategy.start(model(w), given, stop, keys))
    start = begin.lower(weights, given, keys).compile()
    state = jax.block_until_ready(start(weights, given, keys))
    loop = jax.jit(lambda w, state: finish(model(w), strategy, stop, state)).lower(weights, state).compile()
    compiling = time.perf_counter() - began

    # The first calls, which touch fresh memory, are not timed.
    jax.block_until_ready(loop(weights, state))
    state, prefill = _timed(lambda: start(weights, given, keys))
    found, decoding = _timed(lambda: loop(weights, state))
    rows = [own[own_drawn] for own, own_drawn in zip(np.asarray(found.tokens), np.asarray(found.drawn), strict=True)]
    chosen = int(np.asarray(found.drawn)[:, int(state.count) :].sum())
    texts = [cut(tokenizer.decode(row[~np.isin(row, ends)]), stops) for row in rows]
    return Written(texts, sum(map(len, ids)), chosen, prefill, decoding, compiling)


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    import jax

    begin = time.perf_counter()
    out = jax.block_until_ready(call())
    return out, time.perf_counter() - begin
