"""A shipped decoder's step with experts beside the same decoder's with dense layers, and what the parts of a layer of experts cost.

    python -m benchmarks mixture

A step is the run's own, optimizer and placement of the batch included, of the shipped config on random tokens. The dense
decoder has in each layer one gated feed-forward layer as wide as the experts of a token are together: as many FLOPs, but for
the router. Parts are programs of their own, forward and backward, of one layer's shapes: `route` is the router, its side terms
and the count of choices; `sort` lays the choices out in blocks (forward alone, nothing flows back); `combine` gathers each
token's results, weighs and adds them; `blocks` is all that follows the router, `sort` and `combine` included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.harness import Contestant, alternate
from benchmarks.runs import RandomText, stepping

CONFIG = "configs/olmoe.gin"
VOCABULARY = 262
"""Of the config's tokenizer."""
PARTS = ("route", "sort", "combine", "blocks", "dense layer")


@cache
def shipped() -> Any:
    """The config's run, on random tokens."""
    from launch.config import load

    run = load([str(Path(__file__).parent.parent / CONFIG)]).value
    return replace(run, data=RandomText(VOCABULARY), evaluators=())


@cache
def layer() -> dict[str, Any]:
    """The sizes of a layer of experts there, and how many there are."""
    from flax import nnx

    from models import Experts

    run = shipped()
    trees = run.plan().trees
    trunk = nnx.merge(trees.graphs["trunk"], trees.abstract["trunk"])
    nodes = [node for _, node in nnx.iter_graph(trunk) if isinstance(node, Experts)]
    one = nodes[0]
    *_, experts, width, hidden = one.inner.get_value().shape
    layers = sum(node.inner.get_value().size // (experts * width * hidden) for node in nodes)
    sizes = {
        "tokens": run.batch_size * run.length,
        "width": width,
        "experts": experts,
        "top_k": one.top_k,
        "hidden": hidden,
    }
    return sizes | {"activation": one.activation, "layers": layers}


def step(how: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: a step with experts, or with dense layers in their place."""
    from models import FeedForward
    from training.loop import step_flops

    run, sizes = shipped(), layer()
    if how == "dense":
        hidden, activation = sizes["top_k"] * sizes["hidden"], sizes["activation"]

        def dense(width: int, *, rngs: Any, **_: Any) -> Any:
            return FeedForward(width, hidden=hidden, activation=activation, gated=True, rngs=rngs)

        run = replace(run, model=partial(run.model, feed_forward=dense))
    turn, plan, facts = stepping(run)
    return turn, facts | {"flops": step_flops(plan, plan.stages[0]).flops}


def part(how: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: a part of one layer."""
    import jax
    import jax.numpy as jnp

    from benchmarks.mixture import side

    sizes = {name: size for name, size in layer().items() if name not in ("layers", "activation")}
    if how != "route":
        return side({"dense layer": "dense"}.get(how, how), 0.0, **sizes)
    from flax import nnx

    from models import TopKRouter
    from models.mixture.balance import load_balance, z_term

    run = shipped()
    shape = (run.batch_size, run.length, sizes["width"])
    x = jax.random.normal(jax.random.key(0), shape)
    present = jnp.ones(shape[:2], bool)
    graph, state = nnx.split(
        TopKRouter(sizes["width"], experts=sizes["experts"], top_k=sizes["top_k"], rngs=nnx.Rngs(0))
    )

    def loss(state: Any, x: Any) -> Any:
        routing = nnx.merge(graph, state)(x, present)
        terms = load_balance(
            routing.shares, routing.taken, present, top_k=sizes["top_k"], over="choices", scope="batch", coefficient=1.0
        )
        chosen = (routing.taken * present[..., None]).sum((0, 1))
        z = z_term(routing.logits, present, coefficient=1.0)
        return jnp.sin(routing.weights).sum() + (terms.total * terms.fixed).sum() + z.total, (routing.chosen, chosen)

    program = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(state, x).compile()

    def turn() -> None:
        jax.block_until_ready(program(state, x))

    return turn, {}


def tables() -> str:
    """Measures; the text for the results."""
    steps = [Contestant(f"step, {how}", __name__, "step", how=how) for how in ("experts", "dense")]
    parts = [Contestant(how, __name__, "part", how=how) for how in PARTS]
    found = alternate([*steps, *parts], turn_seconds=0.5)
    sizes = layer()
    experts, dense = steps
    low, high = found.ratios(experts.name, dense.name)
    milliseconds = lambda one: f"{1e3 * found.seconds(one.name):.1f}"
    compared = [
        (
            one.name,
            f"{one.facts['parameters'] / 1e6:.2f}",
            f"{one.facts['flops'] / 1e9:.1f}",
            milliseconds(one),
            f"{found.ratio(one.name, dense.name):.2f} ({low:.2f} to {high:.2f})" if one is experts else "",
        )
        for one in steps
    ]
    apart = [
        (one.name, milliseconds(one), f"{100 * sizes['layers'] * found.ratio(one.name, experts.name):.1f} %")
        for one in parts
    ]
    shape = (
        f"{sizes['tokens']:,} tokens a step, width {sizes['width']}, {sizes['layers']} layers of {sizes['experts']} experts "
        f"top-{sizes['top_k']}, hidden {sizes['hidden']}"
    )
    return "\n".join(
        [
            f"### A step of `{CONFIG}`",
            "",
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            f"{shape}.",
            "",
            results.table(("step", "M parameters", "GFLOPs", "ms", "over dense"), compared),
            "",
            results.table(("part of a layer", "ms", "of the step with experts, all layers"), apart),
            "",
            f"- {found.note()}.",
        ]
    )
