"""Likelihood of held-out text: brute-force oracles, identities, and independence of batch size and devices."""

import functools
import math
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from held_out import TEXTS, TOKENIZER, VOCABULARY, records

import data
from evaluation import CausalPerplexity, MaskedLikelihood, PseudoPerplexity
from evaluation.reading import Texts, opened
from models.masks import Bidirectional, Causal
from objectives import RandomTokens
from objectives.draws import draws
from partitioning import UserError
from partitioning import data as data_parallel

LENGTH = 24
SPECIALS = sorted(vars(TOKENIZER.specials).values())


def pieces(rows):
    """Every document piece of the rows: its ids."""
    return [r["tokens"][r["segments"] == s] for r in rows for s in range(1, r["segments"].max() + 1)]


def log_softmax(trunk, sequences, mask):
    """Log probabilities at each place of each sequence, one a row, the rest of the row padding."""
    tokens = np.zeros((len(sequences), LENGTH), np.int32)
    for row, ids in zip(tokens, sequences, strict=True):
        row[: len(ids)] = ids
    segments = (np.arange(LENGTH) < np.array([len(ids) for ids in sequences])[:, None]).astype(np.int32)
    positions = np.where(segments > 0, np.arange(LENGTH), 0)

    @jax.jit
    def run(tokens, segments, positions):
        hidden = trunk(tokens, segments=segments, positions=positions, mask=mask).hidden
        return jax.nn.log_softmax(trunk.scores(hidden).logits())

    return np.asarray(run(tokens, segments, positions))


EVALUATORS = {
    "masked": MaskedLikelihood(data=records(), baseline=records(), rate=0.3, length=LENGTH, batch_size=2),
    "pseudo": PseudoPerplexity(data=records(), length=LENGTH, batch_size=2, at_once=5),
    "causal": CausalPerplexity(data=records(), length=LENGTH, batch_size=2),
}


@pytest.fixture(scope="module")
def base(judge):
    """Each evaluator's figures on one device, computed once."""
    return functools.cache(lambda name: judge(EVALUATORS[name]))


@pytest.mark.parametrize("name", EVALUATORS)
def test_neither_batch_size_nor_devices_matter(base, judge, name):
    assert all(np.isfinite(value) for value in base(name).values())
    # Another batch size and other devices at once: eight rows are the fewest that divide.
    assert judge(replace(EVALUATORS[name], batch_size=3), devices=8) == pytest.approx(base(name), rel=1e-5)


def test_every_row_is_read_once(rows):
    source = replace(records(), epochs=1)
    alone = rows(source, LENGTH)
    for size in (1, 4, 100):
        texts = Texts(opened(records(), TOKENIZER), size, LENGTH, data_parallel().place(jax.devices()[:1]))
        batches = list(texts.host_batches())
        kept = [(b["row"][i], b["tokens"][i].tolist()) for b in batches for i in range(size) if b["segments"][i].any()]
        assert kept == [(i, row["tokens"].tolist()) for i, row in enumerate(alone)]
    assert sum(len(p) for p in pieces(alone)) == sum(len(t.encode()) + 2 for t in TEXTS)


def test_a_sample_is_the_first_rows(rows):
    texts = Texts(opened(records(), TOKENIZER), 2, LENGTH, data_parallel().place(jax.devices()[:1]), most_rows=3)
    batches = list(texts.host_batches())
    assert sum(b["segments"].any(1).sum() for b in batches) == 3
    assert [b["row"].tolist() for b in batches] == [[0, 1], [2, 3]]


def test_rows_of_all_sources_have_numbers_of_their_own():
    """So that no two draw alike; padding behind the last row of a source counts on, and carries no text."""
    readers = [*opened(records(TEXTS[:3]), TOKENIZER), *opened(records(TEXTS[3:]), TOKENIZER)]
    counts = [reader.rows(length=LENGTH) for reader in readers]
    for size in (1, 2, 5):
        texts = Texts(readers, size, LENGTH, data_parallel().place(jax.devices()[:1]))
        numbers = [int(b["row"][i]) for b in texts.host_batches() for i in range(size) if b["segments"][i].any()]
        assert numbers == list(range(sum(counts)))


