"""The awkward objectives as small cases: a model, a batch and an objective each, shared by several tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from models import (
    Attention,
    Block,
    Experts,
    FeedForward,
    LightningAttention,
    LinearizedAttention,
    PowerNorm,
    RMSNorm,
    Trunk,
    Vocabulary,
    t5,
)
from objectives import (
    CM3,
    DPO,
    EMO,
    GRPO,
    MASS,
    MEAP,
    UL2,
    AttentionTransfer,
    BagOfWords,
    CausalLM,
    Electra,
    GPTBert,
    InfoNCE,
    ListNet,
    MaskedDiffusion,
    MaskedLM,
    Models,
    MomentumQueue,
    NGrams,
    Objective,
    Phases,
    PrefixLM,
    RandomTokens,
    RetroMAE,
    Seq2Seq,
    SpanCorruption,
    Weighted,
)

ROWS, LENGTH = 16, 12
VOCABULARY = Vocabulary(size=37, pad=0, bos=1, eos=2, mask=3, cls=4, sep=5)
PLAIN = partial(FeedForward, hidden=32, bias=True)
TRUNK = partial(
    Trunk, width=16, layers=3, mixer=partial(Attention, heads=2), feed_forward=PLAIN, norm=RMSNorm, vocab_multiple=8
)
UNROTATED = partial(
    Trunk, layers=1, mixer=partial(Attention, heads=2, theta=None), feed_forward=PLAIN, vocab_multiple=8
)
EXPERTS = partial(
    Trunk,
    width=16,
    layers=4,
    vocab_multiple=8,
    pattern=[
        partial(Block, mixer=partial(Attention, heads=2), feed_forward=PLAIN, norm=RMSNorm),
        partial(
            Block,
            mixer=partial(Attention, heads=2),
            feed_forward=partial(Experts, experts=4, hidden=8),
            norm=RMSNorm,
            dropout=0.1,
        ),
    ],
)
LINEARIZED = partial(LinearizedAttention, heads=2, window=3)
HYBRID = partial(
    Trunk,
    width=16,
    layers=3,
    vocab_multiple=8,
    pattern=[
        partial(Block, mixer=partial(mixer, heads=2), feed_forward=PLAIN, norm=RMSNorm)
        for mixer in (partial(LightningAttention, layers=3, lrpe=True), LINEARIZED, Attention)
    ],
)
TWO_SIDED = partial(
    t5,
    width=16,
    layers=2,
    heads=2,
    head_width=8,
    hidden=32,
    buckets=8,
    longest=8,
    trunk=partial(Trunk, vocab_multiple=64),
)


def in_float64(make: Callable[..., Any]) -> Callable[..., Any]:
    """A model that computes in float64; a family hands that on to its trunks."""
    if make.func is Trunk:
        return partial(make, dtype="float64")
    return partial(make, trunk=partial(make.keywords["trunk"], dtype="float64"))


def text(rng: np.random.Generator, *shape: int, packed: bool = False) -> dict[str, np.ndarray]:
    """Documents of unequal length behind each other (packed), or one a row."""
    tokens = rng.integers(6, VOCABULARY.size, (*shape, LENGTH)).astype(np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for index in np.ndindex(*shape):
        start, segment = 0, 1
        while start < LENGTH - 2:
            size = int(rng.integers(3, LENGTH - start + 1))
            segments[index][start : start + size] = segment
            positions[index][start : start + size] = np.arange(size)
            tokens[index][start] = VOCABULARY.bos
            start, segment = start + size, segment + 1
            if not packed or rng.random() < 0.3:
                break
    tokens = np.where(segments > 0, tokens, VOCABULARY.pad).astype(np.int32)
    return {"tokens": tokens, "segments": segments, "positions": positions}


def nested(**texts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Texts under names."""
    return {f"{name}/{field}": value for name, fields in texts.items() for field, value in fields.items()}


