"""Packing mixes nothing and loses nothing, and its row count depends on lengths alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data import packing

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60).map(np.array)


def best_fit_one_by_one(sizes, row_length):
    """The textbook form: for each piece, scan all rows for the fullest that has room."""
    room = []
    for size in sizes:
        fits = [r for r in range(len(room)) if room[r] >= size]
        if fits:
            room[min(fits, key=lambda r: room[r])] -= size
        else:
            room.append(row_length - size)
    return len(room), sorted(room)


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 17), min_size=1, max_size=80))
def test_best_fit_is_the_textbook_one(sizes):
    sizes = np.sort(np.array(sizes))[::-1]
    rows, total = packing.best_fit(sizes, 17)
    used = np.bincount(rows, weights=sizes, minlength=total)
    assert used.max() <= 17
    assert (total, sorted((17 - used).astype(int).tolist())) == best_fit_one_by_one(sizes.tolist(), 17)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, row_length=st.integers(4, 24), seed=st.integers(0, 9))
def test_every_token_once_and_documents_apart(lengths, row_length, seed):
    total = int(lengths.sum())
    tokens = np.arange(100, 100 + total)
    document = np.repeat(np.arange(len(lengths)), lengths)
    packed = packing.pack(lengths, row_length, [seed])
    assert packed.rows == packing.count_rows(lengths, row_length)
    got, segments, positions = packing.fill(tokens, packed, 0, packed.rows, row_length, pad=0)
    assert got.shape == (packed.rows, row_length)
    assert sorted(got[segments > 0].tolist()) == tokens.tolist()
    assert not got[segments == 0].any()
    assert not positions[segments == 0].any()
    for row in range(packed.rows):
        used = segments[row][segments[row] > 0]
        assert (np.diff(segments[row][: len(used)]) >= 0).all()  # padding last, segments in order
        assert set(used.tolist()) == set(range(1, 1 + used.max(initial=0)))
        for segment in range(1, 1 + used.max(initial=0)):
            here = segments[row] == segment
            ids = got[row][here]
            assert len(set(document[ids - 100].tolist())) == 1
            np.testing.assert_array_equal(np.diff(ids), 1)
            np.testing.assert_array_equal(positions[row][here], np.arange(here.sum()))


def test_row_count_ignores_seed_and_order():
    lengths = np.random.default_rng(0).integers(1, 200, 500)
    counts = {packing.pack(np.roll(lengths, k), 64, [k]).rows for k in range(5)}
    assert len(counts) == 1
    # A lower bound that no packing beats, and best fit is close to.
    assert counts.pop() <= 1.05 * np.ceil(lengths.sum() / 64)


def test_a_seed_changes_which_equal_pieces_meet():
    lengths = np.full(64, 5)
    tokens = np.arange(lengths.sum())
    one, other = (
        packing.fill(tokens, p, 0, p.rows, 16, 0)[0] for p in (packing.pack(lengths, 16, [s]) for s in (1, 2))
    )
    assert (one != other).any()


def test_part_of_the_rows_is_part_of_the_whole():
    lengths = np.random.default_rng(1).integers(0, 60, 80)
    tokens = np.arange(lengths.sum())
    packed = packing.pack(lengths, 32, [0])
    whole = packing.fill(tokens, packed, 0, packed.rows, 32, 0)
    for start, stop in ((0, 1), (3, 9), (packed.rows - 2, packed.rows), (5, 5)):
        for a, b in zip(packing.fill(tokens, packed, start, stop, 32, 0), whole, strict=True):
            np.testing.assert_array_equal(a, b[start:stop])
    order = np.random.default_rng(2).permutation(packed.rows)
    for a, b in zip(packing.fill(tokens, packed.reordered(order), 0, packed.rows, 32, 0), whole, strict=True):
        np.testing.assert_array_equal(a, b[order])
