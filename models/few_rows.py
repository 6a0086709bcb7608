"""Products of a few rows in a loop over tokens, on a CPU: kernels of our own (few_rows.cc) in place of XLA's."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform as machine
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from partitioning import devices, platform

FEW = 64
"""So many rows, at most, are taken for a step of decoding."""

SOURCE = Path(__file__).with_suffix(".cc")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-w")

_step = ContextVar("step", default=False)


@contextmanager
def token_loop() -> Iterator[None]:
    """The body of a loop over tokens: all of its products read their whole matrix for a few rows, again and again."""
    token = _step.set(True)
    try:
        yield
    finally:
        _step.reset(token)


def kernels() -> bool:
    """Whether products go by the kernels here: in a `token_loop`, on one CPU, with a compiler; a line says that there is none."""
    return _step.get() and platform() == "cpu" and devices() == 1 and compiled(os.environ.get("CXX", "c++"))


def by_kernel(x: Float[Array, "*N B D"], matrix: Array) -> bool:
    """Whether this product goes by `rows` or `table`: one of at most `FEW` rows in float32, where there are `kernels`."""
    some = x.shape[-2] <= FEW and x.size > 0 and matrix.size > 0
    return some and x.dtype == matrix.dtype == jnp.float32 and kernels()


def rows(
    x: Float[Array, "*N B D"],
    matrix: Float[Array, "*N D F"],
    *,
    lines: Int[Array, ""] | None = None,
    columns: Int[Array, ""] | None = None,
) -> Float[Array, "*N B F"]:
    """y_nbf = sum_d x_nbd matrix_ndf, a matrix read once while its product is computed.

    Args:
      x: hidden states, a few for each matrix.
      matrix: kernels, or a cache's keys or values.
      lines, columns: how many d and f are looked at, the first ones; all by default. The other columns of y are 0.
    """
    depth, width = matrix.shape[-2:]
    if lines is columns is None:
        return _rows(x, matrix, np.array([depth, width], np.int32))
    used = [depth if lines is None else lines, width if columns is None else columns]
    return _rows(x, matrix, jnp.array(used, jnp.int32))


@jax.custom_jvp
def _rows(x, matrix, used):
    # Not reshaped: XLA would not write into a cache in place that it hands on in another shape.
    return _call("rows", (*x.shape[:-1], matrix.shape[-1]), x, matrix, used)


@_rows.defjvp
def _rows_jvp(primals, tangents):
    (x, matrix, used), (dx, dmatrix, _) = primals, tangents
    depth, width = matrix.shape[-2:]
    there = (jnp.arange(depth)[:, None] < used[0]) & (jnp.arange(width) < used[1])
    return _rows(x, matrix, used), dx @ jnp.where(there, matrix, 0) + x @ jnp.where(there, dmatrix, 0)


@jax.custom_jvp
def table(x: Float[Array, "B D"], matrix: Float[Array, "V D"]) -> Float[Array, "B V"]:
    """y_bv = sum_d x_bd matrix_vd, as `rows`.

    Args:
      x: hidden states.
      matrix: a table of tokens.
    """
    return _call("table", (len(x), len(matrix)), x, matrix)


@table.defjvp
def _table_jvp(primals, tangents):
    (x, matrix), (dx, dmatrix) = primals, tangents
    return table(x, matrix), dx @ matrix.T + x @ dmatrix.T


@jax.custom_jvp
def once(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """x, computed once, where there are kernels: XLA computes even sines anew for each of their uses."""
    return _call("once", x.shape, x) if x.dtype == jnp.float32 and kernels() else x


@once.defjvp
def _once_jvp(primals, tangents):
    return once(*primals), tangents[0]


def _call(name: str, shape: tuple[int, ...], *given: Array) -> Array:
    return jax.ffi.ffi_call(f"palmette_{name}", jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")(
        *given
    )


@cache
def compiled(compiler: str) -> bool:
    """Whether the kernels are there: compiled for this machine when they are first asked for, and kept for the next time.

    Args:
      compiler: a C++ compiler, by path or by name.
    """
    try:
        library = ctypes.CDLL(str(library_file(compiler)))
    except (OSError, subprocess.SubprocessError) as problem:
        said = problem.stderr if isinstance(problem, subprocess.CalledProcessError) else str(problem)
        logging.getLogger(__name__).warning(
            "decoding takes XLA's products, which are slower: the compiler %s made no kernels (%s); install one, or set CXX",
            compiler,
            said.strip().splitlines()[0] if said.strip() else "it failed",
        )
        return False
    for name in ("rows", "table", "once"):
        jax.ffi.register_ffi_target(f"palmette_{name}", jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def library_file(compiler: str) -> Path:
    """The compiled kernels, of a name that changes with all that they are made from.

    Raises:
      OSError: there is no such compiler, or no place to write to.
      SubprocessError: it refused the source, or did not end in five minutes.
    """
    found = shutil.which(compiler)
    if found is None:
        raise OSError("it is not on PATH")
    run = partial(subprocess.run, check=True, capture_output=True, text=True, timeout=300)
    version = run([found, "--version"]).stdout
    made_from = (SOURCE.read_text(), *FLAGS, version, jax.__version__, _processor())
    name = f"few_rows-{hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]}.so"
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palmette" / name
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            # Several processes may get here at once: each writes its own, and the last name stays.
            made = Path(folder) / name
            run([found, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(made)])
            os.replace(made, place)
    return place


def _processor() -> str:
    """What code for 'this machine' depends on: a home folder can be seen by several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return machine.platform()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + machine.machine()
