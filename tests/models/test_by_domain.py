"""An expert for each domain: a batch of several is each domain's own model, and experts that are alike are the dense one."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import TRUNK, VOCABULARY, modules, pair_batch, plain_batch, wide
from flax import nnx
from probing import loss_of, split

from models import Attention, Bidirectional, DomainRouter, Experts, FeedForward, Trunk, upcycle
from models.pooling import pool, unit
from models.variables import flatten, replace_values
from objectives import InfoNCE, MaskedLM
from objectives.embedding import embed
from partitioning import UserError, fsdp_tensor

DENSE = partial(FeedForward, hidden=12, gated=True, activation="silu")
ROUTES = jnp.asarray([2, 0, 1, 0, 2, 2, 1, 0], jnp.int32)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(6, VOCABULARY.size, (8, 7)), jnp.int32)
WHERE = {"segments": jnp.ones((8, 7), jnp.int32).at[1, 4:].set(0), "positions": jnp.tile(jnp.arange(7), (8, 1))}


def trunk(forward):
    mixer = partial(Attention, heads=2)
    return Trunk(VOCABULARY, width=8, layers=2, mixer=mixer, feed_forward=forward, dtype="float64", rngs=nnx.Rngs(0))


def sparse(alike=False):
    """Three experts, upcycled; all alike, or each another."""
    made = upcycle(trunk(DENSE), experts=3, top_k=1, router=DomainRouter, rngs=nnx.Rngs(1))
    if not alike:
        draw = np.random.default_rng(1)
        values = {n: x for n, x in flatten(made, nnx.Param).items() if "feed_forward/" in n}
        replace_values(made, {n: x + jnp.asarray(draw.standard_normal(x.shape)) for n, x in values.items()})
    return made


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@nnx.jit
def states(model, routes=None):
    return model(TOKENS, **WHERE, routes=routes).hidden


def test_experts_that_are_alike_are_the_dense_model():
    np.testing.assert_allclose(states(sparse(alike=True), ROUTES), states(trunk(DENSE)), rtol=0, atol=1e-12)


def test_a_batch_of_domains_is_each_domains_model():
    """States of every row, on one device and on eight; each model has its domain's expert as its feed-forward layers."""
    model, each = sparse(), []
    for domain in range(3):
        dense = trunk(DENSE)
        values = flatten(model, nnx.Param)
        named = {n: x[:, domain] if "feed_forward/" in n else x for n, x in values.items()}
        replace_values(dense, named)
        each.append(states(dense))
    expected = np.stack(each)[np.asarray(ROUTES), np.arange(8)]
    assert np.abs(expected - np.asarray(each[0])).max() > 0.1
    found = states(model, ROUTES)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    with fsdp_tensor(2).place().scope():
        np.testing.assert_allclose(nnx.jit(lambda m, r: states(m, r))(model, ROUTES), expected, rtol=0, atol=1e-12)


def test_objectives_give_a_row_its_source():
    """In chunks and at once, loss and gradients are alike; the vectors are those of the routes by hand."""
    model = partial(TRUNK, layers=1, feed_forward=partial(Experts, experts=3, top_k=1, hidden=8, router=DomainRouter))
    batch = jax.tree.map(jnp.asarray, wide(pair_batch(0, 8) | {"source": np.asarray(ROUTES)}))
    found = {}
    for chunked in (None, 2):
        objective = InfoNCE(chunked=chunked)
        models = modules(objective, model)
        states, join = split(models)
        run = jax.jit(jax.value_and_grad(lambda states, o=objective, j=join: loss_of(o, j(states), batch)))
        found[chunked] = run(states)
    np.testing.assert_allclose(found[2][0], found[None][0], rtol=1e-12)
    for one, other in zip(jax.tree.leaves(found[2][1]), jax.tree.leaves(found[None][1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)
    texts = {field: batch[f"query/{field}"] for field in ("tokens", "segments", "positions")}
    hidden = models.module("trunk")(**texts, mask=Bidirectional(), routes=ROUTES).hidden
    vectors = unit(pool(hidden, texts["segments"], "mean"))
    np.testing.assert_allclose(embed(models.trunk, batch, "query", None, "mean"), vectors, atol=1e-12)
    text = jax.tree.map(jnp.asarray, wide(plain_batch(0, 8) | {"source": np.asarray(ROUTES)}))
    masked = loss_of(MaskedLM(), modules(MaskedLM(), model), text)
    assert np.isfinite(masked)


def test_a_domain_without_an_expert_is_no_number():
    found = states(sparse(), ROUTES.at[3].set(3).at[4].set(-1))
    assert np.isnan(found).any((1, 2)).tolist() == [i in (3, 4) for i in range(8)]


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"Experts\.top_k = 2 with DomainRouter: expected 1"):
        trunk(partial(Experts, router=DomainRouter))
    with pytest.raises(UserError, match=r"this call has no routes: train on a data\.Mixture"):
        states(sparse())
