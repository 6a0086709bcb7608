"""Each objective against something known: a short numpy version, a reduction, an exact likelihood."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import (
    LENGTH,
    TRUNK,
    UNROTATED,
    VOCABULARY,
    modules,
    pair_batch,
    plain_batch,
    preference_batch,
)
from probing import Lookup, distinct, key_of, leaves, loss_of, put, soft, split, table

from models import Matrix, Output, Scores, Vocabulary
from objectives import (
    DPO,
    CausalLM,
    Electra,
    GPTBert,
    InfoNCE,
    MaskedDiffusion,
    Models,
    RandomTokens,
    RetroMAE,
)

ROWS = 8


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("chunked", [None, 2, 8])
def test_info_nce_is_ten_lines_of_numpy(chunked):
    """Loss and gradient, whole and in chunks."""
    batch, rows = distinct(put(pair_batch(rows=ROWS))), table()
    objective = InfoNCE(temperature=0.3, pooling="first", chunked=chunked)
    value, gradient = jax.value_and_grad(lambda t: loss_of(objective, Models({"trunk": Lookup(t)}), batch))(rows)

    q, p = (np.asarray(batch[f"{name}/tokens"][:, 0]) for name in ("query", "positive"))
    x, y = np.asarray(rows)[q], np.asarray(rows)[p]
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    share = soft(a @ b.T / 0.3)
    loss = -np.log(np.diag(share)).mean()
    push = (share - np.eye(ROWS)) / 0.3 / ROWS
    back = lambda v, u, d: (d - u * (u * d).sum(1, keepdims=True)) / np.linalg.norm(v, axis=1, keepdims=True)
    expected = np.zeros_like(rows)
    np.add.at(expected, q, back(x, a, push @ b))
    np.add.at(expected, p, back(y, b, push.T @ a))
    np.testing.assert_allclose(value, loss, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_at_the_reference_is_log_two(smoothing):
    """Whatever the batch; and its gradient is beta / 2 times that of the margin of log-probabilities, smoothing apart."""
    batch, rows, out = put(preference_batch(rows=ROWS)), table(), table(1)
    objective = DPO(beta=0.7, smoothing=smoothing)
    same = lambda t: Models({"trunk": Lookup(t, out), "reference": Lookup(rows, out)})
    value, gradient = jax.value_and_grad(lambda t: loss_of(objective, same(t), batch))(rows)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-12)

    def margin(t):
        total = 0.0
        for sign, name in ((1, "chosen"), (-1, "rejected")):
            logs = jax.nn.log_softmax(t[batch[f"{name}/tokens"]] @ out.T)
            picked = jnp.take_along_axis(logs[:, :-1], batch[f"{name}/tokens"][:, 1:, None], axis=-1)[..., 0]
            total += sign * (picked * batch[f"{name}/loss_mask"][:, 1:]).sum() / ROWS
        return total

    np.testing.assert_allclose(gradient, -0.7 * (0.5 - smoothing) * jax.grad(margin)(rows), atol=1e-12)


def test_electra_never_teaches_the_generator_what_the_discriminator_finds():
    """The detection term's gradient in the generator is exactly 0; the embeddings, shared, have both terms'."""
    objective = Electra(generator=partial(TRUNK, width=8, layers=1, dtype="float64"), select=RandomTokens(rate=0.4))
    batch = put(plain_batch(rows=ROWS))
    states, models = split(modules(objective, partial(TRUNK, layers=2)))

    def terms(states):
        loss = objective(models(states), batch, step=0, key=key_of(batch))
        return {name: loss.terms[name].total for name in ("mlm", "rtd")}

    found = {name: leaves(value) for name, value in jax.jit(jax.jacrev(terms))(states).items()}
    moved = {term: {name for name, g in of.items() if np.abs(g).max() > 0} for term, of in found.items()}
    trees = lambda names: {name.split("/")[0] for name in names}
    assert trees(moved["rtd"]) == {"trunk", "discriminator"}
    assert trees(moved["mlm"]) == {"trunk", "generator"}
    assert {name for name in moved["mlm"] if name.startswith("trunk")} == {"trunk/table"}
    assert "trunk/table" in moved["rtd"]
    assert len(trees(found["mlm"])) == 3


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_gpt_bert_is_its_modes_at_either_end(ratio):
    """Causal language modelling at 0; at 1, masked tokens predicted one place to the left."""
    batch = put(plain_batch(rows=ROWS))
    objective = GPTBert(ratio=ratio, select=RandomTokens(rate=0.4))
    states, models = split(modules(objective, partial(TRUNK, layers=2)))

    def masked(models):
        hide = objective.select(batch, VOCABULARY, step=0, key=key_of(batch))
        seen = objective.replace(batch["tokens"], hide, VOCABULARY, key=key_of(batch))
        hidden = models.trunk(seen, segments=batch["segments"], positions=batch["positions"]).hidden
        logs = jax.nn.log_softmax(models.trunk.scores(hidden).logits())[:, :-1]
        picked = jnp.take_along_axis(logs, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        weight = (hide.hidden(LENGTH) & (batch["positions"] > 0))[:, 1:]
        return -(picked * weight).sum() / weight.sum()

    known = masked if ratio else lambda models: loss_of(CausalLM(), models, batch)
    both = jax.jit(
        lambda states: (
            jax.value_and_grad(lambda s: loss_of(objective, models(s), batch))(states),
            jax.value_and_grad(lambda s: known(models(s)))(states),
        )
    )
    (value, gradient), (expected, other) = both(states)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for name, g in leaves(other).items():
        np.testing.assert_allclose(leaves(gradient)[name], g, atol=1e-11, err_msg=name)


def test_retromae_shows_its_decoder_the_first_place_and_a_share_of_the_others():
    """Visible are the document's first place, never the token itself, and others with probability 1 - unseen."""
    batch = put(plain_batch(rows=64))
    objective = RetroMAE(decoder=UNROTATED, longest=LENGTH, unseen=0.3)
    asked = {}

    def decoder(state, embeddings, positions, *, mask, **call):
        asked.update(mask=np.asarray(mask.visible), state=np.asarray(state))
        return Output(state)

    rows = table()
    trunk = Lookup(rows)
    trunk.embed = lambda tokens, positions, *, segments: rows[tokens]
    objective(Models({"trunk": trunk, "decoder": decoder}), batch, step=0, key=key_of(batch))
    visible, positions = asked["mask"], np.asarray(batch["positions"])
    first = np.broadcast_to(positions[:, None, :] == 0, visible.shape)
    own = np.broadcast_to(np.eye(LENGTH, dtype=bool), visible.shape)
    assert visible[first].all()
    assert not visible[own & ~first].any()
    rest = visible[~own & ~first]
    assert rest.mean() == pytest.approx(0.7, abs=4 * np.sqrt(0.21 / rest.size))
    # Each document has the state of its own first token.
    starts = np.arange(LENGTH) - positions
    np.testing.assert_array_equal(
        asked["state"], np.take_along_axis(hidden_of(objective, batch, rows), starts[..., None], 1)
    )


