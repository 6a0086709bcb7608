"""A stack repeats a pattern of blocks, scanned over the repetitions so that compile time does not grow with depth.

Layers have an index from the bottom. Those that fit whole repetitions of the pattern are stored stacked, as
`scanned/<k>/...` with a leading `layers` dimension: entry r of `scanned/<k>` is layer k + r P, where P is the number of
such <k>. The others are stored as `layers/<i>/...`. Names outside a run (checkpoints, exports) are always by index.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.block import Block, Context, Taps
from models.masks import Mask
from models.mixture.travelling import ARRIVED
from models.positions import gather
from models.side import Beside
from partitioning import UserError

Remat = Literal["none", "full", "arrived", "dots", "dots_no_batch"]
POLICIES: dict[str, Any] = {
    "full": None,
    "arrived": jax.checkpoint_policies.save_only_these_names(ARRIVED),
    "dots": jax.checkpoint_policies.checkpoint_dots,
    "dots_no_batch": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}
Make = Callable[..., Block]
Module = TypeVar("Module", bound=nnx.Module)


class Stack(nnx.Module):
    """`layers` blocks: `head`, then the pattern over and over, the last time perhaps in part.

    Args:
      width: D.
      layers: how many blocks there are in all.
      pattern: block factories, repeated.
      head: factories of the first blocks, before the pattern starts.
      scan: whether whole repetitions are scanned; one program for each layer otherwise.
      unroll: repetitions in one trip of the scan. More is faster on CPU and compiles longer.
      remat: what the backward pass recomputes: 'none', 'full' (everything), 'arrived' (all but tokens that came to
        a device's experts, which would travel again), 'dots' (all but matrix products), 'dots_no_batch' (all but products
        with weights).
      rngs: where the initial weights come from; layer i's do not depend on the grouping.
    """

    def __init__(
        self,
        width: int,
        *,
        layers: int,
        pattern: Sequence[Make],
        head: Sequence[Make] = (),
        scan: bool = True,
        unroll: int = 1,
        remat: Remat = "none",
        rngs: nnx.Rngs,
    ):
        if layers < len(head):
            raise UserError(f"{layers} layers are fewer than the {len(head)} blocks of the stack's head")
        self.size, self.unroll, self.remat = layers, unroll, remat
        first, period = len(head), len(pattern)
        repetitions = (layers - first) // period if scan else 0
        repetitions = repetitions if repetitions > 1 else 0
        self.first, self.period, self.repetitions = first, period, repetitions
        base = rngs.params()
        factory = lambda i: head[i] if i < first else pattern[(i - first) % period]
        build = lambda i, key: factory(i)(width, rngs=nnx.Rngs(key))
        scanned: dict[str, Block] = {}
        for k in range(first, first + period) if repetitions else ():
            indices = jnp.arange(k, k + repetitions * period, period)
            scanned[str(k)] = stacked(partial(build, k), jax.vmap(lambda i: jax.random.fold_in(base, i))(indices))
        rest = [*range(first), *range(first + repetitions * period, layers)]
        self.scanned = nnx.Dict(scanned)
        self.layers = nnx.Dict({str(i): build(i, jax.random.fold_in(base, i)) for i in rest})

    def __call__(
        self,
        x: Float[Array, "B S D"],
        context: Context,
        visible: Callable[[Mask | None], tuple[Bool[Array, "B Q K"], Mask]],
        cache: Mapping[str, Any] | None,
        *,
        remembered: Mapping[str, Any] | None = None,
        at: Int[Array, "B K"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Beside, dict[str, Any] | None, dict[int, Taps]]:
        """Runs the layers.

        Args:
          x: hidden states.
          context: shared by all blocks; mask, cache and dropout keys are set for each.
          visible: lowers a block's own mask together with the call's, and returns what it lowered too.
          cache: entries by block, as `empty_cache` makes them, or None.
          remembered: keys and values of the memory by block, as `remember` makes them, or None.
          at: slots of the last layer's states to compute, and to return alone; None for all.

        Returns:
          (states, side terms and tallies by block, new cache or None, what `context.taps` asks for by layer).
        """
        lowered = {m: visible(m) for m in {b.mask for b in (*self.scanned.values(), *self.layers.values())}}
        sides: Beside = {}
        entries: dict[str, Any] = {}
        taps: dict[int, Taps] = {}

        def apply(block, x, index, stored, at=None):
            keys = (
                context.keys if context.keys is None else jax.vmap(lambda k: jax.random.fold_in(k, index))(context.keys)
            )
            seen, mask = lowered[block.mask]
            there = {"cache": stored[0], "remembered": stored[1], "keys": keys, "at": at, "layer": jnp.asarray(index)}
            return block(x, replace(context, visible=seen, mask=mask, causal=mask.causal, **there))

        def single(i, x):
            name = f"layers/{i}"
            wanted = at if i == self.size - 1 else None
            run = self._rematerialised(lambda x, stored: apply(self.layers[str(i)], x, i, stored, wanted))
            stored = [None if d is None else d[name] for d in (cache, remembered)]
            x, side, entries[name], taps[i] = run(x, stored)
            sides.update({f"{name}/{key}": value for key, value in side.items()})
            return x

        for i in range(self.first):
            x = single(i, x)
        if self.repetitions:
            graphs, states = nnx.split(self.scanned)
            stacked = [None if d is None else {k: d[f"scanned/{k}"] for k in self.scanned} for d in (cache, remembered)]

            def body(x, slices, at=None):
                state, stored, start = slices
                blocks = nnx.merge(graphs, state)
                outs, new, tapped = {}, {}, {}
                for k, block in blocks.items():
                    wanted = at if int(k) == self.first + self.period - 1 else None
                    stored_k = [None if d is None else d[k] for d in stored]
                    x, outs[k], new[k], tapped[k] = apply(block, x, start + int(k), stored_k, wanted)
                return x, (outs, new, tapped)

            starts = jnp.arange(self.repetitions) * self.period
            slices = (states, stacked, starts)
            # With `at` the last layer is another program: where it is one of these, its repetition follows the scan.
            alone = at is not None and self.first + self.repetitions * self.period == self.size
            count = self.repetitions - alone
            x, (outs, new, tapped) = jax.lax.scan(
                self._rematerialised(body, scan=True),
                x,
                jax.tree.map(lambda s: s[:count], slices) if alone else slices,
                unroll=min(self.unroll, count),
            )
            if alone:
                x, last = self._rematerialised(partial(body, at=at))(x, jax.tree.map(lambda s: s[count], slices))
                outs, new, tapped = jax.tree.map(
                    lambda some, one: jnp.concatenate([some, one[None]]), (outs, new, tapped), last
                )
            for k in outs:
                sides.update({f"scanned/{k}/{key}": value for key, value in outs[k].items()})
                entries[f"scanned/{k}"] = new[k]
                for r in range(self.repetitions):
                    taps[int(k) + r * self.period] = {name: value[r] for name, value in tapped[k].items()}
        for i in range(self.first + self.repetitions * self.period, self.size):
            x = single(i, x)
        if at is not None and not self.size:
            x = gather(x, at)
        return x, sides, None if cache is None else entries, taps

    def _rematerialised(self, body: Callable[..., Any], *, scan: bool = False) -> Callable[..., Any]:
        if self.remat == "none":
            return body
        return jax.checkpoint(body, policy=POLICIES[self.remat], prevent_cse=not scan)

    def empty_cache(self, rows: int, capacity: int, dtype: Any) -> dict[str, Any]:
        """Cache entries for `capacity` tokens, by block; stacked ones have a leading `layers` dimension."""
        entries = {f"layers/{i}": b.mixer.empty_cache(rows, capacity, dtype) for i, b in self.layers.items()}
        for k, block in self.scanned.items():
            one = block.mixer.empty_cache(rows, capacity, dtype)
            entries[f"scanned/{k}"] = jax.tree.map(lambda x: jnp.zeros((self.repetitions, *x.shape), x.dtype), one)
        return entries

    def indices(self, name: str) -> tuple[int, ...]:
        """The layers that what a block returned is of, `scanned/<k>/...` or `layers/<i>/...`, in the order of its entries."""
        kind, number = name.split("/")[:2]
        count = self.repetitions if kind == "scanned" else 1
        return tuple(int(number) + r * self.period for r in range(count))

    @property
    def keeps_tokens(self) -> bool:
        """Whether some layer's cache entry grows with the tokens it has room for."""
        sizes = [jax.eval_shape(partial(self.empty_cache, 1, capacity, jnp.float32)) for capacity in (1, 2)]
        return sizes[0] != sizes[1]

    def checked_cache(self, entries: dict[str, Any], rows: int, capacity: int, dtype: Any) -> dict[str, Any]:
        """The entries, if they are a cache of this stack.

        Raises:
          UserError: entries for other layers, or of another shape.
        """
        own = jax.eval_shape(lambda: self.empty_cache(rows, capacity, dtype))
        if own.keys() != entries.keys():
            raise UserError(
                f"the cache has entries for {', '.join(entries)}, this trunk for {', '.join(own)}: take it from its "
                f"`empty_cache`"
            )
        for name, wanted in own.items():
            shapes = [
                {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
                for leaves in map(jax.tree_util.tree_leaves_with_path, (entries[name], wanted))
            ]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"the cache of {name} has shapes {shapes[0]}, expected {shapes[1]}: take it from `empty_cache`"
                )
        return entries

    def remember(self, memory: Float[Array, "B M D"]) -> dict[str, Any]:
        """A memory's keys and values by block, of those that attend to one; stacked as in `empty_cache`."""
        entries = {f"layers/{i}": _remembered(block, memory) for i, block in self.layers.items()}
        for k, block in self.scanned.items():
            graph, state = nnx.split(block)
            entries[f"scanned/{k}"] = jax.vmap(lambda state, g=graph: _remembered(nnx.merge(g, state), memory))(state)
        return entries