def plain_batch(seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Packed text."""
    rng = np.random.default_rng(seed)
    return {**text(rng, rows, packed=True), "row": np.arange(rows, dtype=np.int32)}


def worded_batch(seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Packed text with the starts of its words."""
    batch = plain_batch(seed, rows)
    ordinary = ~np.isin(batch["tokens"], VOCABULARY.specials)
    return {**batch, "word_starts": (np.random.default_rng(seed).random(ordinary.shape) < 0.5) & ordinary}


def pair_batch(seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Queries and positives."""
    rng = np.random.default_rng(seed)
    return {**nested(query=text(rng, rows), positive=text(rng, rows)), "row": np.arange(rows, dtype=np.int32)}


def list_batch(seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Candidates with relevances, some not valid, one list empty."""
    rng = np.random.default_rng(seed)
    valid = (rng.random((rows, 3)) < 0.7).astype(np.int32)
    valid[2] = 0
    relevance = rng.random((rows, 3)).astype(np.float32)
    return {
        **nested(candidates=text(rng, rows, 3)),
        "relevance": relevance,
        "valid": valid,
        "row": np.arange(rows, dtype=np.int32),
    }


def preference_batch(seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Chosen and rejected responses."""
    rng = np.random.default_rng(seed)
    sides = {}
    for name in ("chosen", "rejected"):
        part = text(rng, rows)
        part["loss_mask"] = ((part["positions"] >= 2) & (part["segments"] > 0)).astype(np.int32)
        sides[name] = part
    return {**nested(**sides), "row": np.arange(rows, dtype=np.int32)}


def prompt_batch(seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Prompts."""
    rng = np.random.default_rng(seed)
    return {**nested(prompt=text(rng, rows)), "row": np.arange(rows, dtype=np.int32)}


def even_tokens(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A reward: the share of sampled tokens that are even."""
    return ((tokens % 2 == 0) * mask).sum(1) / np.maximum(mask.sum(1), 1)


@dataclass(frozen=True)
class Case:
    """An objective on a model and a batch.

    accumulates: whether it may be split into micro-batches.
    """

    objective: Objective
    batch: Callable[..., dict[str, np.ndarray]] = plain_batch
    model: Callable[..., Trunk] = TRUNK
    accumulates: bool = True


CASES: dict[str, Case] = {
    "mlm": Case(
        MaskedLM(select=RandomTokens(rate=lambda step: 0.3 - 0.01 * step, most=0.3)), model=partial(TRUNK, dropout=0.1)
    ),
    "clm": Case(CausalLM()),
    "clm, hybrid": Case(CausalLM(), model=HYBRID),
    "attention_transfer": Case(
        Weighted(parts={"transfer": AttentionTransfer()}, weights={"transfer": 20.0}),
        model=partial(TRUNK, mixer=LINEARIZED),
    ),
    "meap": Case(MEAP(select=NGrams(rate=0.4)), worded_batch),
    "prefix_lm": Case(PrefixLM()),
    "ul2": Case(UL2(shortest=2), model=partial(TRUNK, vocab_multiple=64)),
    "cm3": Case(CM3(mean=2.0, shortest=2), model=partial(TRUNK, vocab_multiple=64)),
    "span_corruption": Case(SpanCorruption(density=0.3, shortest=3), model=TWO_SIDED),
    "mass": Case(MASS(), model=partial(TWO_SIDED, dropout=0.1)),
    "seq2seq": Case(Seq2Seq(), pair_batch, model=TWO_SIDED),
    "electra": Case(Electra(generator=partial(TRUNK, width=8, layers=1), select=RandomTokens(rate=0.3))),
    "gpt_bert": Case(GPTBert(ratio=0.75, select=RandomTokens(rate=0.3))),
    "retromae": Case(RetroMAE(decoder=UNROTATED, longest=LENGTH)),
    "bag_of_words": Case(BagOfWords(most=2)),
    "masked_diffusion": Case(MaskedDiffusion(least=0.05)),
    "info_nce": Case(InfoNCE(), pair_batch, accumulates=False),
    "info_nce_chunked": Case(InfoNCE(chunked=8), pair_batch, model=partial(TRUNK, dropout=0.1)),
    "momentum_queue": Case(MomentumQueue(size=2 * ROWS, momentum=0.9), pair_batch),
    "list_net": Case(ListNet(), list_batch),
    "dpo": Case(DPO(beta=2.0), preference_batch),
    "experts": Case(CausalLM(), model=EXPERTS),
    "emo": Case(EMO()),
    "power_norm": Case(
        MaskedLM(), model=partial(TRUNK, norm=partial(PowerNorm, warm_up=0), placement="post", embedding_norm=True)
    ),
    "grpo": Case(GRPO(reward=even_tokens, samples=2, length=5), prompt_batch),
    "weighted": Case(Weighted(parts={"clm": CausalLM(), "mlm": MaskedLM()}, weights={"mlm": lambda step: 0.5 + step})),
    "phases": Case(
        Phases(parts={"clm": CausalLM(), "diffusion": MaskedDiffusion(least=0.05)}, lengths=(1, 1), cycle=True)
    ),
}


def build(case: Case) -> Callable[[jax.Array], dict[str, Any]]:
    """What a plan's `build` would be for a case."""
    from objectives import Companion

    def make(key: jax.Array, given: Any) -> dict[str, Companion]:
        trunk = case.model(VOCABULARY, rngs=nnx.Rngs(key))
        return {"trunk": Companion(trunk), **case.objective.companions(trunk, nnx.Rngs(jax.random.fold_in(key, 1)))}

    return make


def modules(objective: Objective, model: Callable[..., Trunk] = TRUNK, *, seed: int = 0) -> Models:
    """A model and the objective's companions with random float64 weights: built abstractly, so that nothing compiles."""
    case = Case(objective, model=in_float64(model))
    made = nnx.eval_shape(lambda: {name: one.module for name, one in build(case)(jax.random.key(0), {}).items()})
    draw = np.random.default_rng(seed)

    def fill(leaf: Any) -> Any:
        floats = np.issubdtype(leaf.dtype, np.floating)
        return jax.numpy.asarray(0.3 * draw.standard_normal(leaf.shape) if floats else np.zeros(leaf.shape, leaf.dtype))

    found = {}
    for name, module in made.items():
        graph, state = nnx.split(module)
        found[name] = nnx.merge(graph, jax.tree.map(fill, state))
    return Models(found)


def wide(tree: Any) -> Any:
    """Floats as float64, for identities."""
    return jax.tree.map(lambda x: x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x, tree)