def hidden_of(objective, batch, rows):
    """What the look-up encoder gave for the corrupted tokens."""
    hide = objective.select(batch, VOCABULARY, step=0, key=key_of(batch))
    return np.asarray(rows[objective.replace(batch["tokens"], hide, VOCABULARY, key=key_of(batch))])


def test_retromae_rebuilds_a_token_without_having_seen_it():
    """Exact influence through the bottleneck: query t is moved by the visible tokens' embeddings only."""
    objective = RetroMAE(decoder=UNROTATED, longest=LENGTH)
    decoder = modules(replace(objective, decoder=partial(UNROTATED, dtype="float64"))).module("decoder")
    draw = np.random.default_rng(0)
    visible = draw.random((1, LENGTH, LENGTH)) < 0.5
    visible[:, np.arange(LENGTH), np.arange(LENGTH)] = False
    visible[:, :, 0] = True
    where = {"positions": jnp.arange(LENGTH)[None], "segments": jnp.ones((1, LENGTH), jnp.int32)}
    state, words = jnp.asarray(draw.standard_normal((2, 1, LENGTH, 16)))

    def run(words):
        return decoder(state, words, mask=Matrix(jnp.asarray(visible)), **where).hidden[0]

    tangents = jnp.eye(LENGTH)[:, None, :, None] * jnp.asarray(draw.standard_normal((1, 1, LENGTH, 16)))
    moved = jax.jit(jax.vmap(lambda t: jax.jvp(run, (words,), (t,))[1]))(tangents)
    expected = visible[0] & (np.arange(LENGTH) > 0)
    np.testing.assert_array_equal(np.abs(np.asarray(moved)).max(-1).T != 0, expected)


