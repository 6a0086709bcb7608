"""Computing the next batches in a thread while the device works."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Yields `make(first), make(first + 1), ..`, computed ahead by one thread.

    An exception in `make` is raised by the `next` that would have returned its value, and by every `next` after it. Use
    it in a `with` block, or call `close`. Waits are on a condition that every change of state notifies, so no side
    can wait for a thread that has ended.

    Arguments:
        make: step -> batch.
        first: the first step.
        last: the step before which to stop; None never stops.
        depth: how many results may wait.
    """

    def __init__(self, make: Callable[[int], T], first: int = 0, last: int | None = None, depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth = {depth}: at least 1 is wanted")
        self._make, self._last, self._depth = make, last, depth
        self._change = threading.Condition()
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._next = first
        self._run = 0  # a restart makes the results of the run before it void
        self._making = False
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _wanted(self) -> bool:
        return (
            self._error is None and len(self._ready) < self._depth and (self._last is None or self._next < self._last)
        )

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or self._wanted())
                if self._closed:
                    return
                step, run = self._next, self._run
                self._next += 1
                self._making = True
            error: BaseException | None = None
            try:
                made = self._make(step)
            except BaseException as raised:
                error = raised
            with self._change:
                self._making = False
                if run == self._run:
                    if error is None:
                        self._ready.append(made)
                    else:
                        self._error = error
                self._change.notify_all()

    def restart(self, step: int) -> None:
        """Throw away what was computed ahead and go on from `step`, e.g. after the control log has grown."""
        with self._change:
            self._run += 1
            self._ready.clear()
            self._error = None
            self._next = step
            self._change.notify_all()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._change:
            self._change.wait_for(lambda: bool(self._ready) or self._closed or self._over())
            if self._closed:
                raise RuntimeError("this prefetch is closed")
            if not self._ready:
                if self._error is not None:
                    raise self._error
                raise StopIteration
            out = self._ready.popleft()
            self._change.notify_all()
            return out

    def _over(self) -> bool:
        done = self._last is not None and self._next >= self._last and not self._making
        return self._error is not None or done

    def close(self) -> None:
        """Stop the thread and wait for the batch that it is making."""
        with self._change:
            self._closed = True
            self._ready.clear()
            self._change.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
