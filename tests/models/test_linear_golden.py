"""Gated linear attention beside fla's and `transformers`' own functions, by what they gave once (make_linear_golden.py)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_linear_golden import GOLDEN, inputs, pulls

from models.linear_attention.apply import CHUNKED, RECURRENT

with np.load(GOLDEN) as file:
    FOUND = {name: file[name] for name in file.files}
CASES = sorted({name.split("/")[0] for name in FOUND})


@pytest.mark.parametrize("forms", [CHUNKED, RECURRENT], ids=["chunks", "tokens"])
@pytest.mark.parametrize("case", CASES)
def test_theirs(case, forms):
    """Outputs and last state within 1e-5 of the largest entry, every gradient within 1e-4."""
    form = case.split(",")[0]
    given = inputs(form)
    one, other = pulls()
    names = [name for name in ("q", "k", "v", "rate", "log_decay") if name in given]

    def total(given):
        q, *rest = (jnp.asarray(given[name]) for name in names)
        resets = jnp.zeros(q.shape[:2], bool)
        out, last = forms[form](q * q.shape[-1] ** -0.5, *rest, resets, given["state"])
        return (out * one).sum() + (last * other).sum(), {"out": out, "last": last}

    slopes, values = jax.jit(jax.grad(total, has_aux=True))(given)
    for name, value in (values | slopes).items():
        theirs = FOUND[f"{case}/{name}"]
        within = (1e-5 if name in values else 1e-4) * np.abs(theirs).max()
        np.testing.assert_allclose(value, theirs, rtol=0, atol=within, err_msg=name)
