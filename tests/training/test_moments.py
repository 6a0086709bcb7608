"""Moments in bfloat16: which leaves, that rounding keeps means, and that a resume is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import assert_same_end, devices, killed_after, record, tiny

from partitioning import UserError
from training import Adafactor, AdamW, Conda, Fira, GaLore, Groups, Lamb, Lion, Muon, Sgd, Stage
from training.moments import rounded

PARAMS = {"a/kernel": jnp.ones((2, 8, 12)), "norm/scale": jnp.ones((12,))}
AXES = {"a/kernel": ("layers", "embed", "mlp"), "norm/scale": ("embed",)}
KINDS = {
    "AdamW": (AdamW, {}, 2, 2),
    "Lamb": (Lamb, {}, 2, 2),
    "Sgd": (Sgd, {"momentum": 0.9}, 1, 1),
    "Lion": (Lion, {}, 1, 1),
    "Muon": (Muon, {}, 1, 2),
    "Conda": (Conda, {}, 2, 2),
    "GaLore": (GaLore, {"rank": 3}, 2, 2),
    "Fira": (Fira, {"rank": 3}, 2, 2),
    "Adafactor": (Adafactor, {"smallest": 2, "momentum": 0.9}, 4, 4),
}


@pytest.mark.parametrize("name", KINDS)
def test_moments_are_kept_short_and_nothing_else_is(name):
    """So many running means of a matrix, and of a vector, in bfloat16; bases, coefficients and parameters stay."""
    kind, options, matrix, vector = KINDS[name]
    tx = kind(learning_rate=0.1, moments="bfloat16", **options)(AXES)
    plain = kind(learning_rate=0.1, **options)(AXES)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    expected, other = plain.update(PARAMS, plain.init(PARAMS), PARAMS)
    dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert dtypes(jax.eval_shape(tx.init, PARAMS)) == dtypes(state)
    assert dtypes(state).count(jnp.bfloat16) == matrix + vector
    assert jnp.bfloat16 not in dtypes(other)
    # The first update reads no moment of before.
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_rounding_is_to_a_neighbour_and_keeps_the_mean():
    """Over many steps the share that goes up is the distance from below; what fits stays; signs and infinities too."""
    below = jnp.float32(1.5)
    step_up = 2.0**-7
    for part in (0.0, 0.25, 0.7):
        x = below + part * step_up
        many, mirrored = (
            jax.vmap(lambda step, x=x: rounded(x, step))(jnp.arange(20_000)).astype(jnp.float32) for x in (x, -x)
        )
        assert set(np.unique(many)) <= {1.5, 1.5 + step_up}
        assert set(np.unique(mirrored)) <= {-1.5, -1.5 - step_up}
        assert float((many - below).mean() / step_up) == pytest.approx(part, abs=0.02)
        assert float((-mirrored - below).mean() / step_up) == pytest.approx(part, abs=0.02)
    odd = jnp.array([0.0, jnp.inf, -jnp.inf, jnp.nan, 3.0])
    np.testing.assert_array_equal(rounded(odd, jnp.int32(5)).astype(jnp.float32), odd)


def test_a_slow_mean_still_moves():
    """v <- 0.999 v + 0.001 g^2 follows the same in float32; rounded to the nearest it would stay where it is."""
    squares = jax.random.uniform(jax.random.key(0), (1500, 512), maxval=0.4)

    def mean(store):
        follow = lambda v, square: (store(0.999 * v.astype(jnp.float32) + 0.001 * square[1:], square[0]), None)
        numbered = jnp.concatenate([jnp.arange(1500.0)[:, None], squares], axis=1)
        return jax.lax.scan(follow, store(jnp.ones(512), 0.0), numbered)[0].astype(jnp.float32).mean()

    exact = mean(lambda v, _: v)
    assert float(mean(lambda v, _: v.astype(jnp.bfloat16))) > 0.99
    assert float(mean(lambda v, step: rounded(v, jnp.int32(step)))) == pytest.approx(float(exact), rel=0.01)
    assert float(exact) < 0.4


def test_a_stack_is_rounded_as_its_layers():
    """Bit for bit: the draw knows the number and the step, not the place."""
    draw = np.random.default_rng(0)
    gradients = [jnp.asarray(draw.standard_normal((3, 4, 5)), jnp.float32) for _ in range(4)]
    optimizer = AdamW(learning_rate=0.1, moments="bfloat16")
    whole, one = optimizer({"w": ("layers", "embed", "mlp")}), optimizer({"w": ("embed", "mlp")})
    params = {"w": jnp.zeros((3, 4, 5))}
    state, parts = whole.init(params), [one.init({"w": jnp.zeros((4, 5))}) for _ in range(3)]
    for gradient in gradients:
        _, state = whole.update({"w": gradient}, state, params)
        parts = [one.update({"w": gradient[i]}, part, {"w": params["w"][i]})[1] for i, part in enumerate(parts)]
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(state[0].state.nu["w"][i], part[0].state.nu["w"])
        np.testing.assert_array_equal(state[0].state.mu["w"][i], part[0].state.mu["w"])


@pytest.mark.long
def test_resumed_is_never_stopped(tmp_path):
    """Bases, norms, factors and moments in bfloat16, of a scanned model with experts on two devices."""
    same = {"learning_rate": 0.01, "moments": "bfloat16"}
    groups = {
        ".*mixer.*": Conda(every=3, **same),
        ".*(inner|outer|gate).*": Fira(rank=4, every=3, **same),
        ".*": Adafactor(smallest=4, momentum=0.9, **same),
    }
    run = tiny("experts", optimizer=Groups(groups=groups))
    with devices(2):
        run.train(tmp_path / "whole")
        killed_after(2, tmp_path / "whole", tmp_path / "killed")
        run.train(tmp_path / "killed")
    assert_same_end(tmp_path / "whole", tmp_path / "killed", 4)
    leaves = record(tmp_path / "whole", 4)["leaves"]
    kept = {field for name, leaf in leaves.items() for field in name.split("/") if leaf["dtype"] == "bfloat16"}
    assert {"mu", "nu", "v_row", "ema"} <= kept
    assert "basis" not in kept


def test_stages_of_other_precision_are_refused():
    short = AdamW(learning_rate=0.01, moments="bfloat16")
    with devices(1), pytest.raises(UserError, match="states of different structure"):
        tiny("mlm", steps=None, stages=[Stage(steps=2), Stage(steps=2, optimizer=short)]).plan()
