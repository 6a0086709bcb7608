"""The TPU kernel of linear attention beside the chunked forms, by what their compiled programs move.

    python -m benchmarks linear_kernel

One row of 8,192 tokens, 16 heads of 128 features, bfloat16, compiled by libtpu for one v5p chip that is not here. Moved is what
goes between chip and main memory; the least is queries, keys, values and outputs once. The time is that of the memory alone.
'Steady' has one decay a head for all tokens, 'decayed' one for each; both in chunks of 128, as a TPU takes them, 'kernel' is
`backend = 'pallas'`, whose backward pass is that of 'decayed'.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import results

TOPOLOGY, LENGTH, HEADS, WIDTH = "v5p:2x2x1", 8192, 16, 128


def moved(form: str, backward: bool) -> tuple[float, int]:
    """Bytes that a call moves, and bytes of its temporaries."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from models.linear_attention.decayed import decayed
    from models.linear_attention.pallas import kernel
    from partitioning import data
    from partitioning.hlo import parse
    from partitioning.topologies import topology
    from partitioning.traffic import traffic

    chip = topology(TOPOLOGY).devices()[0]
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(chip))
    calls: dict[str, Callable[..., Any]] = {
        "steady": decayed,
        "decayed": lambda *given: decayed(*given, chunk=128),
        "kernel": kernel,
    }
    token = of(1, LENGTH, HEADS, WIDTH)
    decay = of(1, 1 if form == "steady" else LENGTH, HEADS, dtype=jnp.float32)
    given = (token, token, token, decay, of(1, LENGTH, dtype=jnp.bool_), of(1, HEADS, WIDTH, WIDTH, dtype=jnp.float32))
    run = calls[form]
    if backward:
        total = lambda *given: sum(x.astype(jnp.float32).sum() for x in calls[form](*given))
        run = jax.value_and_grad(total, argnums=(0, 1, 2, 3, 5))
    with data().place([chip]).scope():
        compiled = jax.jit(run).lower(*given).compile()
    return traffic(parse(compiled.as_text())), compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Compiles, in a process each: libtpu refuses XLA's flags for CPUs."""
    from partitioning.topologies import topology

    bandwidth = topology(TOPOLOGY).pod.hbm_bandwidth
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    rows = []
    for backward in (False, True):
        for form in ("steady", "decayed", "kernel"):
            code = f"from benchmarks.linear_kernel import moved; print(*moved({form!r}, {backward}))"
            out = subprocess.run(
                [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
            )
            traffic, temporary = map(float, out.stdout.split()[-2:])
            way = "forward and backward" if backward else "forward"
            cells = (
                f"{traffic / 2**20:,.0f} MiB",
                f"{1e6 * traffic / bandwidth:,.0f}",
                f"{temporary / 2**20:,.0f} MiB",
            )
            rows.append((way, form, *cells))
    least = 4 * LENGTH * HEADS * WIDTH * 2
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            results.table(("pass", "form", "moved", "us", "temporaries"), rows),
            "",
            f"The least for a forward pass is {least / 2**20:,.0f} MiB.",
        ]
    )
    results.write("linear_kernel", "Linear attention's TPU kernel", body)


if __name__ == "__main__":
    main()
