"""FLOPs by the formula, through scans, remat, branches and custom derivatives."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from training.flops import FlopCount, Peak, forward_flops, mfu, peak_flops, training_flops

B, S, D, F, V, LAYERS = 2, 16, 32, 64, 128, 2


def attention(q, k, v, causal):
    scores = jnp.einsum("bqd,bkd->bqk", q, k)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones((S, S), bool)), scores, -1e9)
    return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), v)


@jax.jit
def attention_causal_reference(q, k, v):
    return attention(q, k, v, True)


def layer(x, weights, causal):
    qkv, out, up, down = weights
    q, k, v = jnp.split(x @ qkv, 3, axis=-1)
    mixed = attention_causal_reference(q, k, v) if causal else attention(q, k, v, False)
    x = x + mixed @ out
    return x + jax.nn.gelu(x @ up) @ down


def transformer(weights, head, x, *, causal=False, scanned=True, remat=False):
    def body(x, one):
        return layer(x, one, causal), None

    if remat:
        body = jax.checkpoint(body)
    if scanned:
        x, _ = jax.lax.scan(body, x, weights)
    else:
        for index in range(LAYERS):
            x, _ = body(x, tuple(w[index] for w in weights))
    return x @ head


def arguments():
    shapes = [(D, 3 * D), (D, D), (D, F), (F, D)]
    weights = tuple(jax.ShapeDtypeStruct((LAYERS, *shape), jnp.float32) for shape in shapes)
    return weights, jax.ShapeDtypeStruct((D, V), jnp.float32), jax.ShapeDtypeStruct((B, S, D), jnp.float32)


TOKENS = B * S
ATTENTION = LAYERS * 4 * B * S * S * D
WITHOUT = LAYERS * 2 * TOKENS * (4 * D * D + 2 * D * F) + 2 * TOKENS * D * V


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scanned", [False, True])
def test_a_toy_transformer_by_hand(scanned, remat):
    def run(causal):
        return forward_flops(
            lambda *args: transformer(*args, causal=causal, scanned=scanned, remat=remat), *arguments()
        )

    assert run(False) == FlopCount(WITHOUT + ATTENTION)
    assert run(True) == FlopCount(WITHOUT + ATTENTION / 2)


def test_three_times_forward_is_what_autodiff_does():
    def loss(*args):
        return transformer(*args).sum()

    forward, both = forward_flops(loss, *arguments()), forward_flops(jax.grad(loss, argnums=(0, 1, 2)), *arguments())
    assert training_flops(forward) == both
    recomputed = forward_flops(jax.grad(lambda *args: transformer(*args, remat=True).sum()), *arguments())
    assert recomputed.flops > both.flops


def test_xla_agrees_unrolled_and_counts_a_scanned_body_once():
    def xla(scanned):
        compiled = jax.jit(lambda *args: transformer(*args, scanned=scanned)).lower(*arguments()).compile()
        costs = compiled.cost_analysis()
        assert costs is not None
        return costs["flops"]

    # XLA also counts what is not a product of matrices: softmax, activation, sums.
    assert WITHOUT + ATTENTION < xla(False) < 1.15 * (WITHOUT + ATTENTION)
    assert xla(True) < 0.8 * (WITHOUT + ATTENTION)


def test_branches_loops_and_convolutions():
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    one = 2 * 8**3

    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, x)

    def fixed(x):
        return jax.lax.fori_loop(0, 5, lambda _, y: y @ x, x)

    def by_data(x):
        return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ x, x)

    @jax.custom_vjp
    def custom(x):
        return x @ x

    custom.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x,))

    def convolution(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, (1, 1), "VALID", feature_group_count=2)

    assert forward_flops(branches, x) == FlopCount(2 * one)
    assert forward_flops(fixed, x) == FlopCount(5 * one)
    assert forward_flops(by_data, x) == FlopCount(one, ("by_data",))
    assert forward_flops(custom, x) == FlopCount(one)
    assert forward_flops(jax.vmap(custom), jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)) == FlopCount(3 * one)
    image, kernel = jax.ShapeDtypeStruct((2, 4, 9, 9), jnp.float32), jax.ShapeDtypeStruct((6, 2, 3, 3), jnp.float32)
    assert forward_flops(convolution, image, kernel) == FlopCount(2 * (2 * 6 * 7 * 7) * (2 * 3 * 3))
    rows, experts = jax.ShapeDtypeStruct((10, 8), jnp.float32), jax.ShapeDtypeStruct((3, 8, 4), jnp.float32)
    ragged = forward_flops(jax.lax.ragged_dot, rows, experts, jax.ShapeDtypeStruct((3,), jnp.int32))
    assert ragged == FlopCount(2 * 10 * 8 * 4)
    # Its gradients too: of the rows, by other matrices, and of the matrices, by other rows.
    pulled = jax.grad(lambda *args: jnp.sin(jax.lax.ragged_dot(*args)).sum(), (0, 1))
    assert forward_flops(pulled, rows, experts, jax.ShapeDtypeStruct((3,), jnp.int32)) == 3 * ragged


def test_a_sharded_body_counts_on_every_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    body = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    shapes = jax.ShapeDtypeStruct((16, 4), jnp.float32), jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert forward_flops(body, *shapes) == FlopCount(2 * 16 * 4 * 4)


def test_mfu_prints_its_formula():
    share = mfu(FlopCount(3e12, ("experts",)), 0.5, devices=4, peak=Peak(6e12, "a data sheet"))
    assert share.value == pytest.approx(0.25)
    for words in ("3e+12", "at least", "experts", "0.5 x 4 x 6e+12", "causal attention by half", "a data sheet"):
        assert words in share.formula


def test_peaks_name_their_source():
    class Device:
        device_kind = "TPU v5 lite"

    assert peak_flops(Device()) == Peak(197e12, "TPU v5 lite, dense bfloat16, data sheet")
    assert "measured" in peak_flops().source
    assert peak_flops().flops > 0
