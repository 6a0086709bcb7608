"""The store of keys and values that the hosts of a run share."""

from typing import Any


def key_values() -> Any:
    """The client of the store that jax's coordinator keeps in host 0; None in a run on one host.

    The store has no public name: Orbax takes it from the same place.
    """
    from jax._src.distributed import global_state

    return global_state.client
