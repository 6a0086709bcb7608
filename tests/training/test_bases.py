"""Conda, GaLore and Fira: what they are in the trivial basis and at full rank, by hand, and when they search."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from partitioning import Rules, fsdp_tensor
from partitioning.presets import table
from training import bases, fira
from training.bases import Wide
from training.conda import Conda
from training.fira import Fira
from training.galore import GaLore
from training.matrices import matrix_axes
from training.optimizers import AdamW
from training.per_layer import state_axes
from training.singular import singular

# One leaf of each kind of layout: stacks in front and behind, heads, a fused kernel of three, a square, a vector.
LEAVES = {
    "query/kernel": ((2, 6, 2, 4), ("layers", "embed", "heads", "kv")),
    "fused/kernel": ((2, 6, 3, 2, 2), ("layers", "embed", None, "heads", "kv")),
    "out/kernel": ((2, 4, 6), ("heads", "kv", "embed")),
    "experts/kernel": ((2, 7, 4, 3), ("layers", "mlp", "embed", "expert")),
    "square/kernel": ((5, 5), ("embed", "mlp")),
    "norm/scale": ((5,), ("embed",)),
}
AXES = {name: axes for name, (_, axes) in LEAVES.items()}
MATRICES = [name for name in LEAVES if name.endswith("kernel")]


def leaves(seed, dtype=np.float64):
    draw = np.random.default_rng(seed)
    return {name: jnp.asarray(draw.standard_normal(shape), dtype) for name, (shape, _) in LEAVES.items()}


def views():
    found = {name: matrix_axes(name, AXES[name]) for name in MATRICES}
    return {name: Wide.of(LEAVES[name][0], AXES[name], numbers) for name, numbers in found.items()}


def run(tx, steps=5):
    """Updates and states of some steps on random gradients."""
    params = leaves(0)
    state, found = tx.init(params), []
    step = jax.jit(tx.update)
    for seed in range(1, steps + 1):
        updates, state = step(leaves(seed), state, params)
        found.append((updates, state))
    return found


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def trivial(monkeypatch):
    """Every basis is made of unit vectors."""
    eye = lambda x: jnp.broadcast_to(jnp.eye(x.shape[-2], dtype=x.dtype), (*x.shape[:-1], x.shape[-2]))
    monkeypatch.setattr(bases, "singular", lambda x: (eye(x), jnp.ones(x.shape[:-1])))


@pytest.mark.parametrize("name", MATRICES)
def test_a_leaf_becomes_wide_matrices_and_back(name):
    """Each matrix is one layer's, one expert's or one of a fused three, as numpy cuts it out."""
    view, leaf = views()[name], leaves(0)[name]
    matrices = view.matrices(leaf)
    np.testing.assert_array_equal(view.leaf(matrices), leaf)
    cut = {
        "query/kernel": lambda x: x[1].reshape(6, 8),
        "fused/kernel": lambda x: x[1, :, 2].reshape(6, 4).T,
        "out/kernel": lambda x: x.reshape(8, 6).T,
        "experts/kernel": lambda x: x[1, :, :, 1].T,
        "square/kernel": lambda x: x,
    }[name](leaf)
    at = {"query/kernel": (1,), "fused/kernel": (1, 2), "out/kernel": (), "experts/kernel": (1, 1), "square/kernel": ()}
    np.testing.assert_array_equal(matrices[at[name]], cut)


@pytest.mark.parametrize("kind", [Conda, GaLore, Fira])
def test_what_is_kept_is_cut_with_the_stacks(kind):
    """Stacks lead, so that a checkpoint finds the layer and a mesh the expert."""
    params = leaves(0)
    tx = kind(learning_rate=1.0, **({} if kind is Conda else {"rank": 3}))(AXES)
    found = state_axes(jax.eval_shape(tx.init, params), AXES, params)["matrices"][0]
    basis = (found.galore if kind is Fira else found).basis
    assert basis["fused/kernel"] == ("layers", None, None, None)
    assert basis["experts/kernel"] == ("layers", "expert", None, None)
    if kind is Fira:
        assert found.norm["experts/kernel"] == ("layers", "expert")


@pytest.mark.usefixtures("trivial")
@pytest.mark.parametrize("kind", [Conda, GaLore, Fira])
def test_with_unit_vectors_at_full_rank_it_is_adamw(kind):
    """Exactly so: a product with the identity rounds nothing."""
    constants = {"learning_rate": 0.1, "weight_decay": 0.2, "b1": 0.8, "b2": 0.9}
    expected = run(AdamW(**constants)(AXES))
    for (ours, _), (theirs, _) in zip(run(kind(**constants, every=2)(AXES)), expected, strict=True):
        for name in LEAVES:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", [GaLore, Fira])
def test_at_full_rank_it_is_adam_in_the_basis(kind):
    """No residual is left to Fira then."""
    tx = kind(learning_rate=1.0, rank=100, every=100)(AXES)
    adam, state, wide = optax.scale_by_adam(), None, views()
    for seed, (updates, after) in enumerate(run(tx), 1):
        own = after["matrices"][0]
        basis = (own.galore if kind is Fira else own).basis
        low = {name: basis[name].mT @ wide[name].matrices(leaves(seed)[name]) for name in MATRICES}
        moved, state = adam.update(low, adam.init(low) if state is None else state)
        for name in MATRICES:
            expected = -wide[name].leaf(basis[name] @ moved[name])
            np.testing.assert_allclose(updates[name], expected, rtol=1e-9, atol=1e-9)


def test_galore_on_a_square_is_optax_galore(monkeypatch):
    """On others optax projects the longer side. The moments it keeps follow its vectors' signs, which are any."""
    monkeypatch.setattr(bases, "singular", lambda x: jnp.linalg.svd(x, full_matrices=False)[:2])
    axes = {"w": ("embed", "mlp")}
    draw = np.random.default_rng(0)
    params, *gradients = [{"w": jnp.asarray(draw.standard_normal((6, 6)), jnp.float32)} for _ in range(6)]
    ours = GaLore(learning_rate=0.1, rank=3, every=2)(axes)
    theirs = contrib.galore(0.1, rank=3, update_proj_gap=2)
    one, other = ours.init(params), theirs.init(params)
    for gradient in gradients:
        mine, one = ours.update(gradient, one, params)
        yours, other = theirs.update(gradient, other, params)
        np.testing.assert_allclose(mine["w"], yours["w"], rtol=1e-4, atol=1e-6)


