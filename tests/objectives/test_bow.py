"""The bag of words: against loops over documents in float64, and what a trained state names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from awkward import TRUNK, VOCABULARY, modules, plain_batch
from probing import key_of, leaves, loss_of, put, split

from models.masks import Bidirectional
from objectives import BagOfWords, MaskedLM
from objectives.bow import bags, starts


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def documents(batch):
    """(row, slots) of every document."""
    for row, segments in enumerate(np.asarray(batch["segments"])):
        for segment in range(1, segments.max() + 1):
            yield row, np.flatnonzero(segments == segment)


def bag(batch, row, slots):
    """Its distinct ordinary tokens."""
    return sorted(set(np.asarray(batch["tokens"])[row, slots].tolist()) - set(VOCABULARY.specials))


@pytest.mark.parametrize("most", [8, 2])
def test_it_is_masks_plus_one_mean_over_documents(most):
    """Loss and gradient, next to a loop over the documents; those behind the first `most` of a row are not asked."""
    batch = put(plain_batch(rows=12))
    objective, masks = BagOfWords(most=most), MaskedLM()
    states, whole = split(modules(objective))
    asked = [(row, slots) for row, slots in documents(batch) if batch["segments"][row, slots[0]] <= most]
    assert len(asked) < len(list(documents(batch))) or most == 8

    def by_document(states):
        models = whole(states)
        _, seen = objective.hide(batch, models.trunk, step=0, key=key_of(batch))
        where = {name: batch[name] for name in ("segments", "positions")}
        out = models.trunk(seen, **where, mask=Bidirectional(), keys=key_of(batch)("dropout"))
        share = jax.nn.log_softmax(models.trunk.scores(out.hidden).logits(), axis=-1)
        return -sum(share[row, slots[0]][jnp.asarray(bag(batch, row, slots))].mean() for row, slots in asked) / len(
            asked
        )

    value, gradient = jax.jit(jax.value_and_grad(lambda s: loss_of(objective, whole(s), batch)))(states)
    parts = [jax.jit(jax.value_and_grad(f)) for f in (lambda s: loss_of(masks, whole(s), batch), by_document)]
    (mlm, g), (bow, h) = (part(states) for part in parts)
    np.testing.assert_allclose(value, mlm + bow, rtol=1e-12)
    expected = leaves(jax.tree.map(jnp.add, g, h))
    for name, found in leaves(gradient).items():
        np.testing.assert_allclose(found, expected[name], atol=1e-11, err_msg=name)


def test_a_bag_has_a_documents_ordinary_tokens_and_no_others():
    """Padding, special tokens and the neighbours in a row are in no bag, and a document of none weighs nothing."""
    batch = plain_batch(rows=12)
    alone = np.flatnonzero(batch["segments"][3] == 1)
    batch["tokens"][3, alone] = VOCABULARY.bos
    text = [jnp.asarray(batch[name]) for name in ("tokens", "segments", "positions")]
    found = np.asarray(bags(*text, VOCABULARY, 8))
    expected = np.zeros_like(found)
    for row, slots in documents(batch):
        expected[row, batch["segments"][row, slots[0]] - 1, bag(batch, row, slots)] = True
    np.testing.assert_array_equal(found, expected)

    loss = BagOfWords()(modules(BagOfWords()), put(batch), step=0, key=key_of(batch))
    assert loss.terms["bow"].weight == found.any(-1).sum() == len(list(documents(batch))) - 1
    assert loss.terms["asked"].total == loss.terms["asked"].weight == len(list(documents(batch)))


def test_documents_behind_the_last_place_are_told():
    """The share of documents that are asked is a metric."""
    batch = put(plain_batch(rows=12))
    first = starts(batch["segments"], batch["positions"], 1)
    assert (first.positions == 0).all()
    asked = BagOfWords(most=1)(modules(BagOfWords()), batch, step=0, key=key_of(batch)).terms["asked"]
    assert asked.total == 12
    assert asked.weight == len(list(documents(batch))) > 12


def test_it_adds_no_parameter():
    """What names the words is the head that fills masks."""
    assert BagOfWords().companions(None, None) == {}


def test_trained_states_name_their_documents_tokens():
    """After some steps on a batch most of the |W| highest scores of a document are the tokens that it has."""
    batch = put(plain_batch(rows=12))
    objective = BagOfWords()
    states, whole = split(modules(objective, TRUNK))
    text = [batch[name] for name in ("tokens", "segments", "positions")]
    there = bags(*text, VOCABULARY, 8)
    size = there.sum(-1, keepdims=True)
    first = starts(batch["segments"], batch["positions"], 8)

    def coverage(states):
        trunk = whole(states).trunk
        out = trunk(batch["tokens"], segments=batch["segments"], positions=batch["positions"], mask=Bidirectional())
        logits = trunk.scores(first.gather(out.hidden)).logits()
        rank = jnp.argsort(jnp.argsort(-logits, axis=-1), axis=-1)
        return ((rank < size) & there).sum() / size.sum()

    rule = optax.adam(0.02)

    @jax.jit
    def train(states):
        def step(carry, index):
            states, moments = carry
            gradient = jax.grad(lambda s: loss_of(objective, whole(s), batch, index))(states)
            change, moments = rule.update(gradient, moments)
            return (optax.apply_updates(states, change), moments), None

        return jax.lax.scan(step, (states, rule.init(states)), jnp.arange(300))[0][0]

    before, after = coverage(states), coverage(train(states))
    assert before < 0.5
    assert after > 0.9
