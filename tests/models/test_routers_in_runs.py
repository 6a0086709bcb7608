"""Routers in trunks and runs: on any mesh, in micro-batches, with the run's text, decoding, and what a config cannot ask for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import TRUNK, VOCABULARY, pair_batch, plain_batch
from flax import nnx
from running import Toy, devices, tiny

from models import (
    Causal,
    ExpertChoice,
    Experts,
    HashRouter,
    MaskedRouter,
    SigmoidRouter,
    TopKRouter,
    WarmUpRouter,
)
from models.loads import Loads
from models.mixture.by_token import is_frequent
from objectives import MaskedLM, MomentumQueue, RandomTokens
from partitioning import UserError, data, fsdp, fsdp_expert, fsdp_sequence, fsdp_tensor
from training.description import described
from training.optimizers import Sgd

V = VOCABULARY.size
COUNTS = np.arange(V, 0, -1.0)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def model(kind, **changes):
    feed_forward = partial(Experts, experts=8, hidden=8, router=kind, **changes)
    return partial(TRUNK, feed_forward=feed_forward, dtype="float64")


KINDS = {
    "sigmoid": partial(SigmoidRouter, groups=4, top_groups=2, rate=0.1),
    "warm-up": partial(WarmUpRouter, steps=3),
    "masked": partial(MaskedRouter, frequencies=COUNTS, frequent=3),
    "hash": partial(HashRouter, vocabulary=V),
}


def moved(run, batches):
    """The state after steps on these batches, and the last metrics and loads."""
    plan = run.plan()
    state, program, figures = plan.init(), plan.compile(plan.stages[0]), {}
    for batch in batches:
        state, out = program(state, plan.put(plan.stages[0], batch))
        figures = out["metrics"] | Loads(out["tallies"]).figures()
    return {n: np.asarray(v) for n, v in (state.params | state.buffers).items()}, figures


RULES = {"fsdp": fsdp(), "tensor": fsdp_tensor(2), "sequence": fsdp_sequence(2), "expert": fsdp_expert(4)}


# The router with a statistic and a parameter on every mesh, one that draws on one; the rest in the long run.


MESHES = [
    pytest.param(
        KINDS[kind],
        RULES[name],
        id=f"{kind}-{name}",
        marks=() if kind == "sigmoid" or (kind, name) == ("warm-up", "fsdp") else pytest.mark.long,
    )
    for kind in KINDS
    for name in RULES
]


@pytest.mark.parametrize(("kind", "rules"), MESHES)
def test_eight_devices_and_micro_batches_are_one(kind, rules):
    """Parameters, biases, running means and loads after three steps, with the balance over the whole batch."""
    run = partial(tiny, "clm", model=model(kind), batch_size=16, optimizer=Sgd(learning_rate=0.5))
    batches = [plain_batch(i) for i in range(3)]
    with devices(1):
        one, figures = moved(run(rules=data()), batches)
        parts, by_parts = moved(run(rules=data(), accumulate=2), batches)
    with devices(8):
        many, by_many = moved(run(rules=rules), batches)
    loads = {name for name in figures if name.startswith("experts/")}
    assert {"experts/trunk/layers/2/load", "experts/trunk/entropy", "experts/trunk/largest"} <= loads
    assert ("experts/trunk/layers/0/bias" in loads) == any(name.endswith("bias") for name in one)
    for name in loads:
        for other in (by_parts, by_many):
            np.testing.assert_allclose(other[name], figures[name], rtol=1e-9, err_msg=name)
    statistics = [name for name in one if name.endswith(("bias", "mean_square"))]
    assert all(np.abs(one[name] - name.endswith("square")).max() > 1e-3 for name in statistics)
    for name, value in one.items():
        for other in (parts, many):
            np.testing.assert_allclose(other[name], value, rtol=1e-6, atol=1e-8, err_msg=name)


def test_frequencies_of_the_text_that_a_run_trains_on():
    """A trunk hands its vocabulary to the routers inside, of which each layer draws its own table."""
    told = replace(VOCABULARY, frequencies=lambda: COUNTS / COUNTS.sum())
    # The text of another stage is no other vocabulary.
    assert (told, hash(told)) == (VOCABULARY, hash(VOCABULARY))
    made = partial(TRUNK, layers=2, feed_forward=partial(Experts, experts=8, router=MaskedRouter))
    given = partial(MaskedRouter, frequencies=COUNTS)
    tables = [
        np.asarray(trunk(vocabulary, rngs=nnx.Rngs(0)).stack.scanned["0"].feed_forward.router.visible.get_value())
        for trunk, vocabulary in (
            (made, told),
            (partial(made, feed_forward=partial(Experts, experts=8, router=given)), VOCABULARY),
        )
    ]
    np.testing.assert_array_equal(*tables)
    assert (tables[0].sum(-1) == np.where(is_frequent(COUNTS, 0.9), 8, 1)).all()
    with pytest.raises(
        UserError, match=r"MaskedRouter\.frequencies: expected a count for each token id, where no run's"
    ):
        made(VOCABULARY, rngs=nnx.Rngs(0))
    hashed = model(HashRouter)(VOCABULARY, rngs=nnx.Rngs(0))
    assert hashed.stack.scanned["0"].feed_forward.router.table.get_value().shape == (3, V, 2)


def test_a_teacher_keeps_the_table():
    """A queue's teacher moves its numbers toward the trunk's, and its table of experts is the trunk's, entry by entry."""
    # 0.3 of 3 and 0.7 of it make less than 3, as numbers are rounded: cut to a whole one, 2.
    objective = MomentumQueue(size=32, momentum=0.3)
    small = {"rules": data(), "optimizer": Sgd(learning_rate=0.5), "data": Toy(pair_batch)}
    with devices(1):
        state, _ = moved(
            tiny("momentum_queue", model=model(KINDS["hash"]), objective=objective, **small), [pair_batch(0, 8)]
        )
    tables = [name for name in state if name.endswith("router/table")]
    assert len(tables) == 2
    np.testing.assert_array_equal(*(state[name] for name in tables))


