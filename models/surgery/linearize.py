"""From a trained softmax decoder to one with linear attention."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from models.attention import Attention
from models.block import Block
from models.linear_attention.linearized import LinearizedAttention
from models.stack import stacked
from models.trunk import Trunk
from partitioning import UserError


def linearize(trunk: Trunk, *, rngs: nnx.Rngs, **options: Any) -> Trunk:
    """A copy whose softmax attention is `LinearizedAttention` with the same weights; the maps begin at random.

    In a config the same is `models.llama.attention = @models.LinearizedAttention` with `training.Run.init_from` and
    `reinitialise`: see configs/lolcats_transfer.gin.

    Args:
      trunk: a decoder; it is left as it is.
      rngs: where the new weights come from.
      options: `window`, `features`, `rank` and `alpha` of `LinearizedAttention`.

    Raises:
      UserError: no layer has softmax attention.

    Source: "LoLCATs: On Low-Rank Linearizing of Large Language Models", Zhang et al., 2024.
    Differs: nothing known.
    """
    made = nnx.clone(trunk)
    blocks: list[tuple[Block, int | None]] = [(block, None) for block in made.stack.layers.values()]
    blocks += [(block, made.stack.repetitions) for block in made.stack.scanned.values()]
    changed = [
        block for block, times in blocks if type(block.mixer) is Attention and _swap(block, times, rngs, options)
    ]
    if not changed:
        raise UserError("no layer of this trunk has softmax attention: there is nothing to linearise")
    return made


def _swap(block: Block, times: int | None, rngs: nnx.Rngs, options: dict[str, Any]) -> bool:
    old, width = block.mixer, block.mixer.query.get_value().shape[-3]
    sizes = {"heads": old.heads, "kv_heads": old.kv_heads, "head_width": old.head_width, "theta": old.theta}
    make = lambda key: LinearizedAttention(width, rngs=nnx.Rngs(key), **sizes, **options)
    key = rngs.params()
    new: Any = make(key) if times is None else stacked(make, jax.random.split(key, times))
    # All that the two have in common, weights and constants, is the old one's.
    for name, value in vars(old).items():
        if not name.startswith("_"):
            setattr(new, name, value)
    block.mixer = new
    return True
