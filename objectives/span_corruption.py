"""Span corruption, and a mixture of denoisers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from models.masks import Prefix
from models.vocabulary import Vocabulary
from objectives.base import Loss, Objective, metric
from objectives.denoise import Noise, apart, behind, extra, longer, most, whole_text
from objectives.documents import bodies, documents, ranks
from objectives.draws import Draws
from objectives.token_loss import TokenLoss
from objectives.two_sided import taught
from partitioning.ranges import Range, check_fields


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """One way to hide spans.

    Args:
      density: share of a document's tokens that are hidden.
      span: mean tokens of a span; None for one span at the document's end.
      mode: the token before the inputs under `UL2`.
    """

    density: Annotated[float, Range(0, 1, open=True)] = 0.15
    span: Annotated[float, Range(1, 1 << 20)] | None = 3.0
    mode: Literal["R", "S", "X"] = "R"

    def __post_init__(self):
        check_fields(self)

    def counts(self, tokens: Int[np.ndarray, N], shortest: int) -> tuple[Int[np.ndarray, N], Int[np.ndarray, N]]:
        """Hidden tokens and spans of documents with so many tokens: as T5 rounds, in float32; 0 below `shortest`."""
        whole = tokens < max(shortest, 2)
        noise = np.round(tokens.astype(np.float32) * np.float32(self.density)).astype(np.int64)
        noise = np.clip(noise, 1, np.maximum(tokens - 1, 1))
        spans = np.ones_like(noise)
        if self.span is not None:
            spans = np.round(noise.astype(np.float32) / np.float32(self.span)).astype(np.int64)
            spans = np.minimum(np.maximum(spans, 1), np.maximum(tokens - noise, 1))
        return np.where(whole, 0, noise), np.where(whole, 0, spans)


def random_spans(
    start: Int[Array, S], size: Int[Array, S], noise: Int[Array, S], spans: Int[Array, S], draw: Float[Array, S]
) -> Bool[Array, S]:
    """Hides spans in every document of a row, beginning with a kept stretch and ending with a hidden one.

    All ways to cut the hidden and the kept tokens into `spans` stretches each, none empty, are equally likely.

    Args:
      start, size: of each token's document.
      noise, spans: hidden tokens and spans of each token's document.
      draw: uniform draws.
    """
    slots = jnp.arange(start.shape[0], dtype=start.dtype)
    inside = (slots >= start) & (slots < start + size)
    # A document's slots stand for its hidden tokens and then for its kept ones; each group is cut into stretches.
    hides = inside & (slots < start + noise)
    group = jnp.where(inside, jnp.where(hides, start, start + noise), slots)
    cut = inside & (ranks(jnp.where(slots == group, -1.0, draw), group) < spans)
    stretch = jnp.cumsum(cut)
    stretch = stretch - stretch[group]
    # The kept tokens that stand before the k-th hidden stretch: up to where the (k + 1)-th kept one begins, or all.
    begins = cut & ~hides & (stretch > 0)
    place = jnp.where(begins, start + stretch - 1, slots.shape[0])
    kept = (size - noise).at[place].set(slots - group, mode="drop")
    where = jnp.where(hides, slots + kept[start + stretch], slots.shape[0])
    return jnp.zeros(slots.shape, bool).at[where].set(True, mode="drop")


@dataclass(frozen=True, kw_only=True)
class Denoising(Objective):
    """Base of the objectives that read a corrupted document and write what is missing behind it.

    An encoder-decoder reads the inputs on one side and writes the targets on the other. To a trunk alone the inputs are a
    prefix whose tokens see each other, and the targets follow. Sentinels and modes are ids behind the vocabulary, where the
    embedding table is padded.

    Args:
      shortest: documents with fewer tokens are left whole and have no loss; the larger, the less the rows grow.
      penalty: what a prediction is charged.
    """

    shortest: Annotated[int, Range(2, 1 << 20)] = 16
    penalty: TokenLoss = field(default_factory=TokenLoss)

    def __post_init__(self):
        check_fields(self)

    def mixture(self) -> tuple[Denoiser, ...]:
        """The denoisers, each as likely as the others."""
        raise TypeError(f"{type(self).__name__} has no denoisers: define `mixture`")

    def modes(self) -> tuple[str, ...]:
        """The modes that are told, in the order of their ids."""
        return ()

    def _tables(self, length: int) -> tuple[Int[np.ndarray, "D N"], Int[np.ndarray, "D N"]]:
        """Hidden tokens and spans of a document of 0, 1, .. tokens under each denoiser."""
        both = [one.counts(np.arange(length + 1), self.shortest) for one in self.mixture()]
        return np.stack([noise for noise, _ in both]), np.stack([spans for _, spans in both])

    def check(self, *, steps, batch):
        """See `Objective.check`; a `loss_mask` is refused."""
        super().check(steps=steps, batch=batch)
        whole_text(type(self).__name__, batch)

    def room(self, length: int) -> tuple[int, int, int]:
        """The most tokens, the most inputs and the most targets that a row of `length` tokens can become."""
        noise, spans = self._tables(length)
        some = spans > 0
        sizes, mode = np.arange(length + 1), some * bool(self.modes())
        # Two special tokens at a document's ends are kept and make its body shorter, which never makes it grow more, but
        # may leave more of it to the inputs.
        body = (sizes - noise + spans + mode).max(0)
        inputs = np.stack([np.pad(body[: len(body) - k] + k, (k, 0)) for k in range(3)]).max(0)
        grows = sizes + (2 * spans + some + mode).max(0)
        return longer(length, most(grows)), most(inputs), most((noise + spans + some).max(0))

    def noise(self, batch: dict[str, Any], vocabulary: Vocabulary, *, key: Draws) -> Noise:
        """What is hidden in a batch."""
        found = documents(batch["segments"], batch["positions"])
        body = bodies(batch["tokens"], found, vocabulary)
        length = batch["tokens"].shape[1]
        draw = lambda name: jax.vmap(lambda k: jax.random.uniform(k, (length,)))(key(name))
        mixture = self.mixture()
        chosen = found.first(jnp.floor(draw("denoiser") * len(mixture)).astype(jnp.int32))
        noise, spans = (jnp.asarray(table, jnp.int32)[chosen, body.size] for table in self._tables(length))
        inside = jax.vmap(random_spans)(body.start, body.size, noise, spans, draw("spans"))
        slots = jnp.arange(length)
        at_end = (slots >= body.start + body.size - noise) & (slots < body.start + body.size)
        suffix = jnp.asarray([one.span is None for one in mixture])[chosen]
        named = [self.modes().index(one.mode) + vocabulary.size if self.modes() else -1 for one in mixture]
        mode = jnp.where(spans > 0, jnp.asarray(named, jnp.int32)[chosen], -1)
        ends = (slots == found.start + found.size - 1) & (spans > 0)
        return Noise(jnp.where(suffix, at_end, inside), ends, mode)

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        trunk, length = models.trunk, batch["tokens"].shape[1]
        vocabulary = trunk.vocabulary
        ids = extra(
            vocabulary,
            trunk.table.get_value().shape[0],
            modes=len(self.modes()),
            sentinels=int(self._tables(length)[1].max()),
            owner=type(self).__name__,
        )
        noise = self.noise(batch, vocabulary, key=key)
        write = self._beside if trunk.two_sided else self._behind
        hidden, wanted, weight = write(trunk, batch, noise, first_sentinel=ids.first, key=key)
        loss, accuracy = self.penalty(replace(trunk.scores(hidden), size=ids.end), wanted, weight)
        hidden = metric(noise.hidden.sum(), (batch["segments"] > 0).sum())
        return Loss({"denoising": loss, "accuracy": accuracy, "hidden": hidden})

    def _beside(self, trunk, batch, noise, *, first_sentinel, key):
        """The states that predict the targets of a decoder, the targets, and their weights."""
        vocabulary = trunk.vocabulary
        _, inputs, targets = (-(-most // 8) * 8 for most in self.room(batch["tokens"].shape[1]))
        read, written = apart(
            batch, noise, first_sentinel=first_sentinel, end=vocabulary.eos, pad=vocabulary.pad, inputs=inputs,
            targets=max(targets, 8),
        )  # fmt: skip
        hidden = taught(trunk, read, written, first=trunk.start, keys=key("dropout"))
        return hidden, written.tokens, (written.segments > 0).astype(jnp.float32)

    def _behind(self, trunk, batch, noise, *, first_sentinel, key):
        """The same of a trunk that reads inputs and targets as one text."""
        vocabulary = trunk.vocabulary
        width, _, places = self.room(batch["tokens"].shape[1])
        side, target = behind(
            batch, noise, first_sentinel=first_sentinel, end=vocabulary.eos, pad=vocabulary.pad, width=width
        )
        following = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
        slots = jnp.sort(jnp.where(following(target), jnp.arange(width), width), axis=1)[:, : max(places, 1)]
        used, at = slots < width, jnp.minimum(slots, width - 1)
        out = trunk(
            side.tokens,
            segments=side.segments,
            positions=side.positions,
            mask=Prefix((side.segments > 0) & ~target),
            keys=key("dropout"),
            at=at,
        )
        wanted = jnp.take_along_axis(following(side.tokens), at, axis=1)
        return out.hidden, wanted, used.astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(Denoising):
    """Hide spans of a document behind sentinels, and write sentinels and spans out.

    Of n tokens round(density n) are hidden, in round(density n / span) spans.
    loss = mean_t -log p(y_t | x, y_{<t}),  x = `a S1 c S2`, y = `S1 b S2 d e end`.

    Args:
      density: share of a document's tokens that are hidden.
      span: mean tokens of a span.
      shortest, penalty: as in `Denoising`.

    Source: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", Raffel et al., 2020; the
      rounding is that of its released code.
    Differs: each document of a packed row is corrupted on its own, and a special token at its beginning or end is kept;
      sentinels count upwards; a trunk alone reads inputs and targets as a prefix and the rest.
    """

    density: Annotated[float, Range(0, 1, open=True)] = 0.15
    span: Annotated[float, Range(1, 1 << 20)] = 3.0

    def mixture(self):
        """See `Denoising.mixture`: one."""
        return (Denoiser(density=self.density, span=self.span),)


MIXTURE = (
    Denoiser(density=0.15, span=3.0, mode="R"),
    Denoiser(density=0.15, span=8.0, mode="R"),
    Denoiser(density=0.25, span=None, mode="S"),
    Denoiser(density=0.5, span=3.0, mode="X"),
    Denoiser(density=0.5, span=8.0, mode="X"),
    Denoiser(density=0.15, span=64.0, mode="X"),
    Denoiser(density=0.5, span=64.0, mode="X"),
)


@dataclass(frozen=True, kw_only=True)
class UL2(Denoising):
    """Every document is corrupted by one of several denoisers, and its inputs begin with the denoiser's mode.

    loss as in `SpanCorruption`, x beginning with `R` (regular spans), `S` (the end is hidden) or `X` (much, or long).

    Args:
      denoisers: the mixture, each as likely as the others.
      shortest, penalty: as in `Denoising`.

    Source: "UL2: Unifying Language Learning Paradigms", Tay et al., 2022 (the seven denoisers).
    Differs: as in `SpanCorruption`; the end that is hidden is always a quarter, not one of that mean length.
    """

    denoisers: tuple[Denoiser, ...] = MIXTURE

    def mixture(self):
        """See `Denoising.mixture`."""
        return tuple(self.denoisers)

    def modes(self):
        """See `Denoising.modes`."""
        return ("R", "S", "X")
