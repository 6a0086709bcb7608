"""Every optimizer treats a stack as the layers and experts it holds; and each equals its reference."""

import importlib
import inspect
import pkgutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import training
from partitioning.errors import UserError
from training.adafactor import Adafactor
from training.lion import Lion
from training.matrices import MatrixDescent, matrix_axes
from training.muon import Muon
from training.optimizers import AdamW, Descent, Groups, Lamb, Optimizer, Sgd
from training.per_layer import per_layer, state_axes
from training.plan import rate_tables

for module in pkgutil.iter_modules(training.__path__):
    importlib.import_module(f"training.{module.name}")

L, E = 2, 2
# One layer's leaves: (shape, axes). `down` is stacked in the middle, `experts` twice.
LAYER = {
    "attention/query/kernel": ((6, 2, 4), ("embed", "heads", "kv")),
    "attention/out/kernel": ((2, 4, 6), ("heads", "kv", "embed")),
    "attention/query/bias": ((2, 4), ("heads", "kv")),
    "mlp/up/kernel": ((6, 10), ("embed", "mlp")),
    "mlp/up/bias": ((10,), ("mlp",)),
    "attention/gate": ((2,), ("heads",)),
    "norm/scale": ((6,), ("embed",)),
}
MIDDLE = {"mlp/down/kernel": ((10, 6), ("mlp", "embed"))}
EXPERTS = {"experts/up/kernel": ((6, 5), ("embed", "mlp")), "experts/up/bias": ((5,), ("mlp",))}
OTHER = {"embed/tokens/table": ((12, 6), ("vocab", "embed")), "final_norm/scale": ((6,), ("embed",))}


def concrete(root: type) -> list[type]:
    """All subclasses of `root` that can be built, and `root` if it can."""
    children: list[type] = root.__subclasses__()
    below = [found for child in children for found in concrete(child)]
    return below if inspect.isabstract(root) else [root, *below]


# What makes a class do on leaves this small what it does on large ones.
SMALL: dict[str, dict] = {
    "Adafactor": {"smallest": 2, "momentum": 0.5},
    "Conda": {"every": 2},
    "GaLore": {"rank": 2, "every": 2},
    "Fira": {"rank": 2, "every": 2},
}


def example(kind: type[Optimizer]) -> Optimizer:
    """An instance of any optimizer: a new one that needs more than a rate is added here."""
    # Exact in float32, as optax computes it: of other values the compiler may round a product and sum once or twice.
    schedule = optax.linear_schedule(0.0625, 0.03125, 4)
    if issubclass(kind, Groups):
        groups = {
            ".*attention.*": Lamb(learning_rate=schedule, weight_decay=0.1),
            ".*(experts|mlp).*": Muon(learning_rate=0.01),
            ".*": AdamW(learning_rate=0.02, weight_decay=0.1),
        }
        return Groups(groups=groups)
    assert issubclass(kind, Descent)
    rules = {"decay": ((".*final_norm.*", 0.5),), "scale": ((".*attention/query.*", 0.3), (".*experts.*", 2.0))}
    return kind(learning_rate=schedule, weight_decay=0.1, **rules, **SMALL.get(kind.__name__, {}))


def separate_leaves(seed, dtype=np.float32):
    """Flat dicts of one leaf for each layer and expert, and their axes; layers differ in size by powers of ten."""
    params, axes = {}, {}
    draw = np.random.default_rng(seed)

    def add(name, shape, names, size=1.0):
        params[name] = (size * draw.standard_normal(shape)).astype(dtype)
        axes[name] = names

    for layer in range(L):
        size = 10.0**-layer
        for name, (shape, names) in (LAYER | MIDDLE).items():
            add(f"trunk/layers/{layer}/{name}", shape, names, size)
        for expert in range(E):
            for name, (shape, names) in EXPERTS.items():
                add(f"trunk/layers/{layer}/{expert}/{name}", shape, names, size * (1 + 3 * expert))
    for name, (shape, names) in OTHER.items():
        add(f"trunk/{name}", shape, names)
    return params, axes


def stacked(flat):
    """The same numbers with layers and experts stacked."""
    out = {f"trunk/{name}": flat[f"trunk/{name}"] for name in OTHER}
    for name in LAYER:
        out[f"trunk/scanned/0/{name}"] = np.stack([flat[f"trunk/layers/{i}/{name}"] for i in range(L)])
    for name in MIDDLE:
        out[f"trunk/scanned/0/{name}"] = np.stack([flat[f"trunk/layers/{i}/{name}"] for i in range(L)], axis=1)
    for name in EXPERTS:
        rows = [np.stack([flat[f"trunk/layers/{i}/{e}/{name}"] for e in range(E)], axis=-1) for i in range(L)]
        out[f"trunk/scanned/0/{name}"] = np.stack(rows)
    return out


