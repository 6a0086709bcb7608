"""How much each head forgets from token to token: the published rules, by name. They do not agree with each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from partitioning import UserError

Rule = Literal["paper", "fla", "official", "minimax", "retnet"]


def alibi_slopes(heads: int) -> Sequence[float]:
    """2^(-8 h / H) for h = 1 .. H; where H is no power of 2, those of the power below it, then every other one of twice it.

    Source: "Train Short, Test Long", Press et al., 2021.
    Differs: nothing known.
    """
    below = 1 << (heads.bit_length() - 1)
    of = lambda n: [2 ** (-8 * (h + 1) / n) for h in range(n)]
    return [*of(below), *of(2 * below)[::2]][:heads]


def _paper(heads: int, layer: Any, layers: int) -> Any:
    return 8 * np.arange(1, heads + 1) / heads * (1 - layer / layers)


def _fla(heads: int, layer: Any, layers: int) -> Any:
    return 8 * np.arange(heads) / heads * (1 - layer / layers)


def _official(heads: int, layer: Any, layers: int) -> Any:
    if layers < 2:
        raise UserError("decay rule 'official' divides by the layers before the last: with 1 layer use 'minimax'")
    return np.asarray(alibi_slopes(heads)) * (1 - layer / (layers - 1) + 1e-5)


def _minimax(heads: int, layer: Any, layers: int) -> Any:
    return 2 ** (-8 * np.arange(1, heads + 1) / heads) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)


def _retnet(heads: int, layer: Any, layers: int) -> Any:
    return np.asarray([-math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)])


RULES: dict[str, Callable[[int, Any, int], Any]] = {
    "paper": _paper,
    "fla": _fla,
    "official": _official,
    "minimax": _minimax,
    "retnet": _retnet,
}


def log_decays(rule: Rule, *, heads: int, layer: Any, layers: int, dtype: Any = jnp.float32) -> Float[Array, H]:
    """The logarithm of each head's decay in one layer, at most 0; h counts heads and l layers, both from 0.

    paper:    -(8 (h + 1) / H) (1 - l / L).
    fla:      -(8 h / H) (1 - l / L): head 0 forgets nothing.
    official: -s_h (1 - l / (L - 1) + 1e-5), s ALiBi's slopes.
    minimax:  -2^(-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5).
    retnet:   log(1 - 2^(-5 - h)), the same in every layer.

    Args:
      rule: which of these.
      heads: H.
      layer: l, a number or an array.
      layers: L.
      dtype: of the result.

    Raises:
      UserError: an unknown rule, or one layer where the rule divides by L - 1.

    Source: paper: "Scaling TransNormer to 175 Billion Parameters", Qin et al., 2023, equation 10, where heads are taken to
      count from 1; fla: flash-linear-attention 0.6; official: the released code of Lightning Attention-2 and TransNormerLLM;
      minimax: `transformers` 5; retnet: "Retentive Network", Sun et al., 2023.
    Differs: nothing known.
    """
    if rule not in RULES:
        raise UserError(f"decay rule {rule!r}: expected one of {', '.join(get_args(Rule))}")
    return -jnp.broadcast_to(jnp.asarray(RULES[rule](heads, layer, layers), dtype), (heads,))
