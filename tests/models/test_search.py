"""Beam and contrastive search against every sequence there is, and against a search without a cache."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from writing import full_passes, log_softmax, prompts, texts, writer

from models import Vocabulary
from models.decoding import Beam, Contrastive, Stop, TrunkDecoder, generate
from partitioning import UserError

TINY = Vocabulary(size=4, pad=0, bos=-1, eos=1, mask=-1, cls=-1, sep=-1)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def written(trunk, given, strategy, stop):
    """Continuations on the host."""
    graph, state = nnx.split(trunk)
    run = lambda s, p: generate(
        TrunkDecoder(nnx.merge(graph, s)), p, strategy, stop, jax.random.split(jax.random.key(0), 3)
    )
    return jax.device_get(jax.jit(run)(state, given))


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.7])
def test_enough_beams_find_the_best_of_all_sequences(penalty):
    """Over a vocabulary of 4 and up to 4 tokens: 64 sequences cannot all be pruned, so the best one is found."""
    longest = 4
    trunk, stop = writer("windows", TINY), Stop(length=longest, ends=(1, 3), pad=0)
    given = prompts(3, 5, 1)
    given = type(given)(given.tokens % TINY.size, given.segments)
    found = written(trunk, given, Beam(beams=64, penalty=penalty), stop)
    passed = full_passes(trunk, 5 + longest)
    sizes = set()
    for row, ids in enumerate(texts(given)):
        scores: dict[tuple[int, ...], float] = {}
        logs: dict[tuple[int, ...], np.ndarray] = {}
        for sequence in itertools.product(range(TINY.size), repeat=longest):
            end = next((i + 1 for i, token in enumerate(sequence) if token in stop.ends), longest)
            if (cut := sequence[:end]) in scores:
                continue
            # One pass a beginning: the logits behind all but the last token.
            if (begun := sequence[: longest - 1]) not in logs:
                logs[begun] = log_softmax(passed([*ids, *begun])[1][len(ids) - 1 :])
            scores[cut] = sum(logs[begun][t, token] for t, token in enumerate(cut)) / end**penalty
        best = max(scores, key=lambda cut: scores[cut])
        size = found.drawn[row].sum()
        sizes.add(size)
        assert tuple(found.tokens[row, :size]) == best
        assert not found.tokens[row, size:].any()
        np.testing.assert_allclose(found.log_probability[row].sum() / size**penalty, scores[best], atol=1e-9)
    if penalty <= 0:
        # Otherwise nothing here would depend on where sequences end.
        assert sizes != {longest}


def beams_by_hand(passed, ids, beams, penalty, stop):
    """Beam search with lists, one full pass a sequence."""
    going, ended = [([], 0.0)], []
    for _ in range(stop.length):
        longer = [
            ([*tokens, v], score + log)
            for tokens, score in going
            for v, log in enumerate(log_softmax(passed([*ids, *tokens])[1][-1]))
        ]
        longer.sort(key=lambda pair: -pair[1])
        ended += [(t, s / len(t) ** penalty) for t, s in longer[:beams] if t[-1] in stop.ends]
        ended = sorted(ended, key=lambda pair: -pair[1])[:beams]
        going = [pair for pair in longer if pair[0][-1] not in stop.ends][:beams]
    ended += [(t, s / stop.length**penalty) for t, s in going]
    return max(ended, key=lambda pair: pair[1])


def test_a_beam_that_prunes():
    """Few beams, against a search by lists that never stops early: rows of the cache follow their sequences."""
    trunk, given = writer("windows"), prompts(3, 5, 1)
    passed = full_passes(trunk, 5 + 6)
    for penalty in (0.0, 1.3):
        stop = Stop(length=6, ends=(2, 8), pad=0)
        found = written(trunk, given, Beam(beams=3, penalty=penalty), stop)
        for row, ids in enumerate(texts(given)):
            tokens, score = beams_by_hand(passed, ids, 3, penalty, stop)
            size = found.drawn[row].sum()
            assert list(found.tokens[row, :size]) == tokens
            np.testing.assert_allclose(found.log_probability[row].sum() / size**penalty, score, atol=1e-9)


def test_contrastive_search_by_hand():
    """One full pass for every candidate; at a prompt of one token too."""
    alpha, k, length = 0.6, 4, 6
    trunk, given = writer("windows"), prompts(3, 5, 1)
    found = written(trunk, given, Contrastive(alpha=alpha, candidates=k), Stop(length=length))
    passed = full_passes(trunk, 5 + length)
    direction = lambda h: h / np.linalg.norm(h, axis=-1, keepdims=True)
    moved = 0
    for row, ids in enumerate(texts(given)):
        for t in range(length):
            chances = np.exp(log_softmax(passed(ids)[1][-1]))
            candidates = np.argsort(-chances)[:k]
            scores = []
            for v in candidates:
                states = direction(passed([*ids, int(v)])[0])
                scores.append((1 - alpha) * chances[v] - alpha * (states[:-1] @ states[-1]).max())
            chosen = int(candidates[int(np.argmax(scores))])
            moved += chosen != chances.argmax()
            assert found.tokens[row, t] == chosen
            np.testing.assert_allclose(found.log_probability[row, t], np.log(chances[chosen]), atol=1e-9)
            ids.append(chosen)
    assert moved > 3
    with pytest.raises(UserError, match="candidates = 14: the vocabulary has 13 tokens"):
        written(trunk, given, Contrastive(candidates=14), Stop(length=1))