def stacked_axes():
    axes = {f"trunk/{name}": names for name, (_, names) in OTHER.items()}
    axes |= {f"trunk/scanned/0/{name}": ("layers", *names) for name, (_, names) in LAYER.items()}
    axes |= {f"trunk/scanned/0/{name}": (names[0], "layers", *names[1:]) for name, (_, names) in MIDDLE.items()}
    return axes | {f"trunk/scanned/0/{name}": ("layers", *names, "expert") for name, (_, names) in EXPERTS.items()}


def three_steps(tx, params, gradients):
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(gradient, state, params)
    return params


def difference_after_three_steps(make, only=""):
    """Largest difference between stacked and separate leaves, in float64, under `make(axes)`, of leaves with `only`."""

    def kept(flat):
        return {name: value for name, value in flat.items() if only in name}

    with jax.enable_x64(True):
        params, axes = separate_leaves(0, np.float64)
        gradients = [separate_leaves(step, np.float64)[0] for step in (1, 2, 3)]
        apart = three_steps(make(kept(axes)), kept(params), [kept(g) for g in gradients])
        gradients = [kept(stacked(g)) for g in gradients]
        together = three_steps(make(kept(stacked_axes())), kept(stacked(params)), gradients)
        apart = kept(stacked(params | apart))
        moved = [np.abs(apart[name] - stacked(params)[name]).max() for name in apart]
        assert min(moved) > 0
        return max(float(np.abs(apart[name] - together[name]).max()) for name in apart)


@pytest.mark.parametrize("kind", concrete(Optimizer), ids=lambda kind: kind.__name__)
def test_scanned_equals_unscanned_after_three_steps(kind):
    assert difference_after_three_steps(example(kind)) < 1e-12


@pytest.mark.parametrize("kind", concrete(Optimizer), ids=lambda kind: kind.__name__)
def test_rates_from_tables_are_the_optimizer_s_own(kind):
    """Updates, the state's structure and the logged rates, in float64; a table of others is other updates."""
    optimizer, axes = example(kind), stacked_axes()
    if issubclass(kind, MatrixDescent):
        optimizer = replace(optimizer, adam_learning_rate=0.03)
    with jax.enable_x64(True):
        flat, _ = separate_leaves(0, np.float64)
        params = stacked(flat)
        gradients = [stacked(separate_leaves(seed, np.float64)[0]) for seed in (1, 2, 3)]
        (tables,) = rate_tables([optimizer], 3)
        tabled = optimizer.tabled(tables)
        assert jax.tree.structure(tabled(axes).init(params)) == jax.tree.structure(optimizer(axes).init(params))
        own, same = (three_steps(rule(axes), params, gradients) for rule in (optimizer, tabled))
        for name in own:
            np.testing.assert_allclose(same[name], own[name], rtol=1e-12, err_msg=name)
        for step in range(3):
            assert tabled.rates(step).keys() == optimizer.rates(step).keys()
            for name, rate in optimizer.rates(step).items():
                np.testing.assert_allclose(tabled.rates(step)[name], rate, rtol=1e-7)
        for doubled in tables:
            other = {name: table * (2 if name == doubled else 1) for name, table in tables.items()}
            moved = three_steps(optimizer.tabled(other)(axes), params, gradients)
            assert any(np.abs(moved[name] - own[name]).max() > 1e-4 for name in own), doubled


@pytest.mark.parametrize(
    "tx",
    [optax.lamb(0.01), contrib.muon(0.01), optax.adafactor(0.01, min_dim_size_to_factor=2)],
    ids=["lamb", "muon", "adafactor"],
)
def test_optax_on_stacks_differs_and_per_layer_mends_it(tx):
    def alone(axes):
        return optax.partition(dict.fromkeys(axes, tx), {name: name for name in axes})

    assert difference_after_three_steps(alone, only="up/") > 1e-6
    assert difference_after_three_steps(lambda axes: per_layer(tx, axes), only="up/") < 1e-12


def test_per_layer_needs_no_parameters_and_passes_extra_arguments():
    def update(updates, state, params=None, *, factor):
        return updates * factor / jnp.linalg.norm(updates), state

    tx = per_layer(optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update), {"w": ("layers", None)})
    updates, _ = tx.update({"w": jnp.array([[3.0, 4.0], [0.0, 2.0]])}, tx.init({"w": jnp.zeros((2, 2))}), factor=2.0)
    np.testing.assert_allclose(updates["w"], [[1.2, 1.6], [0.0, 2.0]], rtol=1e-6)


