"""Every mask by every back end in every direction: equal to the reference, or refused by name; the docs show this table."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import VOCABULARY
from flax import nnx
from relations import INSIDE, ORDER, POSITIONS, RANDOM, SEGMENTS, S

from models import (
    Attention,
    Bidirectional,
    Block,
    ByRow,
    Causal,
    Chunk,
    Mask,
    Matrix,
    Permutation,
    Prefix,
    RMSNorm,
    Sentinel,
    Trunk,
    Window,
)
from models.attention import BACKENDS, Backend
from models.backends import cudnn, splash
from models.backends.reference import reference
from models.backends.view import View
from models.masks import Tokens, lower
from partitioning import UserError, fsdp_tensor

ROWS, HEADS, GROUPS, WIDTH = 2, 4, 2, 8
# In a call with a cache two tokens are new, and there is room for more behind them.
NEW, ROOM = slice(7, 9), 16
SPARSE = RANDOM & (np.arange(S)[:, None] != 1)

CASES: dict[str, Mask] = {
    "Bidirectional()": Bidirectional(),
    "Causal()": Causal(),
    "Prefix(inside)": Prefix(jnp.asarray(INSIDE[None])),
    "Window(2, 1)": Window(2, 1),
    "Window(2)": Window(2),
    "Chunk(2)": Chunk(2),
    "Sentinel(1)": Sentinel(1),
    "Permutation(order)": Permutation(jnp.asarray(ORDER[None])),
    "Matrix(visible)": Matrix(jnp.asarray(SPARSE[None])),
    "ByRow(choose, yes, no)": ByRow(jnp.arange(ROWS) == 0, Causal(), Window(1, 1)),
    "Causal() & Window(2)": Causal() & Window(2),
    "Causal() & Chunk(3)": Causal() & Chunk(3),
    "Window(1) | Window(0, 2)": Window(1) | Window(0, 2),
}
# What is refused, and the word that the message has for it: relations over the tokens of one call with a cache already
# where the mask is lowered, whatever the back end.
CACHED = {("Permutation(order)", backend): "Permutation" for backend in ("reference", "xla", "cudnn", "splash")}
CACHED = {(name, "splash"): "a cache" for name in CASES} | CACHED
REFUSED = {
    ("Prefix(inside)", "splash"): "Prefix",
    ("Chunk(2)", "splash"): "Chunk",
    ("Sentinel(1)", "splash"): "Sentinel",
    ("Permutation(order)", "splash"): "Permutation",
    ("Matrix(visible)", "splash"): "Matrix",
    ("ByRow(choose, yes, no)", "splash"): "ByRow",
    ("Causal() & Chunk(3)", "splash"): "Chunk",
    ("a bias on the scores", "splash"): "a bias",
    ("another network's states", "splash"): "another network",
}
COLUMNS = ("reference", "xla", "cudnn", "splash")
ROW_NAMES = (*CASES, "a bias on the scores", "another network's states")
# The code that runs on a GPU and a TPU, with the kernel's own stand-in on this machine.
RUNS = {
    "reference": reference,
    "xla": BACKENDS["xla"],
    "cudnn": partial(cudnn.product, implementation="xla"),
    "splash": partial(splash.product, interpret=True),
}


def table() -> str:
    """What the docs show."""

    def cell(name, backend):
        plain = "" if (name, backend) in REFUSED else "forward, gradient"
        cached = "" if name not in CASES or (name, backend) in CACHED else "cached"
        return ", ".join(filter(None, (plain, cached))) or "refused"

    lines = ["| mask | " + " | ".join(f"`{b}`" for b in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in ROW_NAMES:
        title = f"`{name}`".replace("|", r"\|") if name in CASES else name
        lines.append(f"| {title} | " + " | ".join(cell(name, b) for b in COLUMNS) + " |")
    return "\n".join(lines)


def test_the_docs_show_this_table():
    shown = (Path(__file__).resolve().parents[2] / "docs" / "masks.md").read_text()
    assert table() in shown, f"docs/masks.md should have\n{table()}"


def test_no_mask_and_no_back_end_is_left_out():
    def inside(mask):
        return {type(mask)}.union(*(inside(part) for part in vars(mask).values() if isinstance(part, Mask)))

    shipped = {mask for mask in Mask.__subclasses__() if mask.__module__ == Mask.__module__}
    assert set().union(*map(inside, CASES.values())) == shipped
    assert set(COLUMNS) == set(RUNS) == set(get_args(Backend))


def inputs(dtype):
    draw = np.random.default_rng(0)
    tile = lambda x: jnp.asarray(np.tile(x, (ROWS, 1)))
    q, k, v = (jnp.asarray(draw.standard_normal((ROWS, S, n, WIDTH)), dtype) for n in (HEADS, GROUPS, GROUPS))
    return q, k, v, jnp.asarray(draw.standard_normal((1, HEADS, S, S)), dtype), tile(SEGMENTS), tile(POSITIONS)


@pytest.mark.parametrize("backend", COLUMNS[1:])
@pytest.mark.parametrize("name", ROW_NAMES)
def test_forward_and_gradient(name, backend):
    """The reference's values and derivatives by queries, keys, values and bias; a query that sees nothing gets 0."""
    exact = backend == "xla"
    with jax.enable_x64(exact):
        q, k, v, bias, segments, positions = inputs(np.float64 if exact else np.float32)
        mask = CASES.get(name, Bidirectional())
        tokens = Tokens(jnp.arange(S), segments, positions)
        where = {"keys": "memory"} if "network" in name else {"segments": segments, "positions": positions}
        view = View(lower(mask, tokens, tokens), mask, **where)
        bias = bias if "bias" in name else None
        pull = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), q.dtype)

        def run(product):
            def value(q, k, v, bias):
                mixed = product(q, k, v, view, bias)
                return (mixed * pull).sum(), mixed

            return jax.jit(
                jax.value_and_grad(value, argnums=(0, 1, 2, *([3] if bias is not None else [])), has_aux=True)
            )

        if word := REFUSED.get((name, backend)):
            with pytest.raises(UserError, match=f"'{backend}'.*{word}.*'xla'"):
                run(RUNS[backend])(q, k, v, bias)
            return
        (_, expected), expected_gradients = run(reference)(q, k, v, bias)
        (_, mixed), gradients = run(RUNS[backend])(q, k, v, bias)
        tolerance = 1e-12 if exact else 5e-6
        for found, right in zip((mixed, *gradients), (expected, *expected_gradients), strict=True):
            np.testing.assert_allclose(found, right, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(mixed[np.asarray(~view.visible.any(-1)).repeat(ROWS // len(view.visible), 0)], 0)


@pytest.mark.parametrize("backend", COLUMNS[1:])
@pytest.mark.parametrize("name", CASES)
def test_with_a_cache(name, backend):
    """Two new tokens before an empty end: what the reference gives them over the whole row, without what follows."""
    q, k, v, _, segments, positions = inputs(np.float32)
    mask = CASES[name]
    held = np.arange(S) < NEW.stop

    def room(x):
        kept = jnp.where(held.reshape(1, -1, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))
        return jnp.pad(kept, [(0, ROOM - S if axis == 1 else 0) for axis in range(x.ndim)])

    wide = {
        "Prefix(inside)": lambda: Prefix(room(mask.inside)),
        "Matrix(visible)": lambda: Matrix(jnp.pad(mask.visible, [(0, 0), (0, 0), (0, ROOM - S)])[:, NEW]),
    }.get(name, lambda: mask)()
    new = Tokens(jnp.arange(S)[NEW], segments[:, NEW], positions[:, NEW])
    keys = Tokens(jnp.arange(ROOM), room(segments), room(positions))

    def run():
        view = View(lower(wide, new, keys), wide, new.segments, new.positions, keys="cache")
        return RUNS[backend](q[:, NEW], room(k), room(v), view, None)

    if word := CACHED.get((name, backend)):
        with pytest.raises(UserError, match=word):
            run()
        return
    tokens = Tokens(jnp.arange(S), segments, positions)
    view = View(lower(mask, tokens, tokens) & held, mask, segments, positions)
    np.testing.assert_allclose(run(), reference(q, k, v, view, None)[:, NEW], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_single_slot_of_groups(name):
    """A step of decoding, for each slot: the reference's values and derivatives, 0 where nothing is seen, and no word of the
    keys that are hidden."""
    with jax.enable_x64(True):
        q, k, v, _, segments, positions = inputs(np.float64)
        mask, tokens = CASES[name], Tokens(jnp.arange(S), segments, positions)
        seen = jnp.broadcast_to(lower(mask, tokens, tokens), (ROWS, S, S)).at[1, 3].set(False)
        pull = jnp.asarray(np.random.default_rng(1).standard_normal(q[:, :1].shape))

        def run(product, slot, k, v):
            def value(q, k, v):
                mixed = product(q, k, v, View(seen[:, slot : slot + 1], None, segments, positions), None)
                return (mixed * pull).sum(), mixed

            return jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(q[:, slot : slot + 1], k, v)

        for slot in range(S):
            (_, expected), by_reference = run(reference, slot, k, v)
            (_, mixed), gradients = run(RUNS["xla"], slot, k, v)
            for found, right in zip((mixed, *gradients), (expected, *by_reference), strict=True):
                np.testing.assert_allclose(found, right, rtol=0, atol=1e-12)
            # What no query sees may hold anything.
            hidden = ~seen[:, slot, :, None, None]
            (_, again), _ = run(RUNS["xla"], slot, jnp.where(hidden, 1e6, k), jnp.where(hidden, 1e6, v))
            np.testing.assert_array_equal(again, mixed)
        assert not seen[1, 3].any()


def test_hardware_is_refused_by_name(monkeypatch):
    """Before anything is compiled, and with the way out."""
    q, k, v, _, segments, positions = inputs(np.float32)
    view = View(jnp.ones((ROWS, S, S), bool), Bidirectional(), segments, positions)
    for backend in ("cudnn", "splash"):
        with pytest.raises(UserError, match=f"'{backend}'.*platform 'cpu'.*'xla'"):
            jax.jit(partial(BACKENDS[backend], bias=None)).trace(q, k, v, view)
    monkeypatch.setattr(cudnn, "platform", lambda: "gpu")
    with pytest.raises(UserError, match=r"float32.*Trunk\.dtype = 'bfloat16'"):
        cudnn.cudnn(q, k, v, view, None)
    narrow = [x[..., :6].astype(jnp.bfloat16) for x in (q, k, v)]
    with pytest.raises(UserError, match=r"width 6.*multiple of 8"):
        cudnn.cudnn(*narrow, view, None)


def test_causality_is_said_to_cudnn_only_where_slots_are_rows(monkeypatch):
    """With it, blocks are left out: it must not be said of a cache or of some slots."""
    q, k, v, _, segments, positions = inputs(np.float32)
    said = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, is_causal, **__: said.append(is_causal) or q)
    view = partial(View, jnp.ones((ROWS, S, S), bool), segments=segments, positions=positions)
    at = jnp.zeros((ROWS, S), jnp.int32)
    for call in (
        view(mask=Causal()),
        view(mask=Window(1, 1)),
        view(mask=Causal(), at=at),
        view(mask=Causal(), keys="cache"),
    ):
        cudnn.product(q, k, v, call, None, implementation="xla")
    assert said == [True, False, False, False]


PATTERN = [Window(1, 1), None]


def trunk(backend, pattern, layers):
    """A trunk of grouped queries whose blocks have masks of their own, without feed-forward layers."""
    made = Trunk(
        VOCABULARY,
        width=32,
        layers=layers,
        pattern=[
            partial(
                Block,
                mixer=partial(Attention, heads=HEADS, kv_heads=GROUPS, backend=backend),
                feed_forward=Still,
                norm=RMSNorm,
                mask=mask,
            )
            for mask in pattern
        ],
        rngs=nnx.Rngs(0),
    )
    return nnx.split(made)


class Still(nnx.Module):
    """A feed-forward layer that does nothing."""

    counts_tokens = False

    def __init__(self, width, *, rngs):
        del width, rngs

    def __call__(self, x, present):
        return 0 * x, {}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    # Under names of their own: programs are kept by name.
    for name in ("cudnn", "splash"):
        monkeypatch.setitem(BACKENDS, f"interpreted {name}", RUNS[name])


@pytest.fixture
def row():
    tile = lambda x: jnp.asarray(np.tile(x, (ROWS, 1)))
    draw = np.random.default_rng(2)
    return {
        "embeddings": jnp.asarray(draw.standard_normal((ROWS, S, 32)), jnp.float32),
        "segments": tile(SEGMENTS),
        "positions": tile(POSITIONS),
    }


@pytest.mark.parametrize("backend", ["interpreted splash", "interpreted cudnn"])
def test_a_block_computes_the_same(backend, row):
    """A block with a mask of its own, at some slots, one of them twice; gradients of all parameters."""
    draw = np.random.default_rng(3)
    at = jnp.asarray(draw.integers(0, S, (ROWS, 5))).at[:, 1].set(3).at[:, 2].set(3)
    pull = jnp.asarray(draw.standard_normal((ROWS, 5, 32)), jnp.float32)

    def gradients(backend):
        graph, state = trunk(backend, PATTERN[:1], 1)

        def loss(state):
            hidden = nnx.merge(graph, state)(mask=Causal(), at=at, **row).hidden
            return (hidden * pull).sum(), hidden

        (_, hidden), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
        return hidden, nnx.to_pure_dict(gradient)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2e-4), gradients(backend), gradients("xla"))


@pytest.mark.parametrize("backend", ["interpreted splash", "interpreted cudnn"])
def test_influence_is_exactly_what_the_masks_allow(backend, row):
    """Derivatives of every state by every embedding, through scanned blocks: 0 across documents and where nothing is seen."""
    mask = Causal()
    graph, state = trunk(backend, PATTERN, 4)
    pull = jnp.asarray(np.random.default_rng(4).standard_normal((S, 1, S, 1)) * np.eye(S)[:, None, :, None] + 0.0)
    pull = jnp.broadcast_to(pull, (S, ROWS, S, 32)).astype(jnp.float32) * jnp.arange(1, 33)

    @jax.jit
    def influence(x):
        run = lambda x: nnx.merge(graph, state)(mask=mask, **(row | {"embeddings": x})).hidden
        _, back = jax.vjp(run, x)
        return jnp.abs(jax.vmap(lambda one: back(one)[0])(pull)).max(-1)

    tokens = Tokens(jnp.arange(S), row["segments"], row["positions"])
    reach = np.eye(S, dtype=bool)
    for own in (*PATTERN, *PATTERN):
        seen = lower(mask if own is None else mask & own, tokens, tokens)
        reach = (np.asarray(seen[0]) | np.eye(S, dtype=bool)) @ reach
    found = np.asarray(influence(row["embeddings"]))
    for r in range(ROWS):
        np.testing.assert_array_equal(found[:, r] != 0, reach)


@pytest.mark.parametrize("backend", ["interpreted splash", "interpreted cudnn"])
def test_documents_do_not_move_each_other(backend, row):
    """To the last bit: another document, or other padding, before or behind."""
    graph, state = trunk(backend, PATTERN, 4)
    run = jax.jit(lambda x: nnx.merge(graph, state)(mask=Causal(), **(row | {"embeddings": x})).hidden)
    before = np.asarray(run(row["embeddings"]))
    for document in (1, 2, 0):
        moved = np.where((document == SEGMENTS)[None, :, None], 3 - row["embeddings"], row["embeddings"])
        after = np.asarray(run(jnp.asarray(moved)))
        np.testing.assert_array_equal(after[:, document != SEGMENTS], before[:, document != SEGMENTS])
        assert np.abs(after - before)[:, document == SEGMENTS].max() > 1e-2


def test_eight_devices_run_the_kernel_on_their_own_rows_and_heads():
    q, k, v, _, segments, positions = (jnp.tile(x, (2, 1, 1, 1)[: x.ndim]) for x in inputs(np.float32))
    view = View(jnp.ones((1, 1, 1), bool), Causal() & Window(2), segments, positions)
    pull = jnp.asarray(np.random.default_rng(5).standard_normal(q.shape), jnp.float32)
    loss = lambda q, k, v: (RUNS["splash"](q, k, v, view, None) * pull).sum()
    one = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
    with fsdp_tensor(2).place().scope():
        eight = jax.jit(jax.value_and_grad(lambda *x: loss(*x), argnums=(0, 1, 2)))(q, k, v)
    assert len(eight[1][0].sharding.device_set) == 8
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), eight, one)


@pytest.mark.parametrize("broken", ["a place left out", "a document that comes back"])
def test_a_window_over_broken_documents_is_never_silently_wrong(broken):
    """Slots are not places there: that row is NaN, and only that one, and only where there is a window."""
    q, k, v, _, segments, positions = inputs(np.float32)
    segments, positions = np.array(segments), np.array(positions)
    if broken == "a place left out":
        positions[1, 2:5] += 1
    else:
        segments[1], positions[1] = [1, 1, 2, 2, 1, 1, 1, 3, 3, 0, 0], [0, 1, 0, 1, 2, 3, 4, 0, 1, 0, 0]
    for mask, wrong in ((Window(2), [False, True]), (Causal(), [False, False]), (Window(1) | Causal(), [False, True])):
        view = View(jnp.ones((1, 1, 1), bool), mask, jnp.asarray(segments), jnp.asarray(positions))
        found = np.isnan(RUNS["splash"](q, k, v, view, None))
        np.testing.assert_array_equal(found.all((1, 2, 3)), wrong)
        np.testing.assert_array_equal(found.any((1, 2, 3)), wrong)
