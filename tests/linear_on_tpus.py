"""Compiles the kernel of linear attention, and its gradient, for TPU chips that are not here: `linear_on_tpus.py v5e:2x2`.

A process of its own: libtpu refuses XLA's flags for CPUs. Prints how many kernels are in the program.
"""

import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from models.linear_attention.pallas import kernel


def programs(topology: str, length: int = 1000) -> list[int]:
    """Kernels in the optimised program of forward and backward pass, in float32 and in bfloat16, for one chip."""
    chip = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    found = []
    for dtype in (jnp.float32, jnp.bfloat16):
        of = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(chip))
        token = of(2, length, 4, 128)
        given = (token, token, token, of(2, length, 4, dtype=jnp.float32), of(2, length, dtype=jnp.bool_))
        loss = lambda *x: sum(y.astype(jnp.float32).sum() for y in kernel(*x))
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 5)))
        text = run.lower(*given, of(2, 4, 128, 128, dtype=jnp.float32)).compile().as_text()
        found.append(text.count('custom_call_target="tpu_custom_call"'))
    return found


if __name__ == "__main__":
    sys.stdout.write(str(programs(sys.argv[1])))
