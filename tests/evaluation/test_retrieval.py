"""Retrieval: the measure and the search by brute force, and the evaluator on a collection with a known answer."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from flax import nnx
from held_out import TOKENIZER, VOCABULARY

import data
from evaluation import Retrieval, ndcg
from evaluation.search import top
from models import Attention, DomainRouter, Experts, Trunk
from partitioning import UserError

from .conftest import judging


def test_ndcg_by_hand():
    judged = {"a": 3, "b": 2, "c": 1}
    assert ndcg(["a", "b", "c"], judged) == pytest.approx(1.0)
    ideal = 3 + 2 / np.log2(3) + 1 / 2
    assert ndcg(["x", "a", "c"], judged) == pytest.approx((3 / np.log2(3) + 1 / 2) / ideal)
    assert ndcg(["x", "y"], judged) == 0
    assert ndcg(["a"], {}) == 0
    # Depth cuts the ranking and the ideal alike.
    assert ndcg(["b", "a"], judged, k=1) == pytest.approx(2 / 3)


def test_the_best_ranking_has_the_highest_ndcg():
    judged = {"a": 2, "b": 1, "d": 1}
    values = {order: ndcg(order, judged, k=3) for order in itertools.permutations("abcd")}
    best = max(values.values())
    assert best == pytest.approx(1.0)
    assert {"".join(o) for o, v in values.items() if v > best - 1e-9} == {"abdc", "adbc"}


@pytest.mark.parametrize("chunk", [3, 7, 100])
def test_search_by_brute_force(chunk):
    rng = np.random.default_rng(0)
    # Whole numbers: sums are exact, and there are ties.
    queries, documents = (rng.integers(-2, 3, (n, 4)).astype(np.float32) for n in (5, 23))
    scores, numbers = top(queries, documents, 6, chunk=chunk)
    every = queries @ documents.T
    expected = np.argsort(-every, axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(numbers, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(every, expected, axis=1))
    assert top(queries, documents[:2], 6)[1].shape == (5, 2)


@pytest.fixture
def folder(tmp_path):
    """Each query has a document of the same words, which any encoder puts at distance 0."""
    words = ["open a file", "sort a list of numbers", "parse the date", "close the socket", "join two paths"]
    corpus = {f"d{i}": text for i, text in enumerate(words)}
    queries = {f"q{i}": text for i, text in enumerate(words)}
    data.Retrieval(queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(5)}).save(tmp_path, "test")
    return str(tmp_path)


def test_equal_texts_are_found(judge, folder):
    evaluator = Retrieval(folder=folder, split="test", length=32, batch_size=3)
    found = judge(evaluator)
    assert found == {"retrieval/ndcg@10": pytest.approx(1.0)}
    assert tuple(found) == evaluator.figures == tuple(found.examples)
    assert found.examples["retrieval/ndcg@10"].tolist() == pytest.approx([1.0] * 5)
    assert judge(evaluator, devices=8) == found


def test_texts_go_to_the_expert_of_the_route(folder):
    """The other expert is no number, and nothing of it is seen; without a route the router says what it needs."""
    experts = partial(Experts, experts=2, top_k=1, hidden=8, router=DomainRouter)
    made = Trunk(
        VOCABULARY, width=16, layers=1, mixer=partial(Attention, heads=2), feed_forward=experts, rngs=nnx.Rngs(0)
    )
    outer = made.stack.layers["0"].feed_forward.outer
    outer.set_value(outer.get_value().at[0].set(np.nan))
    judge, evaluator = judging(made), Retrieval(folder=folder, split="test", length=32, batch_size=3, route=1)
    assert judge(evaluator) == {"retrieval/ndcg@10": pytest.approx(1.0)}
    with pytest.raises(UserError, match="this call has no routes"):
        judge(replace(evaluator, route=None))


def test_an_encoder_that_sees_no_difference_finds_by_number_only(judge, folder):
    """Zero weights give zero vectors: every query ranks d0, d1, .. and finds its own at its number."""
    found = judge(Retrieval(folder=folder, split="test", length=32, k=3), scale=0.0)
    assert found == {"retrieval/ndcg@3": pytest.approx((1 + 1 / np.log2(3) + 1 / 2) / 5)}
    # In the order of the data.
    assert found.examples["retrieval/ndcg@3"].tolist() == pytest.approx([1, 1 / np.log2(3), 1 / 2, 0, 0])


@pytest.mark.parametrize(("begin", "end"), [("bos", "eos"), (None, "eos"), ("cls", None)])
def test_a_ranking_by_hand(judge, trunk, tmp_path, begin, end):
    """Specials around each text, states, their mean, cosines, order: one text at a time."""
    words = ["open a file", "sort a list of numbers", "parse the date", "close the socket", "join two paths"]
    corpus, queries = dict(zip("abcde", words, strict=True)), {"x": "read a file", "y": "sort", "z": "two dates"}
    qrels = {"x": {"c": 2, "a": 1}, "y": {"e": 1}, "z": {"d": 1, "b": 2}}
    data.Retrieval(queries, corpus, qrels).save(tmp_path, "test")

    def vector(text):
        special = lambda name: [] if name is None else [getattr(TOKENIZER.specials, name)]
        tokens = np.array([[*special(begin), *TOKENIZER.encode(text), *special(end)]])
        positions = np.arange(tokens.shape[1])[None]
        hidden = np.asarray(trunk(tokens, segments=np.ones_like(tokens), positions=positions).hidden)[0].mean(0)
        return hidden / np.linalg.norm(hidden)

    documents = np.stack([vector(text) for text in corpus.values()])
    gains = []
    for name, text in queries.items():
        ranked = [list(corpus)[n] for n in np.argsort(-documents @ vector(text))]
        gains.append(ndcg(ranked, qrels[name], 10))
    evaluator = Retrieval(folder=str(tmp_path), split="test", length=32, batch_size=2, begin=begin, end=end)
    assert judge(evaluator) == {"retrieval/ndcg@10": pytest.approx(np.mean(gains), rel=1e-6)}


def test_python_search_is_the_default(judge):
    (value,) = judge(Retrieval(length=8, batch_size=512)).values()
    assert 0 <= value < 1


def test_an_empty_split(judge, folder):
    with pytest.raises(UserError, match="no such file"):
        judge(Retrieval(folder=folder, split="dev"))
