"""An encoder-decoder: what its decoder sees, with a cache and without, and what disentangled attention computes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hub_cases import weight
from relations import VOCABULARY

from models import Attention, Block, Causal, FeedForward, LayerNorm, RMSNorm, Trunk
from models.cross_attention import CrossAttention
from models.decoding import Beam, Contrastive, Greedy, Prompts, Stop, decoder_of, generate, unrolled
from models.disentangled import DisentangledAttention
from models.families.t5 import t5
from models.relative import RelativeBias, RelativePlaces, log_buckets, spread
from models.variables import flatten, replace_values
from partitioning import UserError

N, T = 7, 6
SEGMENTS, TARGET_SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0]]), np.array([[1, 1, 2, 2, 2, 0]])
PLACES, TARGET_PLACES = np.array([[0, 1, 2, 0, 1, 2, 0]]), np.array([[0, 1, 0, 1, 2, 0]])
D = 8


def filled(model, size=1.0):
    """The same model with weights that matter, in float64."""
    drawn = lambda path, leaf: jnp.asarray(size * weight(path, leaf.shape), "float64")
    values = {path: drawn(path, leaf) for path, leaf in flatten(model, nnx.Param).items()}
    graph, state = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda x: x.astype("float64"), state))
    replace_values(model, values)
    return model


def made(tied=True, size=1.0, **options):
    sizes = {"width": D, "layers": 2, "decoder_layers": 3, "heads": 2, "head_width": 3, "hidden": 12, "buckets": 8}
    trunk = partial(Trunk, dtype="float64", **options)
    return filled(t5(VOCABULARY, **sizes, longest=8, tied=tied, trunk=trunk, rngs=nnx.Rngs(0)), size)


def embedded(model, draw):
    """Embeddings of the decoder's slots, drawn, and a call of the decoder with them."""
    x = jnp.asarray(draw.standard_normal((1, T, D)))
    memory = jnp.asarray(draw.standard_normal((1, N, D)))

    def call(x, memory, **more):
        where = {"segments": jnp.asarray(TARGET_SEGMENTS), "positions": jnp.asarray(TARGET_PLACES), "mask": Causal()}
        return model.decoder(embeddings=x, memory=memory, memory_segments=jnp.asarray(SEGMENTS), **where, **more)

    return x, memory, call


@pytest.mark.parametrize("options", [{}, {"scan": False}, {"remat": "full"}], ids=["scanned", "unscanned", "remat"])
def test_a_decoder_sees_its_own_documents_memory_and_no_target_ahead(options):
    with jax.enable_x64(True):
        x, memory, call = embedded(made(**options), np.random.default_rng(0))
        by_x, by_memory = jax.jacobian(lambda x, memory: call(x, memory).hidden.sum(-1), (0, 1))(x, memory)
    moves = lambda jacobian: np.abs(np.asarray(jacobian)[0, :, 0]).max(-1) > 0
    present = TARGET_SEGMENTS[0] > 0
    own = (TARGET_SEGMENTS[0][:, None] == SEGMENTS[0][None, :]) & present[:, None]
    np.testing.assert_array_equal(moves(by_memory), own)
    before = np.tril(TARGET_SEGMENTS[0][:, None] == TARGET_SEGMENTS[0][None, :])
    np.testing.assert_array_equal(moves(by_x)[present], before[present])


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
def test_decoding_over_a_cache_is_the_whole_call(scan):
    with jax.enable_x64(True):
        model = made(scan=scan)
        x, memory, call = embedded(model, np.random.default_rng(1))
        cache = model.decoder.empty_cache(1, T, memory=memory, memory_segments=jnp.asarray(SEGMENTS))
        found = []
        for t in range(T):
            cut = slice(t, t + 1)
            out = model.decoder(
                embeddings=x[:, cut],
                segments=jnp.asarray(TARGET_SEGMENTS[:, cut]),
                positions=jnp.asarray(TARGET_PLACES[:, cut]),
                mask=Causal(),
                cache=cache,
            )
            found.append(out.hidden)
            cache = out.cache
        np.testing.assert_allclose(jnp.concatenate(found, 1), call(x, memory).hidden, rtol=1e-12, atol=1e-12)


def test_states_at_some_slots_and_weights_of_both_attentions():
    with jax.enable_x64(True):
        model = made()
        x, memory, call = embedded(model, np.random.default_rng(2))
        at = jnp.asarray([[4, 1]])
        np.testing.assert_allclose(call(x, memory, at=at).hidden, call(x, memory).hidden[:, at[0]], rtol=1e-12)
        taps = call(x, memory, taps=("attention", "cross_attention")).taps
        assert set(taps["attention"]) == set(taps["cross_attention"]) == {0, 1, 2}
        for weights in taps["cross_attention"].values():
            assert weights.shape == (1, 2, T, N)
            np.testing.assert_allclose(weights.sum(-1), np.tile(TARGET_SEGMENTS > 0, (2, 1))[None], rtol=1e-12)


