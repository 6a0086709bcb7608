"""Group-relative policy optimisation: samples are the policy's own, and the gradient is REINFORCE's."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import TRUNK, VOCABULARY, even_tokens, modules, prompt_batch
from probing import key_of, leaves, loss_of, put, split

from models import Causal, TiedHead
from models.decoding.sampling import sample
from objectives import GRPO

ROWS, SAMPLES, LONGEST, HEAT = 4, 3, 6, 0.6
# A head that bends the states and has a bias: tempering them would not temper the scores.
MODEL = partial(TRUNK, layers=2, head=partial(TiedHead, transform=True, bias=True))


@pytest.fixture(scope="module")
def policy():
    """Prepared samples, and the gradients of the objective and of its oracle on them, compiled together."""
    with jax.enable_x64(True):
        batch = put(prompt_batch(rows=ROWS))
        objective = GRPO(reward=even_tokens, samples=SAMPLES, length=LONGEST, temperature=HEAT)
        states, models = split(modules(objective, MODEL))

        def fresh(models, prepared):
            """log p of every token given those before it, in one uncached pass over texts without gaps."""
            flat = {k: prepared[f"grpo/{k}"].reshape(ROWS * SAMPLES, -1) for k in ("tokens", "segments")}
            order = jnp.argsort(flat["segments"] == 0, axis=1, stable=True)
            tokens, segments = (jnp.take_along_axis(flat[k], order, axis=1) for k in ("tokens", "segments"))
            places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            out = models.trunk(tokens, segments=segments, positions=places, mask=Causal())
            logs = jax.nn.log_softmax(models.trunk.scores(out.hidden).logits() / HEAT)[:, :-1]
            picked = jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1)[..., 0]
            drawn = jnp.take_along_axis(prepared["grpo/drawn"].reshape(ROWS * SAMPLES, -1), order, axis=1)
            old = jnp.take_along_axis(prepared["grpo/old"].reshape(ROWS * SAMPLES, -1), order, axis=1)
            return picked, drawn, old

        def oracle(states, prepared):
            """REINFORCE: each sample's mean log p times its advantage."""
            picked, drawn, _ = fresh(models(states), prepared)
            each = (picked * drawn[:, 1:]).sum(1) / drawn.sum(1)
            return -(each * prepared["grpo/advantage"].reshape(-1)).mean()

        def run(states):
            prepared = objective.prepare(models(states), batch, step=0, key=key_of(batch))
            level = prepared | {"grpo/advantage": 0 * prepared["grpo/advantage"]}
            call = lambda s, p: objective(models(s), p, step=0, key=key_of(batch)).terms["grpo"]
            loss = lambda p: jax.grad(lambda s: call(s, p).total / call(s, p).weight)(states)
            return (
                prepared,
                fresh(models(states), prepared),
                loss(prepared),
                jax.grad(oracle)(states, prepared),
                loss(level),
            )

        return jax.device_get(jax.jit(run)(states))


def test_advantages_are_rewards_within_their_group(policy):
    """The host's reward of each sample's tokens, less the group's mean, over its deviation."""
    prepared = policy[0]
    drawn, tokens = prepared["grpo/drawn"], prepared["grpo/tokens"]
    reward = even_tokens(tokens.reshape(ROWS * SAMPLES, -1), drawn.reshape(ROWS * SAMPLES, -1)).reshape(ROWS, SAMPLES)
    np.testing.assert_allclose(prepared["grpo/reward"], reward, rtol=1e-6)
    expected = (reward - reward.mean(1, keepdims=True)) / (reward.std(1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(prepared["grpo/advantage"], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.5


def test_log_probabilities_are_those_of_a_fresh_forward_pass(policy):
    """What the cached sampler noted is what the policy gives its own samples; samples end with the end token."""
    prepared, (picked, drawn, old) = policy[:2]
    np.testing.assert_allclose(old[:, 1:] * drawn[:, 1:], picked * drawn[:, 1:], atol=1e-10)
    assert 1 < drawn.sum(1).max() <= LONGEST
    tokens, drawn = (prepared[f"grpo/{k}"].reshape(ROWS * SAMPLES, -1) for k in ("tokens", "drawn"))
    for row, seen in zip(tokens, drawn > 0, strict=True):
        assert VOCABULARY.eos not in row[seen][:-1]
        assert seen.sum() == LONGEST or row[seen][-1] == VOCABULARY.eos
    assert len({tuple(row) for row in tokens}) > ROWS


def test_the_gradient_is_that_of_reinforce(policy):
    """At a ratio of 1 nothing is clipped."""
    ours, oracle = leaves(policy[2]), leaves(policy[3])
    assert max(np.abs(g).max() for g in oracle.values()) > 1e-3
    for name, g in oracle.items():
        np.testing.assert_allclose(ours[name], g, atol=1e-9, err_msg=name)


def test_no_advantage_no_gradient(policy):
    """Exactly."""
    assert all((g == 0).all() for g in leaves(policy[4]).values())


def test_samples_follow_the_distribution_they_are_drawn_from():
    """A first token's frequencies over many keys are the policy's probabilities; temperature 0 takes the best."""
    with jax.enable_x64(True):
        models = modules(GRPO(reward=even_tokens), partial(MODEL, layers=1))
        rows = 3000
        tokens, segments = jnp.full((rows, 2), 9), jnp.ones((rows, 2), jnp.int32)

        @jax.jit
        def run():
            keys = jax.random.split(jax.random.key(0), rows)
            out = models.trunk(
                tokens[:1], segments=segments[:1], positions=jnp.asarray([[0, 1]]), mask=Causal()
            ).hidden[:, -1]
            hot = sample(models.trunk, tokens, segments, length=1, keys=keys, temperature=HEAT).tokens[:, -1]
            best = sample(models.trunk, tokens[:2], segments[:2], length=1, keys=keys[:2], temperature=0.0).tokens
            return models.trunk.scores(out).logits()[0], hot, best[:, -1]

        logits, hot, best = map(np.asarray, run())
    assert (best == logits.argmax()).all()
    wanted = np.exp(logits / HEAT) / np.exp(logits / HEAT).sum()
    got = np.bincount(hot, minlength=len(wanted)) / rows
    assert (np.abs(got - wanted) < 5 * np.sqrt(wanted / rows) + 1e-3).all()


def test_the_loss_is_one_number(policy):
    """And accumulates like any other (see test_contract)."""
    with jax.enable_x64(True):
        batch = put(prompt_batch(rows=ROWS))
        objective = GRPO(reward=lambda tokens, mask: np.ones(len(tokens)), samples=2, length=2)
        assert abs(float(jax.jit(lambda: loss_of(objective, modules(objective, MODEL), batch))())) < 1e-9
