"""Rows cut along their length: every mixer computes what one device does, and the program keeps the cut."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import LENGTH, ROWS, TWO_SIDED, VOCABULARY, in_float64, plain_batch
from flax import nnx
from programs import collectives, shapes
from running import tiny

from models import Attention, Block, Causal, FeedForward, LearnedPositions, RMSNorm, Trunk, Window
from models.backends import cudnn, splash
from models.backends.reference import reference
from models.backends.view import View
from models.disentangled import DisentangledAttention
from models.masks import Bidirectional, Chunk, Permutation, Prefix, Sentinel, Tokens, lower
from models.relative import RelativePlaces
from partitioning import UserError, data, fsdp, fsdp_sequence

BLOCK = partial(Block, feed_forward=partial(FeedForward, hidden=32), norm=RMSNorm)
GROUPED = partial(Attention, heads=4, kv_heads=2, qk_norm=RMSNorm, output_gate=True, bias=True)
PATTERNED = partial(
    Trunk,
    width=16,
    layers=4,
    pattern=[
        partial(BLOCK, mixer=GROUPED, mask=Window(2, 1)),
        partial(BLOCK, mixer=GROUPED, mask=Sentinel(1) | Chunk(4)),
    ],
    positions=partial(LearnedPositions, longest=LENGTH),
    vocab_multiple=8,
)
DISENTANGLED = partial(
    Trunk,
    width=16,
    layers=2,
    mixer=partial(DisentangledAttention, heads=2),
    relative=partial(RelativePlaces, buckets=4, longest=8),
    vocab_multiple=8,
)
ORDER = np.argsort(np.random.default_rng(0).random((ROWS, LENGTH)), axis=1).astype(np.int32)
ASKED = np.random.default_rng(1).integers(0, LENGTH, (ROWS, 5)).astype(np.int32)
CALLS = {
    "windows, grouped queries": (PATTERNED, {"mask": Causal() | Permutation(ORDER)}),
    "disentangled, some slots": (DISENTANGLED, {"mask": Prefix(ORDER < 4), "at": ASKED}),
    "an encoder-decoder, some slots": (TWO_SIDED, {"at": ASKED}),
}


def gradients(model, options, rules, count):
    """A loss over all states that are asked for, and its gradient, in float64."""
    place = rules.place(jax.devices()[:count])
    batch = {k: jax.device_put(v, place.rows(v.shape, k)) for k, v in plain_batch().items() if k != "row"}
    graph, state = nnx.split(nnx.eval_shape(lambda: in_float64(model)(VOCABULARY, rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(2)
    state = jax.tree.map(lambda x: jnp.asarray(0.3 * draw.standard_normal(x.shape)), state)
    if model is TWO_SIDED:
        # The same packed rows on both sides.
        options = options | {f"target_{name}": batch[name] for name in ("segments", "positions")}
        options |= {"targets": batch["tokens"]}

    def loss(state, batch):
        out = nnx.merge(graph, state)(**batch, **options).hidden
        return (jnp.sin(out) * (1 + jnp.arange(out.size).reshape(out.shape) % 7)).sum()

    with place.scope():
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(state, batch))


@pytest.mark.parametrize("name", CALLS)
def test_cut_rows_equal_whole_ones(name):
    """Packed documents, masks by place and by order, biases by distance, selected slots, another text's states."""
    with jax.enable_x64(True):
        one, eight = (gradients(*CALLS[name], rules, n) for rules, n in ((data(), 1), (fsdp_sequence(4), 8)))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(eight), strict=True):
        worst = np.abs(a - b).max() / max(np.abs(a).max(), 1e-3)
        assert worst < 1e-10, f"{jax.tree_util.keystr(path)}: {worst:.2e}"


def program(name, rules):
    """A tiny run's optimised step of 8 rows of 12 tokens, width 16, two heads of 8, feed-forward 32."""
    plan = tiny(name, rules=rules).plan()
    return plan.compile(plan.stages[0]).as_text()


def whole_rows(text):
    """Arrays of whole rows' features or scores; keys and values have 8 features for each of 2 heads, and 4 is a part of 16."""
    features = lambda s: {16, 32, 40, 48, 64} & {*s} or s[-1] == 4
    # A lookup's windows, [tokens, 1, features], are of the two half rows that a device has, which are twelve tokens too.
    windows = lambda s: s[:2] == (LENGTH, 1)
    states = lambda s: (
        (LENGTH in s and len(s) > 2 and features(s) and not windows(s)) or (2 * LENGTH in s and features(s))
    )
    return {s for s in shapes(text) if states(s) or s.count(LENGTH) > 1}