def test_a_memory_is_given_where_one_is_read_and_nowhere_else():
    model = made()
    where = {"segments": jnp.asarray(TARGET_SEGMENTS), "positions": jnp.asarray(TARGET_PLACES)}
    with pytest.raises(UserError, match="this trunk attends to a memory: call it with `memory` and `memory_segments`"):
        model.decoder(embeddings=jnp.zeros((1, T, D)), **where)
    with pytest.raises(UserError, match="this trunk attends to no memory"):
        model.encoder(
            jnp.zeros((1, T), int), memory=jnp.zeros((1, N, D)), memory_segments=jnp.asarray(SEGMENTS), **where
        )
    with pytest.raises(UserError, match=r"RelativeBias.buckets = 2, longest = 8: expected 4 buckets"):
        RelativeBias(D, heads=2, buckets=2, longest=8, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"expected models.Trunk.relative = @models.RelativePlaces"):
        Trunk(VOCABULARY, width=D, layers=1, mixer=partial(DisentangledAttention, heads=2), rngs=nnx.Rngs(0))(
            jnp.zeros((1, T), int), **where
        )


def test_the_gradient_of_a_bias_is_the_chain_rules():
    """`spread` against plain indexing, whose gradient XLA adds up one by one."""
    with jax.enable_x64(True):
        draw = np.random.default_rng(3)
        table, index = jnp.asarray(draw.standard_normal((5, 2))), jnp.asarray(draw.integers(0, 5, (3, 4, 6)))
        pull = jnp.asarray(draw.standard_normal((3, 2, 4, 6)))
        plain = lambda table: jnp.moveaxis(table[index], -1, 1)
        np.testing.assert_array_equal(spread(table, index), plain(table))
        grad = lambda f: jax.grad(lambda table: (f(table) * pull).sum())(table)
        np.testing.assert_allclose(grad(lambda t: spread(t, index)), grad(plain), rtol=1e-12)


@pytest.mark.parametrize("rows", [12, 11], ids=["deberta", "ltg_bert"])
def test_disentangled_scores_are_the_papers(rows):
    """Three products a pair, written out in numpy; distances beyond the buckets share the last."""
    buckets, longest, length, heads = 6, 8, 14, 2
    with jax.enable_x64(True):
        trunk = Trunk(
            VOCABULARY,
            width=D,
            layers=1,
            mixer=partial(DisentangledAttention, heads=heads),
            relative=partial(RelativePlaces, buckets=buckets, longest=longest, rows=rows, norm=LayerNorm),
            norm=RMSNorm,
            dtype="float64",
            rngs=nnx.Rngs(0),
        )
        trunk = filled(trunk)
        x = np.random.default_rng(4).standard_normal((1, length, D))
        where = {"segments": jnp.ones((1, length), int), "positions": jnp.arange(length)[None]}
        found = trunk(embeddings=jnp.asarray(x), taps=("attention",), **where).taps["attention"][0][0]
        p = {name: np.asarray(value) for name, value in flatten(trunk, nnx.Param).items()}
    layer = "stack/layers/0"
    normed = x[0] / np.sqrt((x[0] ** 2).mean(-1, keepdims=True) + 1e-6) * p[f"{layer}/mixer_norm/scale"]
    table = p["relative/table"] - p["relative/table"].mean(-1, keepdims=True)
    table = table / np.sqrt((table**2).mean(-1, keepdims=True) + 1e-6)
    table = table * p["relative/norm/scale"] + p["relative/norm/bias"]
    heads_of = lambda x, name: np.einsum("sd,dhk->shk", x, p[f"{layer}/mixer/{name}"]) + p[f"{layer}/mixer/{name}_bias"]
    q, k, far, near = (heads_of(x, name) for x in (normed, table) for name in ("query", "key"))
    bucket = dict(zip(range(-longest, longest + 1), log_buckets(buckets, longest).tolist(), strict=True))
    scores = np.zeros((heads, length, length))
    for i in range(length):
        for j in range(length):
            place = min(max(bucket[min(max(i - j, -longest), longest)] + rows - buckets, 0), rows - 1)
            scores[:, i, j] = (q[i] * k[j] + q[i] * near[place] + k[j] * far[place]).sum(-1) / np.sqrt(3 * D / heads)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(found, weights / weights.sum(-1, keepdims=True), rtol=1e-10)


