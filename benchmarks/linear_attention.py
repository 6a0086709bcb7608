"""Linear attention: chunks beside the recurrence and other forms, cost by length, and decoding.

    python -m benchmarks linear_attention

One row, 8 heads of 64 features, float32, documents of about 1,000 tokens. 'Steady' is one decay a head for all tokens, as
lightning attention and RetNet have, 'decayed' one for each token. 'By chunks' is what the mixers call; 'token by token' is the
recurrence as one writes it, under plain autodiff, and 'recomputed' the same in blocks of 128 tokens whose states are computed
again in the backward pass. 'One chunk at a time' scans single chunks of 64 and 'all chunks at once' scans nothing but states;
both keep what they compute. Temporaries are those of the compiled program of forward and backward pass.
A decoder has 4 layers of width 256 and 4 heads, and takes one step with its cache donated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import results
from benchmarks.harness import Contestant, alternate

HEADS, WIDTH = 8, 64
LONG = 8192
FORMS = ("steady", "decayed", "gated", "delta")
LENGTHS = (4096, 16_384, 65_536)
SOFTMAX = (1024, 2048, 4096)
CONTEXTS = (1024, 32_768)


def inputs(form: str, length: int) -> tuple[dict[str, Any], Any, Any]:
    """Arguments by name, borders and a state."""
    import jax.numpy as jnp
    import numpy as np

    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape, dtype=np.float32))
    q, k, v = (normal(1, length, HEADS, WIDTH) for _ in range(3))
    parts = {"q": q, "k": k / jnp.linalg.norm(k, axis=-1, keepdims=True), "v": v}
    if form == "delta":
        parts["rate"] = jnp.asarray(draw.random((1, length, HEADS), dtype=np.float32))
    shape = {"gated": (1, length, HEADS, WIDTH), "steady": (1, 1, HEADS)}.get(form, (1, length, HEADS))
    parts["log_decay"] = jnp.asarray(-0.1 * draw.random(shape, dtype=np.float32))
    return parts, jnp.asarray(draw.random((1, length)) < 1e-3), jnp.zeros((1, HEADS, WIDTH, WIDTH), jnp.float32)


def one_at_a_time(q: Any, k: Any, v: Any, log_decay: Any, resets: Any, state: Any, *, at_once: bool) -> Any:
    """Chunks of 64 in plain jnp: scanned whole, or all multiplied at once with a scan over the states alone."""
    import jax
    import jax.numpy as jnp

    cut = lambda x: x.reshape(1, -1, 64, *x.shape[2:]).swapaxes(0, 1)
    log_decay = jnp.broadcast_to(log_decay, q.shape[:3])
    document = jnp.cumsum(cut(resets), axis=2)
    total = jnp.cumsum(cut(log_decay), axis=2)
    same = (document[..., :, None] == document[..., None, :]) & jnp.tri(64, dtype=bool)
    apart = jnp.where(same[..., None], total[:, :, :, None] - total[:, :, None], -jnp.inf)
    within, until = jnp.exp(apart), jnp.where(document[..., None] == 0, jnp.exp(total), 0)

    def local(x: Any) -> Any:
        q, k, v, within = x[:4]
        out = jnp.einsum("bijh,bjhv->bihv", jnp.einsum("bihk,bjhk->bijh", q, k) * within, v)
        return out, jnp.einsum("bjh,bjhk,bjhv->bhkv", within[:, -1], k, v)

    def carry(state: Any, x: Any) -> Any:
        (q, until), (out, added) = x
        out = out + until[..., None] * jnp.einsum("bihk,bhkv->bihv", q, state)
        return until[:, -1, :, None, None] * state + added, out

    chunks = (cut(q), cut(k), cut(v), within, until)
    if at_once:
        state, out = jax.lax.scan(carry, state, ((chunks[0], until), jax.vmap(local)(chunks)))
    else:
        state, out = jax.lax.scan(lambda s, x: carry(s, ((x[0], x[-1]), local(x))), state, chunks)
    return out.swapaxes(0, 1).reshape(v.shape), state


def recomputed(step: Callable[..., Any], parts: Any, resets: Any, state: Any) -> Any:
    """The recurrence in blocks of 128 tokens, each computed again in the backward pass."""
    import jax
    import jax.numpy as jnp

    length = resets.shape[1]
    cut = lambda x: jnp.broadcast_to(x, (1, length, *x.shape[2:])).reshape(1, -1, 128, *x.shape[2:]).swapaxes(0, 1)

    @partial(jax.checkpoint, prevent_cse=False)
    def block(state: Any, x: Any) -> Any:
        out, state = step(*x, state)
        return state, out

    state, out = jax.lax.scan(block, state, tuple(map(cut, (*parts, resets))))
    return jnp.concatenate(list(out), axis=1), state


def _program(form: str, how: str, length: int, backward: bool) -> tuple[Any, Any]:
    """The compiled program and its arguments."""
    import jax
    import jax.numpy as jnp

    from models.linear_attention.apply import CHUNKED, RECURRENT

    parts, resets, state = inputs(form, length)
    names, call = list(parts), "decayed" if form == "steady" else form

    def softmax(q: Any, k: Any, v: Any, *_: Any) -> Any:
        from models.backends.view import View
        from models.backends.xla import xla
        from models.masks import Causal

        document = jnp.cumsum(resets, axis=1)
        visible = (document[:, :, None] == document[:, None]) & jnp.tri(length, dtype=bool)
        return xla(q, k, v, View(visible, Causal()), None), state

    ways: dict[str, Callable[..., Any]] = {
        "by chunks": CHUNKED[call],
        "token by token": RECURRENT[call],
        "recomputed": lambda *given: recomputed(RECURRENT[call], given[:-2], *given[-2:]),
        "one chunk at a time": partial(one_at_a_time, at_once=False),
        "all chunks at once": partial(one_at_a_time, at_once=True),
        "softmax": softmax,
    }

    call_of = lambda parts, state: ways[how](*(parts[name] for name in names), resets, state)

    def total(parts: Any, state: Any) -> Any:
        out, last = call_of(parts, state)
        # Its gradient by the outputs costs next to nothing.
        return (out * parts["v"]).sum() + last.sum()

    run = jax.value_and_grad(total, argnums=(0, 1)) if backward else call_of
    return jax.jit(run).lower(parts, state).compile(), (parts, state)


def side(form: str, how: str, length: int, backward: bool) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: one call."""
    import jax

    program, given = _program(form, how, length, backward)
    facts = {"temporary": program.memory_analysis().temp_size_in_bytes}
    return lambda: jax.block_until_ready(program(*given)) and None, facts


