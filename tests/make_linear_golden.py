"""Writes models/linear_golden.npz: what other implementations of gated linear attention give for inputs made from a seed.

pip download fla-core==0.6.0 --no-deps && unzip fla_core*.whl && python tests/make_linear_golden.py fla
with the extra `parity`
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "models" / "linear_golden.npz"
B, S, H, K, V = 2, 37, 2, 6, 5


def inputs(form: str) -> dict[str, np.ndarray]:
    """Queries, keys, values, rates of the delta rule, log decays and a state; keys as a mixer gives them."""
    draw = np.random.default_rng(7)
    q, k = draw.standard_normal((2, B, S, H, K))
    parts = {"q": q, "k": k, "v": draw.standard_normal((B, S, H, V))}
    if form == "delta":
        parts["q"], parts["k"] = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        parts["rate"] = draw.random((B, S, H))
    parts["log_decay"] = -2 * draw.random((B, S, H, K) if form == "gated" else (B, S, H))
    parts["state"] = draw.standard_normal((B, H, K, V))
    return {name: value.astype(np.float32) for name, value in parts.items()}


def pulls() -> tuple[np.ndarray, np.ndarray]:
    """What gradients are asked for: these sums of the outputs and of the last state."""
    draw = np.random.default_rng(8)
    return tuple(draw.standard_normal(s).astype(np.float32) for s in ((B, S, H, V), (B, H, K, V)))


def run(form, function):
    """Outputs, last state and every gradient; `function` scales the queries by 1 / sqrt(K)."""
    import torch

    given = {name: torch.tensor(value, requires_grad=True) for name, value in inputs(form).items()}
    gates = (given["log_decay"], given["rate"]) if form == "delta" else (given["log_decay"],)
    out, last = function(given["q"], given["k"], given["v"], *gates, given["state"])
    one, other = (torch.tensor(x) for x in pulls())
    ((out * one).sum() + (last * other).sum()).backward()
    found = {"out": out.detach(), "last": last.detach(), **{name: x.grad for name, x in given.items()}}
    return {name: value.numpy() for name, value in found.items()}


def main(fla: str):
    """Writes the file; `fla` is the unpacked package's folder, of which only naive.py is loaded."""
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    where = importlib.util.spec_from_file_location("naive", Path(fla) / "ops" / "gla" / "naive.py")
    naive = importlib.util.module_from_spec(where)
    where.loader.exec_module(naive)
    rule = lambda f: lambda q, k, v, g, b, s: f(q, k, v, g=g, beta=b, initial_state=s, output_final_state=True)
    found = {
        "gated": run("gated", lambda q, k, v, g, s: naive.naive_recurrent_gla(q, k, v, g, s, output_final_state=True)),
        "delta": run("delta", rule(qwen.torch_recurrent_gated_delta_rule)),
        "delta, chunks": run("delta", rule(qwen.torch_chunk_gated_delta_rule)),
    }
    np.savez_compressed(GOLDEN, **{f"{a}/{b}": value for a, named in found.items() for b, value in named.items()})


if __name__ == "__main__":
    main(sys.argv[1])
