"""Mixtures give exact shares, at any row, and carry their counts over changes of weight."""

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data.mixing import SLOTS, assigned, slots_of
from partitioning.errors import UserError

PIECES = data.SentencePiece(vocabulary=300)
NAMES = ("docs", "code", "notes")


def source(name, **options):
    return data.Records(examples=[{"text": f"{name} {i}"} for i in range(40)], pack=False, window=16, **options)


def mixture(weights=(0.5, 0.3, 0.2)):
    sources = {name: source(name) for name in NAMES}
    return data.Mixture(sources=sources, weights=dict(zip(NAMES, weights, strict=True))).open()


def entry(step, docs, code, notes=0.0, row=None):
    return data.ControlEntry(step, {"mixture": {"docs": docs, "code": code, "notes": notes}}, row)


def test_frequencies_are_those_of_what_is_read():
    """Sources by their weights, not by their length; with what stands before and after each text."""
    sources = {name: data.Records(examples=[{"text": f"{name} {i}"} for i in range(9)]) for name in NAMES}
    rows = dict(zip(NAMES, (0.5, 0.25, 0.25), strict=True))
    mixed = data.Mixture(sources=sources, weights={**rows, NAMES[0]: lambda step: 0.5 + 0 * step}).open()
    expected = 0.0
    for name, source in sources.items():
        reader = source.open()
        batch = reader.batch(0, batch_size=reader.rows(length=256), length=256, seed=0)
        counts = np.bincount(batch["tokens"][batch["segments"] > 0], minlength=reader.vocabulary)
        assert counts[reader.specials.bos] == counts[reader.specials.eos] == 9
        np.testing.assert_allclose(reader.frequencies(), counts / counts.sum(), rtol=1e-12)
        expected = expected + rows[name] * counts / counts.sum()
    np.testing.assert_allclose(mixed.frequencies(), expected, rtol=1e-12)


def test_frequencies_of_lists_of_texts():
    """Every text of every field has what stands before and after it."""
    examples = [
        {"query": f"q{i}", "candidates": [f"c{j}" for j in range(1 + i % 4)], "score": float(i)} for i in range(6)
    ]
    reader = data.Records(examples=examples).open()
    batch = reader.batch(0, batch_size=6, length=16, seed=0)
    counts = sum(
        np.bincount(batch[f"{name}/tokens"][batch[f"{name}/segments"] > 0], minlength=reader.vocabulary)
        for name in ("query", "candidates")
    )
    assert counts[reader.specials.eos] == 6 + 13
    np.testing.assert_allclose(reader.frequencies(), counts / counts.sum(), rtol=1e-12)


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(0, 1e3), min_size=1, max_size=9).filter(lambda w: sum(w) > 0))
def test_slots_are_whole_and_near_the_weights(weights):
    names = [str(i) for i in range(len(weights))]
    slots = slots_of(dict(zip(names, weights, strict=True)), names)
    assert slots.sum() == SLOTS
    assert ((slots > 0) == (np.array(weights) > 0)).all()
    exact = SLOTS * np.array(weights) / sum(weights)
    assert (np.abs(slots - exact) <= 1 + len(weights)).all()


@pytest.mark.parametrize("start", [0, 1, 777, 10**12])
def test_shares_are_exact_in_any_1024_rows(start):
    reader = mixture()
    spans = reader.spans(seed=1)
    chosen, _ = assigned(spans, np.arange(start, start + SLOTS))
    np.testing.assert_array_equal(np.bincount(chosen), slots_of({"docs": 0.5, "code": 0.3, "notes": 0.2}, NAMES))


CONTROL = [entry(50, 0.1, 0.9), entry(90, 1.0, 0.0), entry(400, 0.2, 0.3, 0.5)]


