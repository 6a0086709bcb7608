"""Compiles small programs of known collectives for TPU chips that are not here: `programs_on_tpus.py scan|slices`.

A process of its own: libtpu refuses XLA's flags for CPUs. Prints what the program sends, and with `--text` the program, as
`tests/partitioning/programs` has it.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from partitioning.collectives import collectives
from partitioning.hlo import parse
from partitioning.mesh import make_mesh
from partitioning.topologies import topology

TRIPS = 7


def scan(mesh):
    """Sums over `tensor`, gathers and scatters over `fsdp`, passes around `tensor`; seven times."""

    def trip(x, _):
        def part(y):
            y = jax.lax.psum(y, "tensor")
            y = jax.lax.all_gather(y * 2, "fsdp", tiled=True)
            y = jax.lax.psum_scatter(jnp.sin(y), "fsdp", tiled=True)
            return jax.lax.ppermute(y, "tensor", [(0, 1), (1, 0)])

        cut = PartitionSpec("fsdp", "tensor")
        return jax.shard_map(part, mesh=mesh, in_specs=cut, out_specs=cut)(x), None

    place = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    x = jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=place)
    return jax.jit(lambda x: jax.lax.scan(trip, x, None, length=TRIPS)[0]).lower(x).compile()


def slices(mesh):
    """A step of gradient descent, its matrix cut over `fsdp` and `tensor`, its rows over `slice` and `fsdp`."""

    def step(w, x):
        return w - jax.grad(lambda w: (jnp.tanh(x @ w) ** 2).sum())(w)

    place = lambda *names: NamedSharding(mesh, PartitionSpec(*names))
    w = jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=place("fsdp", "tensor"))
    x = jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=place(("slice", "fsdp")))
    return jax.jit(step, out_shardings=w.sharding).lower(w, x).compile()


if __name__ == "__main__":
    asked = sys.argv[1]
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, topology("v5e:2x2", 1 + (asked == "slices")).devices())
    text = {"scan": scan, "slices": slices}[asked](mesh).as_text()
    if "--text" in sys.argv:
        text = text[re.search(r"^%", text, re.MULTILINE).start() :]
        sys.stdout.write(re.sub(r", (?:metadata=\{[^}]*\}|backend_config=\{.*\}$)", "", text, flags=re.MULTILINE))
    else:
        rows = [(one.kind, one.axes, one.bytes, one.count) for one in collectives(parse(text), mesh)]
        sys.stdout.write(json.dumps(rows))