def decoding(kind: str, context: int) -> tuple[Callable[[], float], dict[str, Any]]:
    """Contestant: the seconds of a step, of 32 with a cache of so many tokens."""
    import time

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from models import Causal, Vocabulary, llama, transnormer
    from models.decoding import unrolled

    make = {"linear": transnormer, "softmax": partial(llama, kv_heads=4)}[kind]
    vocabulary = Vocabulary(size=8192, pad=0, bos=1, eos=2, mask=3, cls=4, sep=5)
    made = make(vocabulary, width=256, layers=4, heads=4, hidden=704, tied=True, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(unrolled(made))
    cache = nnx.merge(graph, weights).empty_cache(1, context)
    state = sum(x.nbytes for x in jax.tree.leaves(cache["entries"]))
    one = jnp.ones((1, 1), jnp.int32)

    def step(weights: Any, cache: Any, token: Any) -> Any:
        model = nnx.merge(graph, weights)
        out = model(token, segments=one, positions=cache["length"][None, None], mask=Causal(), cache=cache)
        best = model.scores(out.hidden[:, 0]).logits().argmax(-1)
        return out.cache, best[:, None].astype(jnp.int32)

    program = jax.jit(step, donate_argnums=1)
    held = [cache | {"length": jnp.asarray(context - 40, jnp.int32), "document": jnp.ones((1,), jnp.int32)}, one]

    def turn() -> float:
        held[0] = held[0] | {"length": jnp.asarray(context - 40, jnp.int32)}
        jax.block_until_ready(held)
        begin = time.perf_counter()
        for _ in range(32):
            held[0], held[1] = program(weights, *held)
        jax.block_until_ready(held)
        return (time.perf_counter() - begin) / 32

    turn()
    return turn, {"state": state}


def _against(form: str, ways: tuple[str, ...], length: int, backward: bool) -> Any:
    contestants = [
        Contestant(how, __name__, "side", form=form, how=how, length=length, backward=backward) for how in ways
    ]
    return alternate(contestants, wanted=3, times=3), contestants


def main() -> None:
    """Measures and writes the section."""
    notes, forms = [], []
    everyone = ("token by token", "recomputed", "one chunk at a time", "all chunks at once")
    for form in FORMS:
        ways = ("by chunks", *(everyone if form in ("steady", "decayed") else everyone[:2]))
        found, contestants = _against(form, ways, LONG, True)
        for one in contestants:
            low, high = found.ratios(one.name, "by chunks")
            ratio = f"{found.ratio(one.name, 'by chunks'):.2f} ({low:.2f} to {high:.2f})"
            memory = f"{one.facts['temporary'] / 2**20:,.0f} MiB"
            forms.append((form, one.name, f"{1e3 * found.seconds(one.name):.0f}", ratio, memory))
        notes.append(f"- {form}, forward and backward: {found.note()}.")
    found, _ = _against("steady", ("by chunks", "token by token"), LONG, False)
    low, high = found.ratios("by chunks", "token by token")
    notes.append(f"- steady, forward: {found.note()}.")
    ahead = (
        f"Forward alone steady takes {1e3 * found.seconds('by chunks'):.0f} ms, token by token "
        f"{1e3 * found.seconds('token by token'):.0f} ms: {found.ratio('by chunks', 'token by token'):.2f} ({low:.2f} to "
        f"{high:.2f}; target: at most 1.15)."
    )
    unique = [
        Contestant(f"{how} {n}", __name__, "side", form="steady", how=how, length=n, backward=True)
        for how, sizes in (("by chunks", sorted({*SOFTMAX, *LENGTHS})), ("softmax", SOFTMAX))
        for n in sizes
    ]
    found = alternate(unique, wanted=2, times=3)
    notes.append(f"- by length: {found.note()}.")
    told = {one.name: (1e6 * found.seconds(one.name), one.facts["temporary"]) for one in unique}
    by_length = []
    for n in sorted({*LENGTHS, *SOFTMAX}):
        cells = []
        for how in ("by chunks", "softmax"):
            time, memory = told.get(f"{how} {n}", (None, None))
            cells += ["", ""] if time is None else [f"{time / n:.1f}", f"{memory / 2**20:,.0f} MiB"]
        by_length.append((f"{n:,}", *cells))
    costs = [told[f"by chunks {n}"][0] / n for n in LENGTHS]
    crossing = [n for n in SOFTMAX if told[f"by chunks {n}"][0] < told[f"softmax {n}"][0]]
    steps = [
        Contestant(f"{kind} {n}", __name__, "decoding", kind=kind, context=n)
        for kind, n in itertools.product(("linear", "softmax"), CONTEXTS)
    ]
    found_steps = alternate(steps, wanted=3, times=3)
    notes.append(f"- decoding: {found_steps.note()}.")
    decode = [
        (kind, f"{n:,}", f"{1e3 * found_steps.seconds(one.name):.2f}", f"{one.facts['state'] / 2**20:,.2f} MiB")
        for (kind, n), one in zip(itertools.product(("linear", "softmax"), CONTEXTS), steps, strict=True)
    ]
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            results.table(
                ("form", f"{LONG:,} tokens, forward and backward", "ms", "over by chunks", "temporaries"), forms
            ),
            "",
            "Target, steady: by chunks at least 15 times faster than token by token, and ahead of the others.",
            "",
            ahead,
            "",
            results.table(
                ("tokens", "by chunks, us a token", "temporaries", "softmax, us a token", "temporaries"), by_length
            ),
            "",
            f"By chunks a token costs {max(costs) / min(costs):.2f} times as much at one of {LENGTHS[0]:,} to {LENGTHS[-1]:,} "
            f"tokens as at another (target: at most 1.2). "
            + (f"From {crossing[0]:,} tokens on it takes less time than softmax attention." if crossing else "")
            + " Forward and backward, steady.",
            "",
            results.table(("decoder", "context", "ms a token", "state or cache"), decode),
            "",
            "Against fla's kernels on a GPU: no GPU was at hand.",
            "",
            *notes,
        ]
    )
    results.write("linear_attention", "Linear attention", body)


if __name__ == "__main__":
    main()
