"""One answer on all hosts to whether something is broken."""

import itertools
import json

import jax

from partitioning.key_values import key_values

_questions = itertools.count()


def first_fault(fault: str | None, *, timeout_s: float) -> str | None:
    """What one of the hosts found wrong, the same on all; None where none did.

    A host that cannot read its part of a checkpoint and goes on to another would else compute checksums together with
    hosts that read the first one. All hosts must ask in the same order.

    Args:
      fault: what this host found.
      timeout_s: how long to wait for the others, in seconds.

    Raises:
      jax.errors.JaxRuntimeError: a host does not answer in time.
    """
    if jax.process_count() == 1:
        return fault
    store, place = key_values(), f"palmette/fault/{next(_questions)}/"
    store.key_value_set(f"{place}{jax.process_index()}", json.dumps(fault))
    answers = [
        json.loads(store.blocking_key_value_get(f"{place}{host}", int(timeout_s * 1000)))
        for host in range(jax.process_count())
    ]
    found = [(host, words) for host, words in enumerate(answers) if words is not None]
    return f"on host {found[0][0]}, {found[0][1]}" if found else None