def test_fira_without_its_second_part_is_galore(monkeypatch):
    constants = {"learning_rate": 0.1, "rank": 2, "every": 2}
    expected = run(GaLore(**constants)(AXES))
    other = run(Fira(**constants)(AXES))
    assert (other[0][0]["square/kernel"] != expected[0][0]["square/kernel"]).any()
    monkeypatch.setattr(fira, "scaling", lambda moved, seen, eps: jnp.zeros((*moved.shape[:-2], 1, moved.shape[-1])))
    for (ours, state), (theirs, galore) in zip(run(Fira(**constants)(AXES)), expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        jax.tree.map(np.testing.assert_array_equal, state["matrices"][0].galore, galore["matrices"][0])


def test_one_matrix_by_hand():
    """Conda and Fira on 4 x 6, the basis found twice, against numpy; the limit is reached."""
    draw = np.random.default_rng(1)
    gradients = [scale * draw.standard_normal((4, 6)) for scale in (1, 3, 1, 5, 1)]
    axes, b1, b2, eps = {"w": ("embed", "mlp")}, 0.9, 0.999, 1e-8
    conda = Conda(learning_rate=1.0, every=3)(axes)
    fira = Fira(learning_rate=1.0, rank=2, every=3)(axes)
    states = {"conda": conda.init({"w": jnp.zeros((4, 6))}), "fira": fira.init({"w": jnp.zeros((4, 6))})}
    m = v = low_m = low_v = np.zeros(())
    last, limited = None, 0
    for t, g in enumerate(gradients, 1):
        m = b1 * m + (1 - b1) * g
        if t in (1, 4):
            u, p = (np.asarray(singular(jnp.asarray(x))[0]) for x in (m, g))
            p = p[:, :2]
        v = b2 * v + (1 - b2) * (u.T @ g) ** 2
        expected = u @ (u.T @ m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
        updates, states["conda"] = conda.update({"w": jnp.asarray(g)}, states["conda"], {"w": jnp.zeros((4, 6))})
        np.testing.assert_allclose(updates["w"], -expected, rtol=1e-8)

        r = p.T @ g
        low_m, low_v = b1 * low_m + (1 - b1) * r, b2 * low_v + (1 - b2) * r**2
        n = low_m / (1 - b1**t) / (np.sqrt(low_v / (1 - b2**t)) + eps)
        rest = (np.linalg.norm(n, axis=0) / (np.linalg.norm(r, axis=0) + eps)) * (g - p @ r)
        norm = np.linalg.norm(rest)
        if last is not None and norm > 1.01 * last:
            rest, limited = rest * 1.01 * last / norm, limited + 1
        last = np.linalg.norm(rest)
        updates, states["fira"] = fira.update({"w": jnp.asarray(g)}, states["fira"], {"w": jnp.zeros((4, 6))})
        np.testing.assert_allclose(updates["w"], -(p @ n + rest), rtol=1e-7)
    assert 0 < limited < 4


def test_the_limit_holds_at_every_step():
    """For each matrix of each stack, and what the state says is the norm of what was added."""
    norms = [
        state["matrices"][0].norm for _, state in run(Fira(learning_rate=1.0, rank=2, every=3, limit=1.05)(AXES), 8)
    ]
    limited = 0
    for before, after in itertools.pairwise(norms):
        for name in MATRICES:
            assert after[name].shape == views()[name].matrices(leaves(0)[name]).shape[:-2]
            assert (after[name] <= 1.05 * before[name] * (1 + 1e-12)).all()
            limited += int(np.isclose(after[name], 1.05 * before[name]).sum())
    assert limited


@pytest.mark.parametrize("kind", [Conda, GaLore, Fira])
def test_bases_are_orthogonal_and_searched_for_every_so_many_steps(kind, monkeypatch):
    """Counted as the compiled program runs, where a condition inside a map would search at every step."""
    seen = []

    def counted(matrices):
        jax.debug.callback(lambda: seen.append(1))
        return singular(matrices)

    monkeypatch.setattr(bases, "singular", counted)
    options = {} if kind is Conda else {"rank": 3}
    found = run(kind(learning_rate=1.0, every=3, **options)(AXES), 7)
    jax.effects_barrier()
    # Steps 1, 4 and 7, once for each leaf.
    assert len(seen) == 3 * len(MATRICES)
    for _, state in found:
        own = state["matrices"][0]
        for basis in (own.galore if kind is Fira else own).basis.values():
            inner = basis.mT @ basis
            np.testing.assert_allclose(inner, np.broadcast_to(np.eye(inner.shape[-1]), inner.shape), atol=1e-12)


@pytest.mark.parametrize(("kind", "more"), [(GaLore, 0), (Fira, 1)])
def test_what_a_matrix_keeps(kind, more):
    """r (k + 2 n) numbers each, Fira one more, and one count for all."""
    shapes = jax.eval_shape(kind(learning_rate=1.0, rank=3)(AXES).init, leaves(0))["matrices"][0]
    expected = 1
    for name in MATRICES:
        *stack, k, n = views()[name].matrices(leaves(0)[name]).shape
        expected += int(np.prod(stack, dtype=int)) * (min(3, k) * (k + 2 * n) + more)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


@pytest.mark.parametrize("kind", [GaLore, Fira])
def test_an_expert_with_one_token_has_one_direction(kind):
    """Of the rest of a whole basis the last bit would decide; without a token the basis stays as it was."""
    draw = np.random.default_rng(3)
    axes, options = {"w": ("expert", "embed", "mlp")}, {"learning_rate": 1.0, "rank": 3, "every": 2}
    token = np.outer(draw.standard_normal(4), draw.standard_normal(6))
    first = jnp.asarray([draw.standard_normal((4, 6)), token, np.zeros((4, 6))])
    tx = kind(**options)(axes)
    _, state = tx.update({"w": first}, tx.init({"w": first}), {"w": first})
    own = state["matrices"][0]
    whole, one, none = (own.galore if kind is Fira else own).basis["w"]
    np.testing.assert_allclose(whole.T @ whole, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(one @ one.T, token @ token.T / np.linalg.norm(token) ** 2, atol=1e-12)
    np.testing.assert_array_equal(none, np.eye(4, 3))


def collectives(text, inside="ENTRY"):
    """Names of what moves data between devices in the loops of a compiled program."""
    bodies, name = {}, None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.split()[1 if line.startswith("ENTRY") else 0].split("(")[0]
        elif name:
            bodies.setdefault(name, []).append(line)
    called = lambda line: re.findall(
        r"(?:body|condition|to_apply|calls|true_computation|false_computation)=(%[\w.-]+)", line
    )
    found, todo = set(), [n for lines in bodies.values() for line in lines if " while(" in line for n in called(line)]
    seen = set(todo)
    while todo:
        for line in bodies.get(todo.pop(), ()):
            found |= set(re.findall(r" (all-\w+|collective-\w+|reduce-scatter)[\w-]*\(", line))
            new = set(called(line)) - seen
            seen |= new
            todo += new
    return found


def by_expert(devices):
    """Rules that give each device its experts."""
    places = table(expert=("expert",))
    return Rules(mesh={"expert": devices}, parameters=places, activations=places)


@pytest.mark.parametrize(
    ("kind", "rules"), [(Conda, fsdp_tensor), (GaLore, fsdp_tensor), (Fira, fsdp_tensor), (Fira, by_expert)]
)
def test_eight_devices_find_what_one_does(kind, rules):
    """Matrices cut along both sides, or stacks of them; the search is inside the program, and nothing moves in it."""
    axes = {"w": ("layers" if rules is fsdp_tensor else "expert", "embed", "mlp")}
    draw = np.random.default_rng(2)
    params, *gradients = [{"w": jnp.asarray(draw.standard_normal((8, 8, 16)))} for _ in range(4)]
    tx = kind(learning_rate=0.1, weight_decay=0.1, every=2, **({} if kind is Conda else {"rank": 3}))(axes)
    ends = []
    for count in (1, 8):
        placement = rules(min(count, 2) if rules is fsdp_tensor else count).place(jax.devices()[:count])
        place = placement.parameter(axes["w"], params["w"].shape, "w")
        here = jax.device_put(params, place)
        with placement.scope():
            state = jax.jit(tx.init)(here)
            step = jax.jit(tx.update).lower(gradients[0] | {"w": here["w"]}, state, here).compile()
        assert not collectives(step.as_text())
        for gradient in gradients:
            updates, state = step(jax.device_put(gradient, place), state, here)
            here = optax.apply_updates(here, updates)
        ends.append(np.asarray(here["w"]))
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-10, atol=1e-12)