@pytest.mark.parametrize("name", ["clm", pytest.param("mlm", marks=pytest.mark.long), "seq2seq"])
def test_no_device_holds_whole_rows_but_keys_and_values(name):
    """Of its two rows a device has no state and no score of all twelve tokens, in forward and backward pass."""
    assert whole_rows(program(name, fsdp_sequence(2))) == set()


def test_where_rows_are_not_cut_they_are_whole():
    """What the test above looks for is there otherwise."""
    found = whole_rows(program("clm", fsdp()))
    assert (3, LENGTH, 32) in found
    assert any(s[-2:] == (LENGTH, LENGTH) for s in found)


def across(rules, name="clm"):
    """Collectives of a tiny step that join devices of different slices, and those that do not."""
    mesh = rules.place().mesh
    slice_of = lambda place: np.unravel_index(place, mesh.devices.shape)[mesh.axis_names.index("slice")]
    found = collectives(program(name, rules), mesh.size)
    crosses = [any(len({slice_of(d) for d in group}) > 1 for group in c.groups) for c in found]
    return [c for c, far in zip(found, crosses, strict=True) if far], [
        c for c, far in zip(found, crosses, strict=True) if not far
    ]


@pytest.mark.parametrize("rules", [fsdp(slices=2), fsdp_sequence(2, slices=2)], ids=["fsdp", "sequence"])
def test_only_sums_of_gradients_cross_slices(rules):
    """Nothing of a row's length, and no parameter is gathered from another slice."""
    far, near = across(rules)
    assert {c.kind for c in far} == {"all-reduce"}
    assert not any(LENGTH in shape for c in far for shape in c.shapes)
    assert any(len(shape) == 2 for c in far for shape in c.shapes)
    assert "all-gather" in {c.kind for c in near}


@pytest.mark.parametrize(
    "mask", [Causal(), Causal() & Window(60), Bidirectional()], ids=["causal", "causal window", "no border"]
)
def test_a_kernel_computes_its_part_of_the_rows(mask):
    """Splash attention's own code, interpreted: outputs and gradients of the formula, with packed documents."""
    draw, rows, length = np.random.default_rng(0), 2, 256
    q, k, v = (jnp.asarray(draw.standard_normal((rows, length, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    segments = np.where(np.arange(length) < 150, 1, 2) * (np.arange(length) < 250)
    positions = np.where(segments == 2, np.arange(length) - 150, np.arange(length))
    segments, positions = (jnp.asarray(np.tile(x, (rows, 1)), jnp.int32) for x in (segments, positions))
    tokens = Tokens(jnp.arange(length), segments, positions)
    view = View(lower(mask, tokens, tokens), mask, segments, positions)

    def value(product):
        loss = lambda *qkv: (jnp.sin(product(*qkv, view, None)) * jnp.arange(8)).sum()
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    expected = value(reference)
    with fsdp_sequence(2, tensor=2).place().scope():
        found = value(partial(splash.product, interpret=True))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(a).max()


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        (splash.splash, "rows of 12 tokens cut into 2 parts, a part is a multiple of 128"),
        (cudnn.cudnn, "rows that are cut along their length"),
    ],
)
def test_what_a_kernel_cannot_cut_it_refuses(backend, says, monkeypatch):
    """By name, and not by computing every row several times."""
    q = jnp.ones((8, LENGTH, 2, 8), jnp.bfloat16)
    here = jnp.ones((8, LENGTH), jnp.int32)
    view = View(jnp.ones((8, LENGTH, LENGTH), bool), Causal(), here, here)
    for module, hardware in ((splash, "tpu"), (cudnn, "gpu")):
        monkeypatch.setattr(module, "platform", lambda h=hardware: h)
    says = f"Attention.backend = '{backend.__name__}' cannot compute {says}: use 'xla'"
    with fsdp_sequence(2).place().scope(), pytest.raises(UserError, match=says):
        backend(q, q, q, view, None)


def test_a_length_that_does_not_divide_is_refused_before_anything_is_compiled():
    with pytest.raises(UserError, match="length = 12 does not divide over the 8 devices of the mesh axis 'sequence'"):
        tiny("clm", rules=fsdp_sequence(8)).plan()