def test_sources_of_a_mixture_are_read_once_each(base, judge):
    """Whatever their weights, and however documents fall into rows: what is scored is the same."""
    mixed = data.Mixture(sources={"a": records(TEXTS[:3]), "b": records(TEXTS[3:])}, weights={"a": 0.9, "b": 0.1})
    found = judge(replace(EVALUATORS["causal"], data=mixed))
    assert found == pytest.approx(base("causal"), rel=1e-5)


def test_pseudo_perplexity_by_brute_force(base, trunk, rows):
    hidden, places, targets = [], [], []
    for ids in pieces(rows(replace(records(), epochs=1), LENGTH)):
        for i in np.flatnonzero(~np.isin(ids, SPECIALS)):
            hidden.append(np.where(np.arange(len(ids)) == i, TOKENIZER.specials.mask, ids))
            places.append(i)
            targets.append(ids[i])
    tokens = len(targets)
    nats = -log_softmax(trunk, hidden, Bidirectional())[np.arange(tokens), places, targets].sum()
    assert tokens == sum(len(t.encode()) for t in TEXTS)
    found = base("pseudo")
    assert found["pseudo/bits_per_token"] == pytest.approx(nats / tokens / math.log(2), rel=1e-4)
    assert found["pseudo/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    # A token is a byte here.
    assert found["pseudo/bits_per_byte"] == pytest.approx(found["pseudo/bits_per_token"])


def test_causal_perplexity_by_brute_force(base, trunk, rows):
    bos = TOKENIZER.specials.bos
    nats, tokens = 0.0, 0
    alone = pieces(rows(replace(records(), epochs=1), LENGTH))
    scores = log_softmax(trunk, [*alone, np.array([bos])], Causal())
    for ids, own in zip(alone, scores[:-1], strict=True):
        nats -= own[np.arange(len(ids) - 1), ids[1:]].sum()
        tokens += len(ids) - 1
        if ids[0] != bos:
            nats -= scores[-1][0, ids[0]]
            tokens += 1
    size = sum(len(t.encode()) for t in TEXTS)
    # Every byte and every `eos` once.
    assert tokens == size + len(TEXTS)
    found = base("causal")
    assert found["causal/bits_per_token"] == pytest.approx(nats / tokens / math.log(2), rel=1e-4)
    assert found["causal/bits_per_byte"] == pytest.approx(found["causal/bits_per_token"] * tokens / size, rel=1e-6)


@pytest.mark.parametrize("before", [False, True])
def test_masked_likelihood_by_brute_force(judge, trunk, rows, before):
    """Each hidden token's loss, taken from all states; with `before` from the state of the token before it."""
    batch = {
        name: np.stack([row[name] for row in rows(replace(records(), epochs=1), LENGTH)])
        for name in ("tokens", "segments", "positions", "row")
    }
    count = len(batch["tokens"])
    key = draws(jax.random.key(0), 0, jnp.arange(count), count)
    hide = RandomTokens(rate=0.3)(batch, VOCABULARY, step=0, key=key)
    seen = np.where(np.asarray(hide.hidden(LENGTH)), VOCABULARY.mask, batch["tokens"])
    hidden = trunk(seen, segments=batch["segments"], positions=batch["positions"], mask=Bidirectional()).hidden
    logs = np.asarray(jax.nn.log_softmax(trunk.scores(hidden).logits()), np.float64)
    losses = []
    for row in range(count):
        places = np.flatnonzero(np.asarray(hide.hidden(LENGTH))[row])
        places = [p for p in places if not before or batch["positions"][row, p]]
        losses.append([-logs[row, p - before, batch["tokens"][row, p]] / math.log(2) for p in places])
    found = judge(replace(EVALUATORS["masked"], before=before, batch_size=2))
    assert found["masked/bits_per_token"] == pytest.approx(np.mean([x for row in losses for x in row]), rel=1e-5)
    np.testing.assert_allclose(found.examples["masked/bits_per_token"], [np.mean(x) for x in losses if x], rtol=1e-5)


@pytest.mark.parametrize("name", EVALUATORS)
def test_an_examples_figures_are_those_of_it_alone(base, judge, rows, name):
    """One number for each row that is read, in their order, whatever the batch size; and the names that are told before."""
    found = base(name)
    assert {*found} == {*EVALUATORS[name].figures}
    alone = judge(replace(EVALUATORS[name], most_rows=1, batch_size=5))
    for figure, each in found.examples.items():
        assert each.shape == (len(rows(replace(records(), epochs=1), LENGTH)),)
        assert alone.examples[figure].shape == (1,)
        assert each[0] == pytest.approx(alone[figure], rel=1e-5)
        assert found[figure] == pytest.approx(each.mean(), rel=0.2)
    again = judge(replace(EVALUATORS[name], batch_size=3))
    assert {k: v.tolist() for k, v in again.examples.items()} == {
        k: pytest.approx(v.tolist(), rel=1e-5) for k, v in found.examples.items()
    }


def test_a_uniform_model_has_log2_of_the_vocabulary(judge):
    """Zero weights score every id alike, specials included."""
    uniform = math.log2(TOKENIZER.vocabulary)
    assert judge(EVALUATORS["masked"], scale=0.0)["masked/bits_per_token"] == pytest.approx(uniform, rel=1e-6)
    assert judge(EVALUATORS["pseudo"], scale=0.0)["pseudo/perplexity"] == pytest.approx(TOKENIZER.vocabulary, rel=1e-5)
    assert judge(EVALUATORS["causal"], scale=0.0)["causal/bits_per_token"] == pytest.approx(uniform, rel=1e-6)


def test_the_unigram_baseline_by_hand(judge):
    """With every token hidden, the baseline is a count over the whole text."""
    train = records(["abba", "aaa b"])
    found = judge(MaskedLikelihood(data=records(), baseline=train, rate=1.0, length=LENGTH))
    counts = Counter(b"abbaaaa b")
    ordinary = TOKENIZER.vocabulary - len(SPECIALS)
    held_out = "".join(TEXTS).encode()
    bits = -sum(math.log2((counts[b] + 1) / (9 + ordinary)) for b in held_out) / len(held_out)
    assert found["masked/bits_per_token/unigram"] == pytest.approx(bits, rel=1e-5)
    assert found["masked/accuracy/unigram"] == pytest.approx(held_out.count(b"a") / len(held_out))


def test_the_seed_chooses_what_is_hidden(base, judge):
    assert judge(replace(EVALUATORS["masked"], seed=1)) != pytest.approx(base("masked"), rel=1e-4)


def test_bits_per_byte_of_pieces_longer_than_a_byte(judge):
    """Bits per byte are bits per token times tokens over bytes, whatever a token stands for."""

    class Wide:
        """Bytes that are said to stand for three each."""

        specials, vocabulary, identity = TOKENIZER.specials, TOKENIZER.vocabulary, TOKENIZER.identity
        token_bytes = 3 * TOKENIZER.token_bytes

    found = judge(EVALUATORS["masked"], tokenizer=Wide())
    assert found["masked/bits_per_byte"] == pytest.approx(found["masked/bits_per_token"] / 3)


def test_what_is_refused(judge):
    class Other:
        """Another tokenizer."""

        identity, specials, vocabulary = "0123456789abcdef", TOKENIZER.specials, 9

    with pytest.raises(UserError, match="prepare both with one tokenizer"):
        judge(EVALUATORS["causal"], tokenizer=Other())
    with pytest.raises(UserError, match="cannot be read once"):
        judge(CausalPerplexity(data=TEXTS))
    with pytest.raises(UserError, match=r"MaskedLikelihood\.rate = 1\.7"):
        MaskedLikelihood(data=records(), rate=1.7)
