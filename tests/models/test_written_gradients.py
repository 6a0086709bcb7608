"""Derivatives written by hand equal those of the chain rule over the plain formula, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm as normal

from models.backends.xla import masked_softmax
from models.feed_forward import gelu
from models.linear import FEW, linear, side_by_side
from models.norms import standardised, unit_mean_square

EPS = 1e-3
SEEN = np.array([[1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool)[None, None]


def softmax(scores):
    return jnp.where(
        SEEN, jnp.exp(scores) / jnp.maximum(jnp.where(SEEN, jnp.exp(scores), 0).sum(-1, keepdims=True), 1e-30), 0
    )


def plain_norm(x):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + EPS)


PAIRS = {
    "gelu": (gelu, lambda x: x * normal.cdf(x)),
    "masked_softmax": (lambda x: masked_softmax(x, SEEN), softmax),
    "unit_mean_square": (lambda x: unit_mean_square(x, EPS), plain_norm),
    "standardised": (lambda x: standardised(x, EPS), lambda x: plain_norm(x - x.mean(-1, keepdims=True))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equal_to_the_chain_rule(name):
    ours, plain = PAIRS[name]
    draw = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, t = (jnp.asarray(draw.standard_normal((2, 1, 3, 6)) * 2) for _ in range(2))
        np.testing.assert_allclose(*(jax.jvp(f, (x,), (t,)) for f in (ours, plain)), rtol=1e-10, atol=1e-12)
        pulled = [jax.vjp(f, x)[1](t)[0] for f in (ours, plain)]
        np.testing.assert_allclose(*pulled, rtol=1e-10, atol=1e-12)
        twice = [jax.grad(lambda x, f=f: (jax.grad(lambda x: (f(x) * t).sum())(x) * t).sum())(x) for f in (ours, plain)]
        np.testing.assert_allclose(*twice, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_linear_is_a_tensor_product(shape):
    draw = np.random.default_rng(0)
    x, w = draw.standard_normal(shape).astype(np.float32), draw.standard_normal((5, 2, 7)).astype(np.float32)
    np.testing.assert_allclose(linear(x, w), np.tensordot(x, w, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("states", [1, 2, FEW, FEW + 1])
def test_products_side_by_side_are_those_one_by_one(states):
    """Also of so few states that they stay apart."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((1, states, 5)), jnp.float32)
    kernels = [jnp.asarray(draw.standard_normal((5, *inner)), jnp.float32) for inner in ((2, 3), (4,), (1, 2))]
    together = str(jax.make_jaxpr(lambda x: side_by_side(x, kernels))(x)).count("dot_general") == 1
    assert together == (states in (1, FEW + 1))
    for found, kernel in zip(side_by_side(x, kernels), kernels, strict=True):
        np.testing.assert_allclose(found, np.tensordot(x, kernel, 1), rtol=1e-5, atol=1e-5)