TOY = Vocabulary(size=9, pad=0, bos=1, eos=2, mask=3, cls=4, sep=5)
SEQUENCES = np.array(list(itertools.product(range(6, 9), repeat=3)), np.int32)
COPIES = 4096


class Conditionals:
    """A network that knows a distribution over three tokens: log p(x_i | what is not masked), as scores."""

    vocabulary = TOY

    def __init__(self, probability):
        self.probability = jnp.asarray(probability)

    def __call__(self, tokens, *, segments, positions, mask=None, keys=None):
        fits = ((tokens[:, None] == TOY.mask) | (tokens[:, None] == SEQUENCES)).all(-1)
        weight = fits * self.probability
        is_token = jnp.asarray(SEQUENCES[:, :, None] == np.arange(TOY.size))
        joint = jnp.einsum("bn,nsv->bsv", weight, is_token.astype(weight.dtype))
        return Output(jnp.log(jnp.maximum(joint / weight.sum(1)[:, None, None], 1e-30)))

    def scores(self, hidden):
        return Scores(hidden, jnp.eye(TOY.size), None, TOY.size)


def toy_batch(copies):
    """Every sequence equally often, at every time."""
    tokens = jnp.asarray(np.tile(SEQUENCES, (copies, 1)))
    return {
        "tokens": tokens,
        "segments": jnp.ones(tokens.shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(3), tokens.shape),
        "row": jnp.arange(len(tokens)),
    }


def bounds(network):
    """For each sequence the mean of the bound in nats, and its standard error."""
    batch = toy_batch(COPIES)
    objective = MaskedDiffusion(least=1e-5)
    loss = jax.jit(lambda: objective(Models({"trunk": network}), batch, step=0, key=key_of(batch)).terms["bound"])()
    each = np.asarray(loss.rows[0]).reshape(COPIES, len(SEQUENCES))
    np.testing.assert_allclose(loss.total / loss.weight, each.sum() / batch["tokens"].size, rtol=1e-9)
    return each.mean(0), each.std(0) / np.sqrt(COPIES)


def test_the_diffusion_bound_encloses_the_exact_likelihood():
    """With the exact conditionals it is the likelihood; with any others it lies above."""
    draw = np.random.default_rng(0)
    exact = draw.dirichlet(np.full(len(SEQUENCES), 2.0))
    mean, error = bounds(Conditionals(exact))
    surprise = -np.log(exact)
    assert (np.abs(mean - surprise) < 5 * error).all()
    assert abs(exact @ mean - exact @ surprise) < 0.05
    other = draw.dirichlet(np.full(len(SEQUENCES), 2.0))
    mean, error = bounds(Conditionals(other))
    assert exact @ mean > exact @ surprise + 5 * np.sqrt(exact**2 @ error**2)
    # A distribution's own conditionals are consistent: the bound is then its own likelihood, larger by the divergence.
    assert exact @ mean == pytest.approx(-exact @ np.log(other), abs=0.1)


def test_diffusion_times_are_antithetic():
    """One draw a step: the rows' times are evenly spaced, and differ between steps."""
    network, least = Conditionals(np.full(len(SEQUENCES), 1 / 27)), 0.2
    batch = toy_batch(8)
    rows = len(batch["row"])
    found = []
    for step in (0, 1):
        seen = {}
        network.scores = lambda hidden: Scores(hidden * 0, jnp.eye(TOY.size), None, TOY.size)
        term = MaskedDiffusion(least=least)(
            Models({"trunk": Spy(network, seen)}), batch, step=step, key=key_of(batch, step)
        ).terms["bound"]
        masked = (np.asarray(seen["tokens"]) == TOY.mask).sum(1)
        # Every prediction costs log 8: eight tokens, the mask never among them.
        time = masked * np.log(8) / np.where(masked, np.asarray(term.rows[0]), np.nan)
        start = np.mod((time - least) / (1 - least) - np.arange(rows) / rows, 1.0)
        start = start[~np.isnan(start)]
        assert np.minimum(np.ptp(start), 1 - np.ptp(start)) < 1e-6
        found.append(start[0])
    assert abs(found[0] - found[1]) > 1e-3


class Spy:
    """A network that notes what it was asked."""

    vocabulary = TOY

    def __init__(self, network, seen):
        self._network, self._seen = network, seen

    def __call__(self, tokens, **call):
        self._seen["tokens"] = tokens
        return self._network(tokens, **call)

    def scores(self, hidden):
        return self._network.scores(hidden)