def test_each_source_is_read_in_order_across_changes():
    """The k-th row that a source gives is its row k: nothing skipped, nothing twice, whatever the log says."""
    spans = mixture().spans(seed=1, control=CONTROL, batch_size=8)
    chosen, number = assigned(spans, np.arange(6000))
    for index in range(3):
        np.testing.assert_array_equal(number[chosen == index], np.arange((chosen == index).sum()))
    for row in (0, 399, 400, 401, 3200, 5999):
        np.testing.assert_array_equal(
            spans[np.searchsorted([s.first for s in spans], row, side="right") - 1].counts(row),
            np.bincount(chosen[:row], minlength=3),
        )
    assert not (chosen[400:3200] == 2).any()
    assert (chosen[720:3200] == 0).all()


def test_a_change_leaves_earlier_batches_as_they_were():
    reader = mixture()
    for step in (0, 30, 49):
        before = reader.batch(step, batch_size=8, length=16, seed=1)
        after = reader.batch(step, batch_size=8, length=16, seed=1, control=CONTROL)
        assert all((before[k] == after[k]).all() for k in before)
    changed = reader.batch(95, batch_size=8, length=16, seed=1, control=CONTROL)
    assert not changed["source"].any()


def test_the_text_is_of_the_source_it_names():
    reader = mixture()
    batch = reader.batch(3, batch_size=64, length=16, seed=0, control=[entry(2, 0.3, 0.3, 0.4)])
    for tokens, index in zip(batch["tokens"], batch["source"], strict=True):
        assert reader.tokenizer.decode(tokens).startswith(NAMES[index])
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == reader.spec(batch_size=64, length=16)


def test_each_source_gives_every_row_once_an_epoch():
    reader = mixture()
    seen = {name: [] for name in NAMES}
    for step in range(40):
        batch = reader.batch(step, batch_size=8, length=16, seed=7)
        for tokens in batch["tokens"]:
            text = reader.tokenizer.decode(tokens)
            seen[text.split()[0]].append(text)
    for texts in seen.values():
        assert len(set(texts[:40])) == min(40, len(texts))


def test_sources_of_the_same_text_do_not_move_in_step():
    twins = data.Mixture(sources={n: source("twin") for n in NAMES[:2]}, weights={"docs": 1, "code": 1}).open()
    batch = twins.batch(0, batch_size=64, length=16, seed=0)
    one, other = (batch["tokens"][batch["source"] == index][:20] for index in (0, 1))
    assert (one != other).any()


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_and_resumes_agree(hosts):
    whole = mixture().batch(51, batch_size=8, length=16, seed=1, control=CONTROL)
    shares = [
        mixture().batch(51, batch_size=8, length=16, seed=1, control=CONTROL, host=h, hosts=hosts) for h in range(hosts)
    ]
    for name in whole:
        np.testing.assert_array_equal(np.concatenate([s[name] for s in shares]), whole[name])


def test_an_entry_with_a_row_holds_in_later_stages():
    """A stage of 100 steps of 8 rows, then one of 16 rows a step: the entry of the first one is given by its row."""
    reader = mixture()
    early = reader.spans(seed=1, control=[entry(50, 0.1, 0.9, row=400)], start=0, batch_size=8)
    late = reader.spans(seed=1, control=[entry(50, 0.1, 0.9, row=400)], start=800, batch_size=16)
    rows = np.arange(1000)
    for one, other in zip(assigned(early, rows), assigned(late, rows), strict=True):
        np.testing.assert_array_equal(one, other)
    assert early[1].first == reader.spans(seed=1, control=[entry(50, 0.1, 0.9)], batch_size=8)[1].first == 400


ROW = lambda step: 8 * step


def test_a_schedule_gives_the_shares_of_its_step():
    """Row by row against a mixture whose constant weights are the schedule's of that step."""
    weights = {"docs": optax.linear_schedule(1.0, 0.0, 40), "code": 0.5, "notes": optax.linear_schedule(0.0, 1.0, 40)}
    sources = {name: source(name) for name in NAMES}
    reader = data.Mixture(sources=sources, weights=weights).open()
    log = reader.planned(100, ROW)
    assert reader.weights == {"docs": 1.0, "code": 0.5, "notes": 0.0}
    spans = reader.spans(seed=1, control=log, batch_size=8)
    at = [span.first for span in spans]
    assert at == [8 * step for step in range(41)]
    for step in (0, 1, 17, 40, 99):
        share = {"docs": max(0, 1 - step / 40), "code": 0.5, "notes": min(1, step / 40)}
        span = spans[min(step, 40)]
        np.testing.assert_array_equal(span.before[-1], slots_of(share, NAMES))
    chosen, number = assigned(spans, np.arange(3000))
    for index in range(3):
        np.testing.assert_array_equal(number[chosen == index], np.arange((chosen == index).sum()))
    shown = reader.batch(60, batch_size=8, length=16, seed=1, control=log)
    assert not (shown["source"] == 0).any()