def test_a_cross_block_is_two_blocks_where_the_text_is_its_own_memory():
    """Cross-attention to the states that stand before it, under the same weights, is attention without rotation."""
    with jax.enable_x64(True):
        mixer = partial(Attention, heads=2, theta=None)
        block = partial(Block, mixer=mixer, feed_forward=partial(FeedForward, hidden=8), norm=RMSNorm)
        plain = filled(Trunk(VOCABULARY, width=D, layers=1, pattern=[block], dtype="float64", rngs=nnx.Rngs(0)))
        cross = partial(block, cross=partial(CrossAttention, heads=2))
        both = Trunk(VOCABULARY, width=D, layers=1, pattern=[cross], dtype="float64", rngs=nnx.Rngs(0))
        both = filled(both)
        values = flatten(plain, nnx.Param)
        name = "stack/layers/0"
        copied = {f"{name}/cross/{part}": values[f"{name}/mixer/{part}"] for part in ("query", "key", "value", "out")}
        copied |= {f"{name}/cross_norm/scale": values[f"{name}/mixer_norm/scale"]}
        silent = {f"{name}/mixer/out": jnp.zeros_like(values[f"{name}/mixer/out"])}
        replace_values(both, values | copied | silent)
        x = jnp.asarray(np.random.default_rng(5).standard_normal((1, N, D)))
        where = {"segments": jnp.asarray(SEGMENTS), "positions": jnp.asarray(PLACES)}
        norm = plain.stack.layers["0"].mixer_norm
        found = both(embeddings=x, memory=norm(x), memory_segments=where["segments"], **where).hidden
        expected = plain(embeddings=x, **where).hidden
    present = SEGMENTS > 0
    np.testing.assert_allclose(found[present], expected[present], rtol=1e-12)


def test_writing_over_a_cache_is_full_passes():
    """Greedy, and the searches that reduce to it: each prompt by itself and without a cache, token after token."""
    prompts = np.array([[7, 8, 9, 10, 11], [12, 6, 0, 0, 0], [9, 9, 13, 0, 0]])
    segments = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 2, 2, 0, 0]])
    steps = 5
    with jax.enable_x64(True):
        model = made(tied=False, vocab_multiple=8)
        given = Prompts(jnp.asarray(prompts), jnp.asarray(segments))
        stop, keys = Stop(length=steps, pad=0), jax.random.split(jax.random.key(0), 3)
        strategies = [Greedy(), Beam(beams=1, penalty=0.0), Contrastive(alpha=0.0, candidates=3)]
        graph, state = nnx.split(unrolled(model))
        write = lambda state, strategy: generate(decoder_of(nnx.merge(graph, state)), given, strategy, stop, keys)
        found = [jax.device_get(jax.jit(write, static_argnums=1)(state, strategy)) for strategy in strategies]
        for row, own in enumerate([prompts[0], prompts[1][:2], prompts[2][1:3]]):
            written = [model.start]
            where = {"segments": jnp.ones((1, len(own)), int), "positions": jnp.arange(len(own))[None]}
            for t in range(steps):
                there = {"target_segments": jnp.ones((1, t + 1), int), "target_positions": jnp.arange(t + 1)[None]}
                out = model(jnp.asarray(own[None]), targets=jnp.asarray([written]), **where, **there)
                written.append(int(model.scores(out.hidden[0, -1]).logits().argmax()))
            for one in found:
                np.testing.assert_array_equal(one.tokens[row], written[1:])
    assert len(np.unique(found[0].tokens)) > 3


def test_the_best_of_all_sequences_is_what_a_wide_beam_finds():
    """Sixty-four hypotheses over a row's own memory, carried through the cache, against each sequence scored whole."""
    small = type(VOCABULARY)(size=8, pad=0, bos=1, eos=2, mask=3, cls=4, sep=5)
    sizes = {"width": D, "layers": 1, "decoder_layers": 2, "heads": 2, "head_width": 3, "hidden": 12, "buckets": 8}
    with jax.enable_x64(True):
        trunk = partial(Trunk, dtype="float64", vocab_multiple=8)
        model = filled(t5(small, **sizes, longest=8, trunk=trunk, rngs=nnx.Rngs(0)))
        prompts = jnp.asarray([[6, 7, 3], [7, 0, 0]])
        given = Prompts(prompts, jnp.asarray([[1, 1, 1], [1, 0, 0]]))
        keys = jax.random.split(jax.random.key(0), 2)
        beam = Beam(beams=64, penalty=0.0)
        found = jax.jit(lambda: generate(decoder_of(model), given, beam, Stop(length=3, pad=0), keys))()
        every = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), -1).reshape(-1, 3)
        targets = np.concatenate([np.full((len(every), 1), model.start), every[:, :2]], 1)
        many = lambda x: jnp.asarray(np.tile(x, (len(every), 1)))
        for row, size in enumerate((3, 1)):
            out = model(
                many(prompts[row, :size]), segments=many(np.ones(size, int)), positions=many(np.arange(size)),
                targets=jnp.asarray(targets), target_segments=many(np.ones(3, int)), target_positions=many(np.arange(3)),
            )  # fmt: skip
            log = jax.nn.log_softmax(model.scores(out.hidden).logits())
            total = np.asarray(jnp.take_along_axis(log, jnp.asarray(every)[..., None], -1)[..., 0].sum(1))
            np.testing.assert_array_equal(found.tokens[row], every[total.argmax()])
            np.testing.assert_allclose(found.log_probability[row].sum(), total.max(), rtol=1e-9)
