"""The trunk: an embedder, a stack of blocks, a final norm and a head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.attention import Attention
from models.block import Block, Context, Placement
from models.feed_forward import FeedForward
from models.heads import Scores, TiedHead
from models.initializers import normal
from models.masks import Bidirectional, Both, Mask, Tokens, lower
from models.norms import RMSNorm
from models.positions import gather, last_documents
from models.side import Sides, Tallies, apart
from models.stack import Remat, Stack
from models.variables import param
from models.vocabulary import Vocabulary, within
from partitioning import UserError, constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """What a call of a trunk returns.

    Args:
      hidden: states after the final norm.
      taps: what was asked for by name. `layers`: the states before the first and after every layer, `[L + 1, B, S, D]`.
        `attention`: the weights `[B, H, S, K]` by layer, of the layers that have some. `cross_attention`: the same of the
        attention to the memory. `transfer`: how far each token's linear attention is from the softmax attention that goes on
        in its place, `[B, S]` by layer, of the layers that are linearised.
      aux: side terms by block, raw sums.
      tallies: what was chosen, by block, raw sums.
      cache: the cache with this call's tokens in it, or None.
    """

    hidden: Float[Array, "B S D"]
    taps: dict[str, Any] = field(default_factory=dict)
    aux: Sides = field(default_factory=dict)
    tallies: Tallies = field(default_factory=dict)
    cache: dict[str, Any] | None = None


class Trunk(nnx.Module):
    """A text network; whether it is an encoder, a decoder or a prefix decoder is the mask's business.

    Args:
      vocabulary: of the tokens.
      width: D.
      layers: how many blocks.
      mixer, cross, feed_forward, norm, placement, dropout: what a block is made of, where `pattern` is None.
      pattern: block factories, repeated over the layers; each is called with the width and `rngs`.
      head_blocks: factories of the first blocks, before the pattern.
      positions: learned positions, a class called with the width; None where the mixers know positions.
      relative: what all layers share of the distances between tokens, a class called with the width; None for nothing.
      types: kinds of tokens that have a learned vector each (2 for BERT's pairs of texts); 0 for none.
      embeddings: whether the trunk has token embeddings and a head; one without is called with `embeddings` and scores
        against another trunk's table.
      embedding_norm, final_norm: whether there is a norm after the embeddings, and one after the last block.
      embedding_scale: whether embeddings are multiplied by sqrt(D).
      head: the scores' module, called with (width, vocabulary).
      vocab_multiple: the embedding table's rows are padded to a multiple of this, so that they divide over a mesh.
      dtype: of the computation; parameters and norms are float32.
      scan, unroll, remat: as in `Stack`.
      rngs: where the initial weights come from.
    """

    # Whether it writes beside what it reads.
    two_sided = False

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        width: int = 256,
        layers: int = 4,
        mixer: Callable[..., nnx.Module] | None = None,
        cross: Callable[..., nnx.Module] | None = None,
        feed_forward: Callable[..., nnx.Module] | None = None,
        norm: Callable[..., nnx.Module] | None = None,
        placement: Placement = "pre",
        dropout: float = 0.0,
        pattern: Sequence[Callable[..., Block]] | None = None,
        head_blocks: Sequence[Callable[..., Block]] = (),
        positions: Callable[..., nnx.Module] | None = None,
        relative: Callable[..., nnx.Module] | None = None,
        types: int = 0,
        embeddings: bool = True,
        embedding_norm: bool = False,
        final_norm: bool = True,
        embedding_scale: bool = False,
        head: Callable[..., nnx.Module] | None = None,
        vocab_multiple: int = 128,
        dtype: Literal["float32", "bfloat16", "float64"] = "float32",
        scan: bool = True,
        unroll: int = 1,
        remat: Remat = "none",
        rngs: nnx.Rngs,
    ):
        norm = RMSNorm if norm is None else norm
        self.vocabulary, self.width, self.dtype = vocabulary, width, dtype
        # Which family made it, with which sizes; other layouts go by that.
        self.family: Any = None
        self.embedding_scale = embedding_scale
        rows = vocabulary.padded(vocab_multiple)
        self.table = param(normal(rngs, (rows, width)), ("vocab", "embed")) if embeddings else None
        self.positions: Any = None if positions is None else positions(width, rngs=rngs)
        self.relative: Any = None if relative is None else relative(width, rngs=rngs)
        self.types = param(normal(rngs, (types, width)), (None, "embed")) if types else None
        self.embedding_norm = norm(width) if embedding_norm else None
        plain = partial(
            Block,
            mixer=Attention if mixer is None else mixer,
            cross=cross,
            feed_forward=FeedForward if feed_forward is None else feed_forward,
            norm=norm,
            placement=placement,
            dropout=dropout,
        )
        pattern = (plain,) if pattern is None else tuple(pattern)
        with within(vocabulary):
            self.stack = Stack(
                width,
                layers=layers,
                pattern=pattern,
                head=tuple(head_blocks),
                scan=scan,
                unroll=unroll,
                remat=remat,
                rngs=rngs,
            )
        self.final_norm = norm(width) if final_norm else None
        make_head: Any = TiedHead if head is None else head
        self.head: Any = make_head(width, vocabulary, multiple=vocab_multiple, rngs=rngs) if embeddings else None

    def embed(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        types: Int[Array, "B S"] | None = None,
        *,
        segments: Int[Array, "B S"] | None = None,
        table: Float[Array, "V D"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Token vectors with scale, learned positions and types (0 by default) and norm, where the trunk has them.

        Args:
          tokens, positions, types: as in a call.
          segments: as in a call; None where no token is padding.
          table: another trunk's token vectors, for a trunk that has none.

        Raises:
          UserError: there is no table, or the row is longer than the learned positions.
        """
        if table is None:
            if self.table is None:
                raise UserError("this trunk has no token embeddings: call it with `embeddings`")
            table = self.table.get_value()
        # Gathered: looked up where its parts are, vectors of all rows would be sent about, from slice to slice too.
        table = constrain(table.astype(self.dtype), "vocab", None)
        x = jnp.take(table, constrain(tokens, "batch", "length"), axis=0)
        if self.embedding_scale:
            x = x * jnp.sqrt(jnp.asarray(self.width, x.dtype))
        if self.positions is not None:
            if tokens.shape[1] > self.positions.longest:
                raise UserError(
                    f"rows of {tokens.shape[1]} tokens are longer than positions.longest = {self.positions.longest}"
                )
            x = x + self.positions(positions, x.dtype)
        if self.types is not None:
            x = x + jnp.take(
                self.types.get_value().astype(x.dtype), jnp.zeros_like(tokens) if types is None else types, axis=0
            )
        if self.embedding_norm is not None:
            x = self.embedding_norm(x, None if segments is None else segments > 0)
        return constrain(x, "batch", "length", "embed")

    def __call__(
        self,
        tokens: Int[Array, "B S"] | None = None,
        *,
        segments: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        types: Int[Array, "B S"] | None = None,
        mask: Mask | None = None,
        embeddings: Float[Array, "B S D"] | None = None,
        source: Float[Array, "B S D"] | None = None,
        memory: Float[Array, "B M D"] | None = None,
        memory_segments: Int[Array, "B M"] | None = None,
        bias: Float[Array, "#B #H S K"] | None = None,
        cache: dict[str, Any] | None = None,
        keys: jax.Array | None = None,
        routes: Int[Array, B] | None = None,
        at: Int[Array, "B K"] | None = None,
        taps: Sequence[Literal["layers", "attention", "cross_attention", "transfer"]] = (),
    ) -> Output:
        """Runs the trunk.

        Args:
          tokens: token ids; or give `embeddings`, what `embed` would have returned.
          segments: the document of each token, 0 for padding.
          positions: places within the document.
          types: kinds of the tokens, where the trunk knows any.
          mask: who may see whom; the segment rule is always added. Bidirectional by default.
          source: states that the mixers take keys and values from, in the same slots; the hidden states by default.
          memory, memory_segments: states of another text that blocks cross-attend to, and the document of each; a token
            sees those of its own. A cache that was made with a memory has both.
          bias: added to attention scores.
          cache: from `empty_cache` or an earlier call; these tokens come after the ones in it.
          keys: one dropout key a row; None for no dropout.
          routes: the domain of each row, for `DomainRouter`.
          at: slots whose states are wanted: `hidden` is `[B, K, D]`, and the last layer computes nothing else that it
            need not. None for all.
          taps: what else to return.

        Raises:
          UserError: both or neither of tokens and embeddings, both `at` and `taps`, a row that is too long, a memory
            where none is read or none where one is, or another trunk's cache.
        """
        if (tokens is None) == (embeddings is None):
            raise UserError("a trunk takes either tokens or embeddings")
        if at is not None and taps:
            raise UserError("taps have the states of all slots: ask for them without `at`")
        if tokens is not None:
            embeddings = self.embed(tokens, positions, types, segments=segments)
        assert embeddings is not None
        x = embeddings.astype(self.dtype)
        start = jnp.zeros((), jnp.int32) if cache is None else cache["length"]
        query = Tokens(start + jnp.arange(x.shape[1], dtype=jnp.int32), segments, positions)
        key, entries = query, None
        if cache is not None:
            rows, capacity = cache["segments"].shape
            entries = self.stack.checked_cache(cache["entries"], rows, capacity, self.dtype)
        if cache is not None and self.stack.keeps_tokens:
            write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
            key = Tokens(
                jnp.arange(cache["segments"].shape[1], dtype=jnp.int32),
                write(cache["segments"], segments),
                write(cache["positions"], positions),
            )
        asked = Bidirectional() if mask is None else mask

        def visible(own: Mask | None) -> tuple[Any, Mask]:
            both = asked if own is None else Both(asked, own)
            return constrain(lower(both, query, key), "batch", "length", None), both

        context = Context(
            visible=jnp.ones((1, 1, 1), bool), segments=segments, positions=positions, source=source, memory=memory,
            before=None if cache is None else cache["document"], bias=bias, cache_length=start, keys=keys, taps=tuple(taps),
            routes=routes, tokens=tokens, vocabulary=self.vocabulary.size,
        )  # fmt: skip
        context = context if self.relative is None else self.relative(context, query, key)
        remembered = None
        if cache is not None and "memory" in cache:
            remembered, memory_segments = cache["memory"]["entries"], cache["memory"]["segments"]
        self._check_memory(remembered is not None or memory is not None, memory_segments is not None)
        if memory_segments is not None:
            same = segments[:, :, None] == memory_segments[:, None, :]
            same = constrain(same & (memory_segments[:, None, :] > 0), "batch", "length", None)
            context = replace(context, memory_visible=same)
        first = x
        x, beside, entries, by_layer = self.stack(x, context, visible, entries, remembered=remembered, at=at)
        if self.final_norm is not None:
            x = self.final_norm(x, (segments if at is None else gather(segments, at)) > 0)
        new = None
        if cache is not None:
            new = {
                "length": start + segments.shape[1],
                "document": last_documents(segments, cache["document"])[:, -1],
                "segments": key.segments if self.stack.keeps_tokens else cache["segments"],
                "positions": key.positions if self.stack.keeps_tokens else cache["positions"],
                "entries": entries,
            } | {name: kept for name, kept in cache.items() if name == "memory"}
        tapped: dict[str, Any] = {}
        if "layers" in taps:
            tapped["layers"] = jnp.stack([first, *(by_layer[i]["layers"] for i in range(len(by_layer)))])
        for name in (name for name in taps if name != "layers"):
            tapped[name] = {i: found[name] for i, found in sorted(by_layer.items()) if name in found}
        sides, tallies = apart(beside)
        tallies = {name: replace(tally, layers=self.stack.indices(name)) for name, tally in tallies.items()}
        return Output(x, tapped, _averaged(sides), tallies, new)

    def scores(self, hidden: Float[Array, "*B D"]) -> Scores:
        """Scores of hidden states over the vocabulary, not multiplied out."""
        if self.table is None or self.head is None:
            raise UserError("this trunk has no token embeddings to score against: use those of the trunk that has")
        return self.head(hidden, self.table.get_value())

    def _check_memory(self, given: bool, segmented: bool) -> None:
        reads = any(b.cross is not None for b in (*self.stack.layers.values(), *self.stack.scanned.values()))
        if reads and not (given and segmented):
            raise UserError("this trunk attends to a memory: call it with `memory` and `memory_segments`")
        if not reads and (given or segmented):
            raise UserError("this trunk attends to no memory: build it with `cross`, or call it without `memory`")

    def empty_cache(
        self,
        rows: int,
        capacity: int,
        *,
        memory: Float[Array, "B M D"] | None = None,
        memory_segments: Int[Array, "B M"] | None = None,
    ) -> dict[str, Any]:
        """Room for `capacity` tokens of `rows` rows, and what the layers read of a memory, where there is one.

        Where all layers keep states of a fixed size, tokens need no room.
        """
        capacity = capacity if self.stack.keeps_tokens else 0
        known = {}
        if memory is not None:
            known = {"memory": {"entries": self.stack.remember(memory), "segments": memory_segments}}
        return known | {
            "length": jnp.zeros((), jnp.int32),
            "document": jnp.zeros((rows,), jnp.int32),
            "segments": jnp.zeros((rows, capacity), jnp.int32),
            "positions": jnp.zeros((rows, capacity), jnp.int32),
            "entries": self.stack.empty_cache(rows, capacity, self.dtype),
        }


def _averaged(sides: Sides) -> Sides:
    """Side terms of one name are averaged over the layers that have them."""
    layers: dict[str, int] = {}
    for name, side in sides.items():
        kind = name.rsplit("/", 1)[1]
        layers[kind] = layers.get(kind, 0) + (side.weight.shape[0] if side.weight.ndim else 1)
    return {n: replace(s, coefficient=s.coefficient / layers[n.rsplit("/", 1)[1]]) for n, s in sides.items()}