def test_adamw_is_optax_adamw():
    params, axes = separate_leaves(0)
    gradients = [separate_leaves(step)[0] for step in (1, 2, 3)]
    schedule = optax.linear_schedule(0.1, 0.01, 3)
    mask = {name: value.ndim > 1 and "bias" not in name for name, value in params.items()}
    theirs = three_steps(optax.adamw(schedule, b2=0.98, weight_decay=0.1, mask=mask), params, gradients)
    ours = three_steps(AdamW(learning_rate=schedule, b2=0.98, weight_decay=0.1)(axes), params, gradients)
    for name in params:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_adafactor_on_separate_leaves_is_optax_adafactor(relative, momentum):
    params, axes = separate_leaves(0)
    gradients = [separate_leaves(step)[0] for step in (1, 2, 3)]
    # At a constant rate: optax puts the rate before the momentum.
    theirs = optax.adafactor(
        0.03,
        min_dim_size_to_factor=5,
        clipping_threshold=1.1,
        decay_rate=0.7,
        multiply_by_parameter_scale=relative,
        momentum=momentum,
    )
    ours = Adafactor(learning_rate=0.03, smallest=5, clip=1.1, decay_rate=0.7, relative=relative, momentum=momentum)
    theirs, ours = (three_steps(tx, params, gradients) for tx in (theirs, ours(axes)))
    for name in params:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


def test_lion_is_optax_lion():
    params, axes = separate_leaves(0)
    gradients = [separate_leaves(step)[0] for step in (1, 2, 3)]
    mask = {name: value.ndim > 1 and "bias" not in name for name, value in params.items()}
    theirs = three_steps(optax.lion(0.01, b1=0.8, b2=0.95, weight_decay=0.3, mask=mask), params, gradients)
    ours = three_steps(Lion(learning_rate=0.01, b1=0.8, b2=0.95, weight_decay=0.3)(axes), params, gradients)
    for name in params:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("adapt", ["all", "decayed"])
def test_lamb_by_hand(adapt):
    """GPT-BERT's form has a trust ratio for what decays, and plain Adam for norms and biases; optax's has one for all."""
    params, axes = separate_leaves(0, np.float64)
    gradients = [separate_leaves(step, np.float64)[0] for step in (1, 2, 3)]
    with jax.enable_x64(True):
        lamb = Lamb(learning_rate=0.0141, weight_decay=0.1, b2=0.98, eps=1e-8, adapt=adapt)
        ours = three_steps(lamb(axes), params, gradients)
    for name, w in params.items():
        m = v = 0.0
        for t, g in enumerate(gradients, 1):
            m, v = 0.9 * m + 0.1 * g[name], 0.98 * v + 0.02 * g[name] ** 2
            u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.98**t)) + 1e-8)
            decay = 0.1 if name.endswith(("kernel", "table")) else 0.0
            u = u + decay * w
            ratio = np.linalg.norm(w) / np.linalg.norm(u) if decay or adapt == "all" else 1.0
            w = w - 0.0141 * ratio * u
        np.testing.assert_allclose(ours[name], w, rtol=1e-10)


@pytest.mark.parametrize("rms", [None, 0.2])
def test_muon_on_one_matrix_is_optax_muon(rms):
    key = jax.random.key(4)
    params = {"w": jax.random.normal(key, (8, 5))}
    gradients = [{"w": jax.random.normal(jax.random.fold_in(key, step), (8, 5))} for step in range(3)]
    muon = Muon(learning_rate=0.02, weight_decay=0.1, consistent_rms=rms)
    theirs = three_steps(contrib.muon(0.02, weight_decay=0.1, consistent_rms=rms), params, gradients)
    ours = three_steps(muon({"w": ("embed", "mlp")}), params, gradients)
    np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-6)