def test_a_schedule_that_stays_changes_nothing():
    weights = {"docs": optax.constant_schedule(0.5), "code": 0.3, "notes": lambda step: 0.2}
    reader = data.Mixture(sources={name: source(name) for name in NAMES}, weights=weights).open()
    assert reader.planned(1000, ROW) == ()
    for step in (0, 77):
        one, other = (r.batch(step, batch_size=8, length=16, seed=1) for r in (reader, mixture()))
        assert all((one[key] == other[key]).all() for key in one)


def test_epochs_are_counted_for_each_source():
    """Against the rows that were in fact given."""
    reader = mixture()
    for row in (0, 399, 401, 5000):
        spans = reader.spans(seed=1, control=CONTROL, batch_size=1)
        chosen, _ = assigned(spans, np.arange(row))
        counts = np.bincount(chosen, minlength=3)
        found = reader.epochs(row, length=16, seed=1, control=CONTROL)
        assert found == {f"epoch/{name}": count / 40 for name, count in zip(NAMES, counts, strict=True)}
    assert source("docs").open().epochs(100, length=16, seed=1) == {"epoch": 2.5}


def test_a_schedule_out_of_range_names_its_step():
    weights = {"docs": optax.linear_schedule(1.0, -1.0, 100), "code": 1.0, "notes": 1.0}
    reader = data.Mixture(sources={name: source(name) for name in NAMES}, weights=weights).open()
    with pytest.raises(UserError, match=r"weight -0.0\d* of 'docs': a number of at least 0 is wanted \(at step 51\)"):
        reader.planned(100, ROW)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"docs": 1.0}, "'code' has no weight"),
        ({"docs": 1.0, "code": 1.0, "notes": 0.0, "prose": 1.0}, "'prose' is not a source; the sources are docs, code"),
        ({"docs": -1.0, "code": 1.0, "notes": 1.0}, "weight -1.0 of 'docs'"),
        ({"docs": float("nan"), "code": 1.0, "notes": 1.0}, "weight nan of 'docs'"),
        ({"docs": 0, "code": 0, "notes": 0}, "every weight is 0"),
    ],
)
def test_wrong_weights_are_one_line(weights, message):
    with pytest.raises(UserError, match=message):
        data.Mixture(sources={name: source(name) for name in NAMES}, weights=weights)
    with pytest.raises(UserError, match=message):
        mixture().batch(0, batch_size=4, length=16, seed=0, control=[data.ControlEntry(0, {"mixture": weights})])


def test_sources_that_do_not_fit_are_named():
    own = data.Records(examples=[{"text": f"{i} words of its own, {i * i}"} for i in range(200)], tokenizer=PIECES)
    sources = {"docs": source("docs"), "code": own}
    with pytest.raises(UserError, match="'code' was tokenised with"):
        data.Mixture(sources=sources, weights={"docs": 1, "code": 1}).open()
    other = data.Records(examples=[{"query": "a", "positive": "b"}])
    with pytest.raises(UserError, match="'code' gives other arrays than 'docs'"):
        data.Mixture(sources={"docs": source("docs"), "code": other}, weights={"docs": 1, "code": 1}).open()
    inner = data.Mixture(sources={"docs": source("docs")}, weights={"docs": 1})
    with pytest.raises(UserError, match="'docs' is itself a mixture"):
        data.Mixture(sources={"docs": inner}, weights={"docs": 1}).open()


def test_a_log_out_of_order_is_refused():
    with pytest.raises(UserError, match="the mixture entry for step 5 takes effect before"):
        mixture().spans(seed=0, control=[entry(9, 1, 1), entry(5, 1, 1)])
