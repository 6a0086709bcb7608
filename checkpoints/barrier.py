"""A barrier between processes that times out and says who is missing."""

import re

import jax


def barrier(name: str, *, timeout_s: float) -> None:
    """Waits until every process has come to the barrier of this name.

    Args:
      name: the same in all processes; may be used again.
      timeout_s: how long to wait, in seconds.

    Raises:
      TimeoutError: names the processes that did not come.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost

    try:
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=int(timeout_s * 1000))
    except jax.errors.JaxRuntimeError as error:
        names = str(error).partition("timed out task names:")[2].partition("RPC:")[0]
        # A number a line, or a path that ends in "task:<number>", by the version of jax.
        missing = sorted({int(number) for number in re.findall(r"(?:^|task:)(\d+)\s*$", names, flags=re.MULTILINE)})
        who = f"process {', '.join(map(str, missing))}" if missing else f"not known ({str(error).splitlines()[0]})"
        raise TimeoutError(
            f"barrier {name!r}: waited {timeout_s:g} s as process {jax.process_index()} of {jax.process_count()}; "
            f"missing: {who}"
        ) from None
