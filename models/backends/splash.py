"""Splash attention, for TPUs: blocks that no query sees are never computed, and no matrix is in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as over_slots
from jaxtyping import Array, Bool, Float, Int

from models.backends.view import View, refuse
from models.masks import Bidirectional, Both, Causal, Either, Mask, Window
from models.positions import gather
from partitioning import on_each_device, platform, ways
from partitioning.spoiled import spoiled

# Lanes of a TPU's vector unit: rows are padded to a multiple, and blocks of queries and keys are of one.
LANES, BLOCK = 128, 512


def splash(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    view: View,
    bias: Float[Array, "#B #H Q S"] | None,
) -> Float[Array, "B Q H K"]:
    """The product on TPUs, each with its rows and heads; the mask goes in as its structure, the documents as segments.

    Windows count slots of the row here, which is the same as places of the document where documents are packed in one
    piece; a row that is not comes out as NaN.

    Raises:
      UserError: another platform; a bias, a cache, other keys than the row's own; a mask that is not made of
        `Bidirectional`, `Causal` and `Window`; rows that are cut along their length into parts of no whole lanes.
    """
    if platform() != "tpu":
        refuse("splash", f"on the platform '{platform()}', it needs a TPU")
    return product(q, k, v, view, bias)


def product(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    view: View,
    bias: Float[Array, "#B #H Q S"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B Q H K"]:
    """The same; `interpret` runs the kernels' own code on any platform, slowly."""
    if bias is not None:
        refuse("splash", "a bias on the scores")
    segments, positions = view.segments, view.positions
    if view.keys != "row" or segments is None or positions is None:
        refuse("splash", f"attention to {'a cache' if view.keys == 'cache' else 'another network'}")
    length = k.shape[1]
    if (parts := ways("length")) > 1:
        block = next((size for size in (BLOCK, BLOCK // 2, LANES) if length // parts % size == 0), None)
        if block is None:
            refuse("splash", f"rows of {length} tokens cut into {parts} parts, a part is a multiple of {LANES}")
    else:
        block = min(BLOCK, -(-length // LANES) * LANES)
    padded = -(-length // block) * block
    mask = slots(view.mask, padded)
    cuts = parts
    if parts > 1 and _shows_all(mask):
        # jax cuts no mask without a border; each part's is the same.
        mask, cuts = over_slots.FullMask((padded // parts, padded)), 1
    if view.at is not None:
        # The mask goes by slots: queries stand at theirs again.
        rows = jnp.arange(q.shape[0])[:, None]
        q = jnp.zeros((q.shape[0], length, *q.shape[2:]), q.dtype).at[rows, view.at].set(q)

    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    # One mask for all heads: each device has some of them.
    kernel = kernels.make_splash_mha(
        over_slots.MultiHeadMask([mask] * q.shape[2]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=cuts,
        interpret=interpret,
    )
    # Which blocks a query sees: cut as the queries are, in the kernels' own tables.
    tables, tree = jax.tree_util.tree_flatten_with_path(kernel)

    def local(q, k, v, asking, asked, *tables):
        pad = lambda x: jnp.pad(x, [(0, padded - length if i == 1 else 0) for i in range(x.ndim)]) if parts == 1 else x
        heads_first = lambda x: pad(x).transpose(0, 2, 1, 3)
        kernel = jax.tree_util.tree_unflatten(tree, tables)
        mixed = jax.vmap(kernel)(
            heads_first(q * q.shape[-1] ** -0.5),
            heads_first(k),
            heads_first(v),
            kernels.SegmentIds(pad(asking), pad(asked)),
        )
        return mixed.transpose(0, 2, 1, 3)[:, : q.shape[1]]

    # Whole keys and whole heads, whatever else the rules cut: a part of either is another product.
    queries, keys = ("batch", "length", "heads", None), ("batch", None, "heads", None)
    arrays = [(q, queries), (k, keys), (v, keys), (segments, queries[:2]), (segments, keys[:2])]
    mixed = on_each_device(local, [*arrays, *((x, _cut(path[-1].name, x.ndim, cuts)) for path, x in tables)])
    # Padding is a segment of its own to the kernel, and sees itself.
    mixed = jnp.where((segments > 0)[..., None, None], mixed, 0)
    if counts_places(view.mask):
        mixed = spoiled(mixed, ~whole(segments, positions)[:, None, None, None])
    return mixed if view.at is None else gather(mixed, view.at)


def _shows_all(mask: over_slots.Mask) -> bool:
    """Whether every slot sees every slot: the farthest both ways, for what is seen of `slots` are distances in one piece."""
    first, last = slice(0, 1), slice(mask.shape[0] - 1, mask.shape[0])
    return bool(mask[first, last].all() and mask[last, first].all())


def _cut(name: str, dimensions: int, cuts: int) -> tuple[str | None, ...]:
    """The dimensions of one of the kernels' tables: heads, blocks of queries, blocks of keys; or the queries' slots."""
    if cuts == 1 or name == "partial_mask_blocks":
        return (None,) * dimensions
    return ("length",) if name == "q_sequence" else (None, "length", None)


def slots(mask: Mask, length: int) -> over_slots.Mask:
    """A mask over the slots of a row; documents are not its business.

    Raises:
      UserError: the mask depends on more than the distance of two slots.
    """
    shape = (length, length)
    match mask:
        case Bidirectional():
            return over_slots.FullMask(shape)
        case Causal():
            return over_slots.CausalMask(shape)
        case Window():
            return over_slots.LocalMask(shape, (mask.before, mask.after), 0)
        case Both():
            return over_slots.LogicalAnd(slots(mask.left, length), slots(mask.right, length))
        case Either():
            return over_slots.LogicalOr(slots(mask.left, length), slots(mask.right, length))
    refuse(
        "splash", f"the mask {type(mask).__name__}, it takes Bidirectional, Causal and Window, and what they combine to"
    )


def counts_places(mask: Mask) -> bool:
    """Whether a mask goes by places in the document."""
    if isinstance(mask, Both | Either):
        return counts_places(mask.left) or counts_places(mask.right)
    return isinstance(mask, Window)


def whole(segments: Int[Array, "B S"], positions: Int[Array, "B S"]) -> Bool[Array, B]:
    """Whether each document stands in one piece, place by place: then slots are as far apart as places are.

    Documents are numbered from left to right: one whose number is behind that of another has come back.
    """
    inside = segments[:, 1:] > 0
    same = segments[:, 1:] == segments[:, :-1]
    stepped = positions[:, 1:] == positions[:, :-1] + 1
    new = segments[:, 1:] > jax.lax.cummax(segments, axis=1)[:, :-1]
    return (~inside | jnp.where(same, stepped, new)).all(-1)
