"""A request to stop (SIGTERM) lets the loop end a step, save and return; hosts agree on the step."""

from __future__ import annotations

import itertools
import signal
import threading
from contextlib import suppress
from typing import Any

import jax

from partitioning.key_values import key_values

POLL_S = 0.5
ANSWER_S = 60


class Interrupt:
    """Notes a request to stop.

    On several hosts, a request to one is a request to all. A thread on each looks for it in the store of keys that they
    share; then every host says which step it has done and takes no other until it knows all the answers, and all stop
    after the step that follows the largest of them, which none has passed.
    """

    seen = False
    _before: Any = None
    _runs = itertools.count()

    def __init__(self) -> None:
        # A process may train again: every run has keys of its own.
        self._keys = f"palmette/stop/{next(self._runs)}/"
        self._at, self._stop_at = -1, -1
        self._step, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="interrupt", daemon=True)

    def __enter__(self) -> Interrupt:
        try:
            self._before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:
            # Only the main thread may listen to signals.
            self._before = None
        if jax.process_count() > 1:
            self._thread.start()
        return self

    def asked(self, done: int) -> bool:
        """Whether the run is to end now, after `done` steps; to be asked once a step."""
        if jax.process_count() == 1:
            return self.seen
        with self._step:
            self._at = done
            return 0 <= self._stop_at <= done

    def _watch(self) -> None:
        with suppress(jax.errors.JaxRuntimeError):  # Host 0 is gone, which ends this host in other ways.
            self._agree()

    def _agree(self) -> None:
        store, own = key_values(), str(jax.process_index())
        while not self._over.wait(POLL_S):
            if self.seen:
                store.key_value_set(f"{self._keys}asked", own, allow_overwrite=True)
            if store.key_value_dir_get(self._keys):
                break
        with self._step:
            store.key_value_set(f"{self._keys}at/{own}", str(self._at))
            if not self._over.is_set():
                hosts = range(jax.process_count())
                self._stop_at = 1 + max(
                    int(store.blocking_key_value_get(f"{self._keys}at/{host}", ANSWER_S * 1000)) for host in hosts
                )

    def _note(self, *_: Any) -> None:
        self.seen = True

    def __exit__(self, *_: Any) -> None:
        if self._thread.is_alive():
            # A host that asks now is answered: this one has no step to take.
            self._over.set()
            self._thread.join()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
