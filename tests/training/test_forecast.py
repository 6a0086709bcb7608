"""What a plan says of a step equals what the arrays and the formulas say."""

import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from data import Described
from models import Attention, FeedForward, RMSNorm, Trunk
from objectives import CausalLM, MaskedLM, RandomTokens
from partitioning import data, fsdp, fsdp_tensor
from training import AdamW, Run
from training.ema import Ema
from training.flops import executed_flops
from training.forecast import HELD, asked, counted, held
from training.loop import step_flops

L, D, F, H, S, B, V = 3, 64, 160, 4, 32, 16, 512


def run_of(objective, remat="none", **changes):
    """A small trunk without biases over data that are not there."""
    model = partial(
        Trunk,
        width=D,
        layers=L,
        mixer=partial(Attention, heads=H),
        feed_forward=partial(FeedForward, hidden=F, gated=True),
        norm=RMSNorm,
        remat=remat,
    )
    common = {"data": Described(vocabulary=V), "steps": 10, "batch_size": B, "length": S}
    return Run(model=model, objective=objective, optimizer=AdamW(learning_rate=1e-3), **(common | changes))


def counts(run):
    """Model FLOPs, executed ones with and without masked halves, of a run's step."""
    plan = run.plan()
    stage = plan.stages[0]
    with plan.placement.scope():
        whole, unmasked = (executed_flops(stage.step, plan.state, stage.batch, masked=m) for m in (True, False))
        return step_flops(plan, stage).flops, whole.flops, unmasked.flops


LAYERS = L * 2 * B * S * (4 * D * D + 3 * D * F)
SQUARE = L * 4 * B * S * S * D


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_decoders_flops_are_the_papers_count(accumulate):
    """Six a parameter and token, and attention by half; what is executed has the other half too."""
    model, whole, unmasked = counts(run_of(CausalLM(), accumulate=accumulate))
    head = 2 * B * S * D * V
    assert model == pytest.approx(3 * (LAYERS + SQUARE / 2 + head), rel=0.03)
    assert unmasked == pytest.approx(model, rel=0.03)
    assert whole - unmasked == pytest.approx(3 * SQUARE / 2, rel=0.03)


def test_an_encoders_flops_are_the_papers_count():
    """The head scores what is masked alone, and the last layer's states elsewhere are not needed."""
    rate = 0.25
    model, whole, unmasked = counts(run_of(MaskedLM(select=RandomTokens(rate=rate))))
    # Queries, the output and the feed-forward layer of the last block are at the selected places only.
    spared = (1 - rate) * (2 * B * S * (2 * D * D + 3 * D * F) + 4 * B * S * S * D)
    assert model == pytest.approx(3 * (LAYERS + SQUARE - spared + 2 * rate * B * S * D * V), rel=0.03)
    assert whole == unmasked == pytest.approx(model, rel=0.03)


def test_recomputation_is_apart():
    """Full rematerialisation computes the layers' forward pass once more; the model's own FLOPs stay."""
    (model, plain, _), (same, remat, _) = (counts(run_of(CausalLM(), remat=policy)) for policy in ("none", "full"))
    assert same == model
    # The product that ends a layer has no reader in its recomputation.
    last = L * 2 * B * S * F * D
    assert remat - plain == pytest.approx(LAYERS + SQUARE - last, rel=0.03)


@pytest.mark.parametrize("rules", [data(), fsdp(), fsdp_tensor(2)], ids=["data", "fsdp", "fsdp_tensor"])
def test_bytes_of_the_state_are_the_arrays_own(rules):
    plan = run_of(CausalLM(), rules=rules, average=Ema(decay=0.9)).plan()
    state = plan.init()
    for part in HELD:
        arrays = jax.tree.leaves(getattr(state, part))
        here = sum(array.addressable_shards[3].data.nbytes for array in arrays)
        assert held(getattr(plan.state, part), getattr(plan.shardings, part)) == here, part
    trunk = sum(int(np.prod(array.shape)) for array in state.params.values())
    assert counted(plan) == {"trunk": trunk}


@pytest.mark.parametrize(
    ("message", "count"),
    [
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (20.00G) exceeds ..", 20 * 2**30),
        ("Ran out of memory in memory space hbm. Used 1.5T of 15.75G hbm.", int(1.5 * 2**40)),
        ("no number", 0),
    ],
)
def test_what_a_refused_program_asked_for(message, count):
    assert asked(message) == count


PODS = sorted((Path(__file__).resolve().parents[2] / "configs" / "pods").glob("*.gin"))
# As their papers and model cards have them, in millions.
PUBLISHED = {
    "embedder_7b": 7242,
    "llama_70b": 70554,
    "llama_8b": 8030,
    "mixtral_8x7b": 46703,
    "modernbert_large": 395,
    "olmoe_1b_7b": 6919,
    "transnormer_1b": 1000,
    "xlm_r_xl": 3500,
    "xlm_r_xxl": 10700,
}


@pytest.mark.parametrize("path", PODS, ids=lambda path: path.stem)
def test_a_pod_config_has_the_published_size_and_says_where_it_fits(path):
    """Every binding is used, on any machine; the header names a topology that exists and what was planned there."""
    from launch.config import load
    from partitioning.topologies import topology

    plans = []
    # On the devices that are here; what only a pod can do is compiled by `make test-pods`.
    load([str(path)], exercise=lambda run: plans.append(run.plan()))
    assert counted(plans[0])["trunk"] == pytest.approx(PUBLISHED[path.stem] * 1e6, rel=0.02)
    header = path.read_text().split("\nfrom __gin__")[0]
    where = re.search(r"^# Topology: (\S+)\. [\d.]+ GiB of (\d+) a chip; .* binds, MFU at most", header, re.MULTILINE)
    assert where, "the header says where it fits, with how much memory, and what binds there"
    assert topology(where[1]).pod.hbm == int(where[2]) * 2**30