def _remembered(block: Block, memory: Float[Array, "B M D"]) -> Any:
    return None if block.cross is None else block.cross.remember(memory)


def stacked(make: Callable[[jax.Array], Module], keys: jax.Array) -> Module:
    """One module whose arrays have a leading dimension, entry r initialised from `keys[r]`."""
    values = jax.vmap(lambda key: nnx.to_pure_dict(nnx.split(make(key))[1]))(keys)
    graph, state = nnx.split(nnx.eval_shape(lambda: make(keys[0])))
    nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graph, state)


_SCANNED = re.compile(r"(?P<prefix>.*/)?scanned/(?P<k>\d+)/(?P<rest>.*)")


def layer_names(shapes: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The names by index of every leaf: `scanned/<k>/w` of shape [R, ...] has R names `layers/<i>/w`, others their own.

    Args:
      shapes: all leaves of a model (arrays or abstract ones), by name.
    """
    matches = {name: _SCANNED.fullmatch(name) for name in shapes}
    patterns: dict[str, set[str]] = {}
    for match in filter(None, matches.values()):
        patterns.setdefault(match["prefix"] or "", set()).add(match["k"])

    def names(name: str) -> tuple[str, ...]:
        match = matches[name]
        if match is None:
            return (name,)
        prefix = match["prefix"] or ""
        period = len(patterns[prefix])
        layers = (int(match["k"]) + r * period for r in range(shapes[name].shape[0]))
        return tuple(f"{prefix}layers/{i}/{match['rest']}" for i in layers)

    return {name: names(name) for name in shapes}


def unstack(
    flat: Mapping[str, Any],
    names: Mapping[str, tuple[str, ...]] | None = None,
    take: Callable[[Any, int], Any] = lambda x, r: x[r],
) -> dict[str, Any]:
    """Names every layer by its index.

    Args:
      flat: arrays, or trees of arrays with the layer first, by leaf name.
      names: from `layer_names`; of `flat` itself by default.
      take: entry r of a leaf along its first dimension.
    """
    names = layer_names(flat) if names is None else names
    out: dict[str, Any] = {}
    for name, value in flat.items():
        if names[name] == (name,):
            out[name] = value
        else:
            for r, layer in enumerate(names[name]):
                out[layer] = jax.tree.map(lambda x, r=r: take(x, r), value)
    return out


def restack(flat: Mapping[str, Any], names: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The inverse of `unstack`: the leaves that `names` lists, each stacked from its layers.

    Raises:
      KeyError: a layer that is not in `flat`.
    """
    join = lambda *layers: jnp.stack(layers)
    return {
        name: flat[name] if layers == (name,) else jax.tree.map(join, *(flat[layer] for layer in layers))
        for name, layers in names.items()
    }