@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
def test_what_the_balance_is_taken_over(scope):
    """By sequence micro-batches change nothing; by micro-batch they do, and that is its name."""
    run = partial(tiny, "clm", model=model(TopKRouter, balance_scope=scope, balance=10.0), batch_size=16)
    batches = [plain_batch(0)]
    with devices(1):
        (one, _), (two, _) = (
            moved(run(rules=data(), accumulate=k, optimizer=Sgd(learning_rate=0.5)), batches) for k in (1, 2)
        )
    apart = max(np.abs(one[name] - two[name]).max() for name in one)
    assert (apart < 1e-7) == (scope == "sequence")


def test_expert_choice_in_an_encoder():
    """It trains under a mask that sees all."""
    objective = MaskedLM(select=RandomTokens(rate=0.5))
    with devices(1):
        run = tiny("clm", model=model(ExpertChoice), objective=objective, rules=data(), batch_size=16)
        _, figures = moved(run, [plain_batch(0)])
        assert described(run.plan())[-1].startswith(
            "models.ExpertChoice: documents packed in one row are not independent"
        )
    assert np.isfinite(figures["side/trunk/balance"])


REFUSED = {
    "top-k": ("clm", model(TopKRouter, top_k=9), r"Experts\.top_k = 9 is more than the 8 experts"),
    "hash": ("clm", model(partial(HashRouter, vocabulary=V + 1)), r"HashRouter's .* another vocabulary: it has 38 ids"),
    "masked": (
        "clm",
        model(partial(MaskedRouter, frequencies=[1.0] * 9)),
        r"MaskedRouter's .* it has 9 ids, the trunk's .* 37",
    ),
    "causal": ("clm", model(ExpertChoice), "ExpertChoice lets experts see the whole row"),
    "prefix": ("prefix_lm", model(ExpertChoice), "ExpertChoice lets experts see the whole row"),
    "two modes": ("gpt_bert", model(ExpertChoice), "ExpertChoice lets experts see the whole row"),
    "capacity": (
        "clm",
        model(TopKRouter, form="capacity", capacity=0.07),
        r"capacity = 0\.07: 96 choices of 8 experts give 0\.84",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_config_cannot_ask_for(name):
    """Shown by the abstract call, before anything is compiled or written."""
    case, made, words = REFUSED[name]
    with devices(1), pytest.raises(UserError, match=words):
        tiny(case, model=made, rules=data(), batch_size=4).abstract()


def test_capacity_is_counted_and_couples_rows():
    """What is dropped is a metric; micro-batches are refused by name."""
    made = model(TopKRouter, form="capacity", capacity=0.5)
    with devices(1):
        _, figures = moved(tiny("clm", model=made, rules=data(), batch_size=16), [plain_batch(0)])
    assert 0.3 < figures["experts/trunk/dropped"] < 0.9
    each = [figures[f"experts/trunk/layers/{i}/dropped"] for i in range(3)]
    np.testing.assert_allclose(figures["experts/trunk/dropped"], np.mean([by_expert.sum() for by_expert in each]))
    with pytest.raises(UserError, match=r"accumulate = 2 .*Experts.form = 'blocks', or accumulate = 1"):
        tiny("clm", model=made, rules=data(), batch_size=16, accumulate=2).plan()


def test_a_decoder_with_experts_by_id_decodes_as_it_trains():
    """A token's states with a cache are those of the whole row."""
    trunk = model(partial(HashRouter, vocabulary=V))(VOCABULARY, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(6, V, (2, 6)))
    where = {"segments": jnp.ones((2, 6), jnp.int32), "positions": jnp.tile(jnp.arange(6, dtype=jnp.int32), (2, 1))}
    whole = trunk(tokens, mask=Causal(), **where).hidden
    cache, parts = trunk.empty_cache(2, 6), []
    for i in range(6):
        one = {name: value[:, i : i + 1] for name, value in where.items()}
        out = trunk(tokens[:, i : i + 1], mask=Causal(), cache=cache, **one)
        cache, parts = out.cache, [*parts, out.hidden]
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-12)
