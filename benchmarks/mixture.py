"""A layer of experts: by blocks beside `ragged_dot`, buckets of a capacity and a dense layer, and what its parts cost.

    python -m benchmarks mixture

Forward and backward of one layer in float32, its router aside: the choices are given. 'blocks' drops nothing; 'capacity' gives
each expert 1.25 times an even share and drops the rest; 'dense' is a feed-forward layer of as many FLOPs as the choices have.
Balanced choices are random ones; in skewed ones the likeliest expert gets several times the tokens of the median one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import mixture_step, results
from benchmarks.harness import Contestant, alternate

SMALL = {"tokens": 1024, "width": 256, "experts": 64, "top_k": 8, "hidden": 128}
LARGE = {"tokens": 8192, "width": 512, "experts": 16, "top_k": 2, "hidden": 1024}
SKEW = {"balanced": 0.0, "skewed": 3.0}


def inputs(tokens: int, width: int, experts: int, top_k: int, hidden: int, skew: float) -> tuple[Any, ...]:
    """States, weights, choices, and the experts' matrices."""
    import jax.numpy as jnp
    import numpy as np

    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.standard_normal(shape, dtype=np.float32)
    logits = normal(tokens, experts) + np.float32(skew) * np.linspace(0, 1, experts, dtype=np.float32)
    chosen = np.argsort(-logits, axis=-1)[:, :top_k].astype(np.int32)
    weights = np.exp(np.take_along_axis(logits, chosen, -1))
    matrices = (0.05 * normal(experts, *shape) for shape in ((width, hidden), (width, hidden), (hidden, width)))
    return tuple(map(jnp.asarray, (normal(tokens, width), weights / weights.sum(-1, keepdims=True), chosen, *matrices)))


def side(how: str, skew: float, **sizes: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: one forward and backward pass, or a part of it."""
    import jax
    import jax.numpy as jnp

    from models.mixture.blocks import blocks, plan
    from models.mixture.dispatch import capacity, ragged

    x, weights, chosen, *matrices = inputs(**sizes, skew=skew)
    everyone = jnp.ones((1, len(x)), bool)

    def dense(x: Any, weights: Any, inner: Any, gate: Any, outer: Any) -> Any:
        del weights
        return (jax.nn.silu(x @ inner) * (x @ gate)) @ outer

    def bucketed(x: Any, weights: Any, *matrices: Any) -> Any:
        return capacity(1.25, "silu", x[None], weights[None], chosen[None], everyone, matrices)[0]

    ways: dict[str, Callable[..., Any]] = {
        "blocks": lambda x, weights, *matrices: blocks("silu", x, weights, chosen, *matrices),
        "ragged_dot": lambda x, weights, *matrices: ragged("silu", x, weights, chosen, *matrices),
        "capacity": bucketed,
        "dense": dense,
    }
    if how == "dense":
        # Side by side, as many experts as a token has are one layer.
        joined = sizes["top_k"]
        matrices = [jnp.concatenate(list(m[:joined]), axis=axis) for m, axis in zip(matrices, (1, 1, 0), strict=True)]
    given = (x, weights, *matrices)
    run = jax.value_and_grad(lambda *args: jnp.sin(ways[how](*args)).sum(), tuple(range(5))) if how in ways else None
    if how == "sort":
        run, given = (lambda chosen: plan(chosen, sizes["experts"])), (chosen,)
    if how == "combine":
        # What gathers k results of each token, weighs and adds them; the backward pass does as much again, unweighted.
        laid = plan(chosen, sizes["experts"])
        results_ = jnp.ones((laid.choice.size, x.shape[1]), x.dtype)
        run = lambda y, weights: (y[laid.place].reshape(*chosen.shape, -1) * weights[..., None]).sum(1)
        given = (results_, weights)
    program = jax.jit(run).lower(*given).compile()
    facts = {"temporary": program.memory_analysis().temp_size_in_bytes}

    def turn() -> None:
        jax.block_until_ready(program(*given))

    return turn, facts


def main() -> None:
    """Measures and writes the section."""
    rows, parts, notes = [], [], []
    for title, sizes in (("small", SMALL), ("large", LARGE)):
        for routing, skew in SKEW.items():
            ways = ["blocks", "capacity", "dense"] + ["ragged_dot"] * (title == "small")
            ways += ["sort", "combine"] * (routing == "balanced")
            contestants = [Contestant(how, __name__, "side", how=how, skew=skew, **sizes) for how in ways]
            found = alternate(contestants, wanted=5, times=1 if "ragged_dot" in ways else 2, patience=60)
            notes.append(f"- {title}, {routing}: {found.note()}.")
            for one in contestants:
                milliseconds = f"{1e3 * found.seconds(one.name):.1f}"
                if one.name in ("sort", "combine"):
                    share = found.ratio(one.name, "blocks")
                    parts.append((title, one.name, milliseconds, f"{100 * share:.1f} %"))
                    continue
                low, high = found.ratios("blocks", one.name)
                ratio = f"{found.ratio('blocks', one.name):.3g} ({low:.3g} to {high:.3g})"
                memory = f"{one.facts['temporary'] / 2**20:,.0f} MiB"
                rows.append((title, routing, one.name, milliseconds, "" if one.name == "blocks" else ratio, memory))
    shape = lambda s: (
        f"{s['tokens']:,} tokens, width {s['width']}, {s['experts']} experts top-{s['top_k']}, hidden {s['hidden']:,}"
    )
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            f"Small: {shape(SMALL)}. Large: {shape(LARGE)}.",
            "",
            results.table(("layer", "choices", "form", "ms", "blocks over it", "temporaries"), rows),
            "",
            "Targets, small: blocks at most 0.05 of `ragged_dot`, 1.5 of capacity, 4 of dense. Large: at most 1.6 of dense.",
            "",
            results.table(("layer", "part of blocks", "ms", "of forward and backward"), parts),
            "",
            *notes,
            "",
            mixture_step.tables(),
            "",
            "A step of an OLMoE of 1B active parameters on a GPU, beside torch: no GPU was at hand.",
        ]
    )
    results.write("mixture", "Mixtures of experts", body)


if __name__ == "__main__":
    main()
