"""From LayerNorm to RMSNorm without a difference: what LayerNorm takes away is taken out of the weights, once."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from models.attention import Attention
from models.block import Block
from models.feed_forward import FeedForward
from models.heads import Head, NormHead, TiedHead
from models.mixture.experts import Experts
from models.norms import LayerNorm, RMSNorm
from models.trunk import Trunk
from partitioning import UserError

# What each branch adds to the residual stream, features last.
ADDED: dict[type, tuple[str, ...]] = {
    Attention: ("out", "out_bias"),
    FeedForward: ("outer", "outer_bias"),
    Experts: ("outer",),
}


def fold_layer_norm(trunk: Trunk) -> Trunk:
    """A trunk of RMSNorms that computes what a trunk of LayerNorms in front of its branches computes.

    With C = I - 11^T / D:  LN(x) = RMSNorm(C x), so with x = sum_i y_i over embeddings and branches, every y_i becomes C y_i:
    a kernel W becomes W C, a bias b becomes C b. The norms keep their scales and biases.

    Args:
      trunk: with learned token embeddings; it is left as it is. Its head, where it is tied to them, gets a table of its own.

    Returns:
      A trunk whose states between the layers are C x, with the same final states and scores. It has no family, for its
      weights are no longer of that layout.

    Raises:
      UserError: something reads the residual stream but through a LayerNorm, or adds what is not a kernel's product.

    Source: "Pre-RMSNorm and Pre-CRMSNorm Transformers", Jiang et al., 2023.
    Differs: LayerNorm's bias stays with RMSNorm. With dropout on branches, training the two is not the same.
    """
    folded = nnx.clone(trunk)
    if folded.table is None or folded.embedding_norm is not None:
        raise _refused("embeddings of its own, without a norm behind them")
    folded.head = _untied(folded)
    folded.final_norm = _root_mean_square(folded.final_norm, "final norm")
    for table in (folded.table, folded.types, None if folded.positions is None else folded.positions.table):
        _centre(table)
    for block in (*folded.stack.layers.values(), *folded.stack.scanned.values()):
        _fold(block)
    folded.family = None
    return folded


def _fold(block: Block) -> None:
    if block.placement not in ("pre", "scaled"):
        raise _refused(f"norms in front of its branches (placement 'pre' or 'scaled', not '{block.placement}')")
    for name, part in list(vars(block).items()):
        if type(part) in ADDED:
            for added in ADDED[type(part)]:
                _centre(getattr(part, added))
        elif name in ("mixer_norm", "feed_forward_norm"):
            setattr(block, name, _root_mean_square(part, name))
        elif isinstance(part, nnx.Module):
            raise _refused(f"branches of Attention, FeedForward and Experts; {name} is {type(part).__name__}")


def _centre(values: nnx.Param | None) -> None:
    if values is not None:
        value = values.get_value()
        values.set_value(value - value.mean(-1, keepdims=True))


def _root_mean_square(norm: Any, place: str) -> RMSNorm:
    if type(norm) is not LayerNorm or norm.scale is None:
        kind = "one without" if type(norm) is LayerNorm else type(norm).__name__
        raise _refused(f"a LayerNorm with a scale as its {place}, not {kind}")
    new = RMSNorm(norm.scale.get_value().shape[-1], eps=norm.eps, bias=norm.bias is not None)
    new.scale, new.bias = norm.scale, norm.bias
    return new


def _untied(trunk: Trunk) -> Head:
    """A head with the embeddings as they were."""
    head, table = trunk.head, trunk.table
    if type(head) in (Head, NormHead):
        return head
    if type(head) is not TiedHead or head.scale != 1 or any(True for _ in nnx.to_flat_state(nnx.state(head))):
        raise _refused("a Head, or a TiedHead without weights and a scale of its own")
    assert table is not None
    own = nnx.eval_shape(lambda: Head(trunk.width, trunk.vocabulary, multiple=table.shape[0], rngs=nnx.Rngs(0)))
    own.table.set_value(jnp.array(table.get_value()))
    return own


def _refused(what: str) -> UserError:
    return UserError(f"fold_layer_norm takes a trunk with {what}")