def test_muon_makes_each_experts_momentum_orthogonal():
    gradient = jax.random.normal(jax.random.key(5), (L, E, 6, 4)) * jnp.array([1.0, 1e3])[None, :, None, None]
    axes = {"w": ("layers", "expert", "embed", "mlp")}
    tx = Muon(learning_rate=1.0, iterations=12, consistent_rms=None)(axes)
    updates, _ = tx.update({"w": gradient}, tx.init({"w": gradient}), {"w": gradient})
    # The quintic's fixed band: singular values end near 1, not at it.
    values = np.linalg.svd(np.asarray(updates["w"]), compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize(
    ("name", "axes", "rows", "columns"),
    [
        ("a/kernel", ("layers", "embed", "heads", "kv"), (1,), (2, 3)),
        ("a/kernel", ("layers", "heads", "kv", "embed"), (1, 2), (3,)),
        ("a/kernel", ("embed", None, "heads", "kv"), (0,), (2, 3)),
        ("a/kernel", ("layers", "expert", "embed", "mlp"), (2,), (3,)),
        ("a/kernel", ("embed", None), (0,), (1,)),
        ("a/router/kernel", ("embed", "expert"), None, None),
        ("a/bias", ("layers", "heads", "kv"), None, None),
        ("a/q_norm/weight", ("layers", "heads", "kv"), None, None),
        ("embed/table", ("vocab", "embed"), None, None),
        ("positions/table", ("length", "embed"), None, None),
        ("a/gain", ("layers", "embed"), None, None),
    ],
)
def test_which_leaves_are_matrices(name, axes, rows, columns):
    expected = None if rows is None else contrib.MuonDimensionNumbers(rows, columns)
    assert matrix_axes(name, axes) == expected


def test_groups_give_each_tree_its_own_optimizer():
    params, axes = separate_leaves(6)
    names = {name.replace("trunk", tree): value for tree in ("trunk", "generator") for name, value in params.items()}
    both = {name.replace("trunk", tree): value for tree in ("trunk", "generator") for name, value in axes.items()}
    optimizer = Groups(groups={"generator/.*": Sgd(learning_rate=0.5), ".*": AdamW(learning_rate=0.1)})
    tx = optimizer(both)
    updates, _ = tx.update(names, tx.init(names), names)
    adam = AdamW(learning_rate=0.1)(axes)
    expected, _ = adam.update(params, adam.init(params), params)
    for name in params:
        np.testing.assert_allclose(updates[name.replace("trunk", "generator")], -0.5 * params[name])
        np.testing.assert_allclose(updates[name], expected[name])
    assert {name: float(rate) for name, rate in optimizer.rates(0).items()} == {
        "learning_rate/generator/.*": 0.5,
        "learning_rate/.*": pytest.approx(0.1),
    }


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (AdamW(learning_rate=1.0, scale=(("trunk/embed/.*tabel", 0.1),)), ("AdamW.scale", "embed/.*tabel", "table'")),
        (AdamW(learning_rate=1.0, decay=(("(", 0.1),)), ("AdamW.decay", "regular expression")),
        (AdamW(learning_rate=1.0, decay=((".*", 1.0), (".*norm.*", 0.0))), ("'.*norm.*' never applies",)),
        (Muon(learning_rate=1.0, exclude=("head",)), ("Muon.exclude", "'head' matches no parameter")),
        (Groups(groups={"generator/.*": Sgd(learning_rate=1.0)}), ("Groups.groups", "generator", "nearest")),
        (Groups(groups={".*embed.*": Sgd(learning_rate=1.0)}), ("no pattern takes", "'trunk/final_norm/scale'")),
    ],
)
def test_rules_never_silently_do_nothing(optimizer, words):
    with pytest.raises(UserError) as caught:
        optimizer({f"trunk/{name}": names for name, (_, names) in OTHER.items()})
    assert all(word in str(caught.value) for word in words)


def test_moments_take_the_axes_of_their_parameter():
    params, _ = separate_leaves(7)
    params, axes = stacked(params), stacked_axes()
    for kind in concrete(Optimizer):
        shapes = jax.eval_shape(example(kind)(axes).init, params)
        found = state_axes(shapes, axes, params)
        pairs = jax.tree.leaves(jax.tree.map(lambda shape, names: (len(shape.shape) == len(names),), shapes, found))
        assert all(pairs)
        followed = {
            (path[-1].key, names)
            for path, names in jax.tree_util.tree_leaves_with_path(
                found, is_leaf=lambda x: type(x) is tuple and (not x or x[0] is None or isinstance(x[0], str))
            )
            if isinstance(path[-1], jax.tree_util.DictKey)
        }
        # Without momentum there is none; factored and projected moments have other shapes.
        if kind.__name__ not in ("Sgd", "Adafactor", "GaLore", "Fira"):
            assert set(axes.items()) <= followed


def test_state_axes_of_counts_and_factors_per_layer():
    axes = {"w": ("embed", "layers", "mlp")}
    params = {"w": jnp.zeros((4, 3, 8))}
    tx = per_layer(optax.chain(optax.scale_by_adam(), optax.scale_by_factored_rms(min_dim_size_to_factor=2)), axes)
    adam, factored = state_axes(tx.init(params), axes, params)["w"]
    assert adam.count == ("layers",)
    assert adam.mu == axes["w"]
    assert factored.v_row == factored.v_col == ("layers", None)
