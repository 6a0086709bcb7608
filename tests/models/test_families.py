"""Families at their published sizes: parameters counted without making them."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import models
from launch.config import load
from models import Vocabulary
from models.variables import axes_of, flatten

PARTS = Path(__file__).parents[2] / "configs" / "parts"
# Tokens, and millions of parameters as published, heads included.
PUBLISHED = {
    "bert_base": (30_522, 110),
    "roberta_base": (50_265, 125),
    "modernbert_base": (50_368, 149),
    "modernbert_large": (50_368, 395),
    "deberta_v3_base": (128_100, 184),
    "ltg_bert_base": (16_384, 98),
    "t5_base": (32_128, 223),
    "t5_1_1_base": (32_128, 248),
    "llama_1b": (128_256, 1_236),
    "qwen3_0_6b": (151_936, 596),
    "qwen3_next_80b_a3b": (151_936, 80_000),
    "llama_3_8b": (128_256, 8_030),
    "llama_3_70b": (128_256, 70_554),
    "mistral_7b": (32_000, 7_242),
    "xlm_r_xl": (250_880, 3_480),
    "xlm_r_xxl": (250_880, 10_700),
    "transnormer_385m": (50_272, 385),
    "transnormer_1b": (50_272, 1_000),
    "transnormer_7b": (64_000, 7_000),
    "transnormer_175b": (64_000, 175_000),
    "minimax_text_01": (200_064, 456_000),
    "mixtral_8x7b": (32_000, 46_700),
    "mixtral_8x22b": (32_768, 141_000),
    "olmoe_1b_7b": (50_304, 6_920),
    "deepseek_v3": (129_280, 671_000),
    "ling_lite": (126_464, 16_800),
    "ling_plus": (126_464, 290_000),
}
# Of experts: millions of parameters that a token meets, all of the embeddings and the head counted.
ACTIVE = {
    "mixtral_8x7b": 12_900,
    "mixtral_8x22b": 39_000,
    "olmoe_1b_7b": 1_280,
    "deepseek_v3": 37_000,
    "ling_lite": 2_750,
    "ling_plus": 28_800,
}
REST = """
from __gin__ import dynamic_registration
import data
import objectives
import training
training.Run.data = @data.Records()
data.Records.examples = [{'text': 'a'}]
training.Run.objective = @objectives.CausalLM()
training.Run.steps = 1
training.Run.optimizer = @training.AdamW()
training.AdamW.learning_rate = 0.1
"""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_paper(name, tmp_path):
    """Within 2 %, and every binding of the part is one that its family has."""
    (tmp_path / "rest.gin").write_text(REST)
    run = load([str(PARTS / f"{name}.gin"), str(tmp_path / "rest.gin")]).value
    tokens, millions = PUBLISHED[name]
    vocabulary = Vocabulary(size=tokens, pad=0, bos=1, eos=2, mask=3, cls=4, sep=5)
    made = nnx.eval_shape(lambda: run.model(vocabulary, rngs=nnx.Rngs(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(flatten(made, nnx.Param)))
    assert abs(count / (1e6 * millions) - 1) < 0.02
    if name in ACTIVE:
        leaves = flatten(made, nnx.Param)
        sparse = [path for path, names in axes_of(made, nnx.Param).items() if "expert" in names]
        nodes = [node for _, node in nnx.iter_graph(made) if isinstance(node, models.Experts)]
        (share,) = {node.top_k / node.inner.get_value().shape[-3] for node in nodes}
        idle = 1 - share
        active = count - idle * sum(math.prod(leaves[path].shape) for path in sparse)
        assert abs(active / (1e6 * ACTIVE[name]) - 1) < 0.02


def test_every_part_of_a_published_size_is_counted():
    assert {path.stem for path in PARTS.glob("*.gin")} == {"small", "small_t5", "hundred_steps", "pod", *PUBLISHED}


def test_weights_begin_as_published():
    """T5's and LTG-BERT's standard deviations, cut draws counted in; what nobody names keeps ours."""
    vocabulary = Vocabulary(size=300, pad=0, bos=1, eos=2, mask=3, cls=4, sep=5)
    sizes = {"width": 64, "layers": 2, "heads": 4, "hidden": 192}
    cut = np.std(np.asarray(jax.random.truncated_normal(jax.random.key(1), -3.0, 3.0, (100_000,))))
    found = lambda model: {name: float(np.std(leaf)) / cut for name, leaf in flatten(model, nnx.Param).items()}
    t5 = found(models.t5(vocabulary, **sizes, head_width=8, tied=False, rngs=nnx.Rngs(0)))
    layer = "decoder/stack/scanned/0"
    expected = {"encoder/table": 1.0, "encoder/head/table": 64**-0.5, "decoder/relative/table": 64**-0.5}
    expected |= {f"{layer}/{m}/query": (64 * 8) ** -0.5 for m in ("mixer", "cross")}
    expected |= {f"{layer}/cross/value": 64**-0.5, f"{layer}/mixer/out": 32**-0.5}
    expected |= {f"{layer}/feed_forward/inner": 64**-0.5, f"{layer}/feed_forward/outer": 192**-0.5}
    for name, deviation in expected.items():
        assert abs(t5[name] / deviation - 1) < 0.1, name
    ltg = found(models.ltg_bert(vocabulary, **sizes, rngs=nnx.Rngs(0)))
    for name in (
        "table",
        "relative/table",
        "stack/scanned/0/mixer/query",
        "stack/scanned/0/feed_forward/gate",
        "head/dense",
    ):
        assert abs(ltg[name] / (2 / (5 * 64)) ** 0.5 - 1) < 0.1, name
    assert abs(found(models.bert(vocabulary, **sizes, rngs=nnx.Rngs(0)))["table"] / 0.02 - 1) < 0.1
