"""Random inputs of the forms of linear attention."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

H, K, V = 2, 3, 4


def inputs(name, rows, length, *, strength=1.0, seed=0, dtype=np.float64, K=K):
    """Queries, keys of length 1, values, rates of the delta rule and log decays; then borders and a state.

    The form 'steady' is 'decayed' with one decay for all tokens.
    """
    draw = np.random.default_rng(seed)
    q, k = draw.standard_normal((2, rows, length, H, K))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    parts = {"q": q, "k": k, "v": draw.standard_normal((rows, length, H, V))}
    if name == "delta":
        parts["rate"] = 2 * draw.random((rows, length, H))
    shape = {"gated": (rows, length, H, K), "steady": (1, 1, H)}.get(name, (rows, length, H))
    parts["log_decay"] = -strength * draw.random(shape)
    resets = jnp.asarray(draw.random((rows, length)) < 0.1)
    state = jnp.asarray(draw.standard_normal((rows, H, K, V)), dtype)
    return {key: jnp.asarray(value, dtype) for key, value in parts.items()}, resets, state


def ordered(parts):
    """In the order of the forms' arguments; jax hands dicts back sorted."""
    return [parts[name] for name in ("q", "k", "v", "rate", "log_decay") if name in parts]


def piece(parts, where):
    """Some of the tokens."""
    return {name: x if x.shape[1] == 1 else x[:, where] for name, x in parts.items()}
