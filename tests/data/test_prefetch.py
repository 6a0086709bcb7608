"""Prefetching changes when batches are made, never which; it hands on errors and never hangs."""

import threading

import pytest

from data import Prefetch


def test_it_yields_what_the_function_gives():
    with Prefetch(lambda step: step * step, 3, 10) as batches:
        assert list(batches) == [s * s for s in range(3, 10)]
        assert list(batches) == []


def test_an_empty_range_ends_at_once():
    with Prefetch(lambda step: step, 5, 5) as batches:
        assert list(batches) == []


def test_an_error_is_raised_where_its_value_was_due_and_again():
    def make(step):
        if step == 2:
            raise ValueError("row 2 is bad")
        return step

    with Prefetch(make) as batches:
        assert [next(batches), next(batches)] == [0, 1]
        for _ in range(2):
            with pytest.raises(ValueError, match="row 2 is bad"):
                next(batches)


def test_it_works_ahead_by_its_depth_and_no_further():
    made = []
    ready = threading.Event()

    def make(step):
        made.append(step)
        if step == 2:
            ready.set()
        return step

    with Prefetch(make, depth=3) as batches:
        assert ready.wait(10)
        assert next(batches) == 0
    assert max(made) <= 4


def test_closing_while_full_or_while_making_ends_the_thread():
    begun, go = threading.Event(), threading.Event()

    def slow(step):
        begun.set()
        go.wait(10)
        return step

    batches = Prefetch(slow)
    assert begun.wait(10)
    closer = threading.Thread(target=batches.close)
    closer.start()
    go.set()
    closer.join(10)
    assert not closer.is_alive()
    assert not batches._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
    full = Prefetch(lambda step: step)
    next(full)
    full.close()
    assert not full._thread.is_alive()


def test_a_restart_forgets_what_was_made_ahead():
    scale = [1]
    with Prefetch(lambda step: step * scale[0], 0, 9) as batches:
        assert [next(batches) for _ in range(4)] == [0, 1, 2, 3]
        scale[0] = 10
        batches.restart(4)
        assert list(batches) == [40, 50, 60, 70, 80]


def test_a_result_begun_before_a_restart_is_thrown_away():
    begun, go = threading.Event(), threading.Event()
    scale = [1]

    def make(step):
        made = step * scale[0]
        if step == 0 and not go.is_set():
            begun.set()
            go.wait(10)
        return made

    with Prefetch(make, 0, 3) as batches:
        assert begun.wait(10)
        scale[0] = 10
        batches.restart(1)
        go.set()
        assert list(batches) == [10, 20]
