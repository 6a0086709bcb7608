"""Cross-entropy over a large vocabulary: compiled temporaries and time of loss and gradients, beside the naive form.

    python -m benchmarks cross_entropy

Hidden states of width 256 and a vocabulary of 65,536, float32. Naive is the loss as one writes it: all logits, then
`logsumexp`; its temporaries are those of its forward and backward pass in one program, compiled and not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import results
from benchmarks.harness import Contestant, alternate

VOCABULARY, WIDTH, LENGTH = 1 << 16, 256, 512
MOST = 1 / 25


def _program(chunked: bool, tokens: int) -> Any:
    """The compiled loss and gradients for `tokens` tokens."""
    import jax
    import jax.numpy as jnp

    from models.heads import Scores
    from objectives.cross_entropy import cross_entropy

    def ours(hidden: Any, table: Any, targets: Any) -> Any:
        return cross_entropy(Scores(hidden, table, None, VOCABULARY), targets, jnp.ones(targets.shape)).total

    def naive(hidden: Any, table: Any, targets: Any) -> Any:
        logits = jnp.einsum("bkd,vd->bkv", hidden, table)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - picked).sum()

    loss = jax.value_and_grad(ours if chunked else naive, argnums=(0, 1))
    rows = tokens // LENGTH
    shapes = ((rows, LENGTH, WIDTH), jnp.float32), ((VOCABULARY, WIDTH), jnp.float32), ((rows, LENGTH), jnp.int32)
    return jax.jit(loss).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()


def side(chunked: bool, tokens: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: loss and gradients once."""
    import jax
    import numpy as np

    program, draw = _program(chunked, tokens), np.random.default_rng(0)
    rows = tokens // LENGTH
    normal = lambda *shape: jax.device_put(draw.standard_normal(shape, dtype=np.float32) / 16)
    hidden, table = normal(rows, LENGTH, WIDTH), normal(VOCABULARY, WIDTH)
    targets = jax.device_put(draw.integers(0, VOCABULARY, (rows, LENGTH), dtype=np.int32))
    return lambda: jax.block_until_ready(program(hidden, table, targets)) and None, {}


def temporary(chunked: bool, tokens: int) -> int:
    """Bytes of compiled temporaries."""
    return _program(chunked, tokens).memory_analysis().temp_size_in_bytes


def main() -> None:
    """Measures and writes the section."""
    few, many = 4096, 16384
    memory = {chunked: temporary(chunked, many) for chunked in (True, False)}
    contestants = [
        Contestant("ours", __name__, "side", chunked=True, tokens=few),
        Contestant("naive", __name__, "side", chunked=False, tokens=few),
    ]
    found = alternate(contestants, wanted=5, times=1)
    low, high = found.ratios("ours", "naive")
    rows = [
        (name, f"{memory[chunked] / 2**20:,.0f} MiB", f"{found.seconds(name):.2f} s")
        for name, chunked in (("ours", True), ("naive", False))
    ]
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            results.table(("loss and gradients", f"temporaries, {many:,} tokens", f"time, {few:,} tokens"), rows),
            "",
            f"Temporaries: 1/{memory[False] / memory[True]:.0f} of the naive form's (target: at most 1/{1 / MOST:.0f}). "
            f"Time: {found.ratio('ours', 'naive'):.2f} of the naive form's ({low:.2f} to {high:.2f}; target: at most 1).",
            "",
            f"{found.note()}.",
        ]
    )
    results.write("cross_entropy", "Cross-entropy over a large vocabulary", body)
