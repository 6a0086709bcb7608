"""Kernels for a few rows: numpy's products in float64, rows that know nothing of each other, and when they are used."""

import ctypes
import logging
import math
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from writing import VOCABULARY, prompts, writer

from models import few_rows, t5
from models.decoding import Greedy, Stop, decoder_of, generate, unrolled
from models.few_rows import FEW, by_kernel, compiled, library_file, once, rows, table, token_loop
from partitioning import fsdp_tensor
from training.flops import forward_flops

# Rows in whole and broken groups; depths below, at and above a vector and a block; widths with and without a strip.
SIZES = [
    (1, 1, 1),
    (1, 512, 192),
    (2, 128, 64),
    (5, 7, 63),
    (6, 129, 64),
    (7, 256, 65),
    (4, 514, 100),
    (13, 300, 131),
    (16, 1408, 512),
    (FEW, 33, 260),
]


@pytest.fixture(autouse=True)
def _compiled():
    assert compiled("c++")


def numbers(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_products_are_those_of_numpy(size):
    """Within the rounding of a sum: its terms' sizes, times float32's step."""
    b, d, f = size
    x, matrix = numbers(b, d), numbers(d, f)
    wide = x.astype(np.float64) @ matrix
    bound = d**0.5 * np.finfo(np.float32).eps * (np.abs(x).astype(np.float64) @ np.abs(matrix))
    for found in (rows(x, matrix), table(x, matrix.T.copy())):
        assert found.shape == (b, f)
        assert found.dtype == jnp.float32
        assert (np.abs(np.asarray(found) - wide) <= bound + 1e-7).all()


# Narrower vectors than this machine may have.
OLDER = ("x86-64", "x86-64-v3") if platform.machine() == "x86_64" and "avx2" in few_rows._processor() else ()


@pytest.mark.parametrize("processor", OLDER)
def test_products_are_those_of_numpy_on_older_processors(processor, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [f"-march={processor}" if flag == "-march=native" else flag for flag in few_rows.FLAGS]
    monkeypatch.setattr(few_rows, "FLAGS", tuple(flags))
    library = ctypes.CDLL(str(library_file("c++")))
    for name in ("rows", "table"):
        target = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(f"{processor}_{name}", target, platform="cpu")
    for b, d, f in SIZES:
        x, matrix = numbers(b, d), numbers(d, f)
        bound = d**0.5 * np.finfo(np.float32).eps * (np.abs(x).astype(np.float64) @ np.abs(matrix)) + 1e-7
        for name, *given in (("rows", matrix, np.array([d, f], np.int32)), ("table", matrix.T.copy())):
            found = jax.ffi.ffi_call(f"{processor}_{name}", jax.ShapeDtypeStruct((b, f), jnp.float32))(x, *given)
            assert (np.abs(np.asarray(found) - x.astype(np.float64) @ matrix) <= bound).all(), (name, b, d, f)


@pytest.mark.parametrize(("n", "b", "d", "f"), [(3, 2, 64, 192), (4, 2, 192, 64), (5, 7, 200, 130), (2, 1, 9, 10)])
def test_products_of_several_matrices_are_those_one_by_one(n, b, d, f):
    x, matrix = numbers(n, 2, b, d), numbers(n, 2, d, f)
    found = np.asarray(rows(x, matrix))
    assert found.shape == (n, 2, b, f)
    for i, j in np.ndindex(n, 2):
        np.testing.assert_allclose(found[i, j], np.asarray(rows(x[i, j], matrix[i, j])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3), (1, 9), (5, 2), (1, 2)])
@pytest.mark.parametrize(("lines", "columns"), [(200, 130), (131, 97), (3, 64), (1, 1), (0, 130), (200, 0), (999, -1)])
def test_a_part_of_a_matrix_is_what_is_looked_at(shape, lines, columns):
    """What lies outside is never read, be it no number."""
    n, b = shape
    x, matrix = numbers(n, b, 200), numbers(n, 200, 130)
    there = (np.arange(200)[:, None] < lines) & (np.arange(130) < columns)
    run = jax.jit(lambda matrix, **used: rows(x, matrix, **used))
    found = np.asarray(run(np.where(there, matrix, np.nan), lines=lines, columns=columns))
    np.testing.assert_allclose(found, x @ np.where(there, matrix, 0), rtol=1e-4, atol=1e-4)
    tangents = jax.jvp(partial(rows, lines=lines, columns=columns), (x, matrix), (x[::-1].copy(), matrix[::-1].copy()))[
        1
    ]
    expected = x[::-1] @ np.where(there, matrix, 0) + x @ np.where(there, matrix[::-1], 0)
    np.testing.assert_allclose(tangents, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("product", [rows, table])
def test_a_row_s_bits_do_not_depend_on_the_others(product):
    x = numbers(40, 300)
    matrix = numbers(300, 200) if product is rows else numbers(200, 300)
    together = np.asarray(product(x, matrix))
    for begin, many in ((0, 17), (23, 7), (3, 34)):
        np.testing.assert_array_equal(
            np.asarray(product(x[begin : begin + many], matrix)), together[begin : begin + many]
        )
    few = np.asarray(product(x[:6], matrix))
    for row in (0, 3, 5):
        np.testing.assert_array_equal(np.asarray(product(x[row : row + 1], matrix))[0], few[row])
    # The terms of few rows are added in another order.
    np.testing.assert_allclose(few, together[:6], rtol=1e-4, atol=1e-4)


def test_more_rows_than_few_are_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="at most 64 rows"):
        rows(numbers(FEW + 1, 8), numbers(8, 64))


@pytest.mark.parametrize("product", [rows, table])
def test_what_is_no_number_stays_in_its_row(product):
    x, matrix = numbers(3, 40), numbers(*((40, 70) if product is rows else (70, 40)))
    x[1, 3] = np.nan
    found = np.asarray(product(x, matrix))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()
    x[1, 3] = np.inf
    assert np.isinf(np.asarray(product(x, matrix))[1]).all()


def test_tangents_are_those_of_the_product():
    x, matrix, dx, dmatrix = numbers(4, 30), numbers(30, 20), numbers(4, 30)[::-1].copy(), numbers(30, 20)[::-1].copy()
    for product, turn in ((rows, lambda m: m), (table, lambda m: m.T.copy())):
        found = jax.jvp(product, (x, turn(matrix)), (dx, turn(dmatrix)))
        expected = jax.jvp(jnp.matmul, (x, matrix), (dx, dmatrix))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_many_calls_at_once_all_end():
    """More callers than the pool has threads: none waits for a helper that cannot begin."""
    x, matrix = numbers(16, 256), numbers(256, 640)
    run = jax.jit(lambda x: rows(rows(x, matrix) @ matrix.T, matrix))
    expected = np.asarray(run(x))
    with ThreadPoolExecutor(16) as pool:
        for found in pool.map(lambda _: np.asarray(run(x)), range(200), timeout=120):
            np.testing.assert_array_equal(found, expected)


def searched(name):
    """A model that continues texts: `WRITERS`', or an encoder-decoder whose attention has a bias."""
    if name != "t5":
        return writer(name)
    made = t5(VOCABULARY, width=8, layers=2, heads=2, head_width=4, hidden=12, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(4)
    graph, state = nnx.split(made)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(draw.standard_normal(x.shape), x.dtype), state))


def continued(name, rows, kernels):
    """A greedy continuation in float32, with the program's text."""
    given = prompts(*(3 + row % 5 for row in range(rows)))
    graph, state = nnx.split(unrolled(searched(name)))
    stop = Stop(length=5, pad=VOCABULARY.pad)
    run = lambda s, p, k: generate(decoder_of(nnx.merge(graph, s)), p, Greedy(), stop, k)
    keys = jax.random.split(jax.random.key(5), rows)
    with pytest.MonkeyPatch.context() as patch:
        if not kernels:
            patch.setattr(few_rows, "compiled", lambda compiler: False)
        made = jax.jit(run).lower(state, given, keys).compile()
    return jax.device_get(made(state, given, keys)), made.as_text()


@pytest.mark.parametrize(
    ("name", "many"), [("llama", 1), ("llama", 3), ("llama", 9), ("plain", 1), ("t5", 1), ("t5", 4)]
)
def test_decoding_is_the_same_with_the_kernels(name, many):
    with_them, program = continued(name, many, True)
    without, plain = continued(name, many, False)
    assert "palmette_rows" in program
    assert "palmette_table" in program
    assert "palmette" not in plain
    np.testing.assert_array_equal(with_them.tokens, without.tokens)
    np.testing.assert_allclose(with_them.log_probability, without.log_probability, atol=1e-5)


def test_a_single_row_s_cache_is_written_in_place():
    """Nothing of a cache's size is copied in the loop."""
    _, program = continued("llama", 1, True)
    (body,) = set(re.findall(r"body=%([\w.-]+)", program))
    lines = program[program.index(f"\n%{body} (") :].split("\n}\n")[0].splitlines()
    cache = 2 * (3 + 5) * 2
    copied = [line for line in lines if re.search(r" copy\(", line)]
    sizes = [math.prod(map(int, filter(None, re.search(r"\[([\d,]*)\]", line)[1].split(",")))) for line in copied]
    assert max(sizes, default=0) < cache, copied


def test_they_are_taken_in_a_loop_over_tokens_and_nowhere_else():
    x, matrix = jnp.ones((4, 8)), jnp.ones((8, 8))
    assert not by_kernel(x, matrix)
    with token_loop():
        assert by_kernel(x, matrix)
        assert not by_kernel(jnp.ones((FEW + 1, 8)), matrix)
        assert not by_kernel(x.astype(jnp.bfloat16), matrix)
        assert not by_kernel(x, matrix.astype(jnp.bfloat16))
        with fsdp_tensor(2).place(jax.devices()[:2]).scope():
            assert not by_kernel(x, matrix)
    assert not by_kernel(x, matrix)


def test_what_is_computed_once_is_what_it_was():
    x = numbers(3, 4)
    with token_loop():
        run = jax.jit(lambda x: once(jnp.sin(x)))
        assert "palmette_once" in run.lower(x).as_text()
        np.testing.assert_array_equal(run(x), jnp.sin(x))
        np.testing.assert_array_equal(jax.jvp(once, (x,), (2 * x,))[1], 2 * x)
    assert "palmette" not in jax.jit(lambda x: once(jnp.sin(x))).lower(x).as_text()


def test_their_flops_are_counted():
    x, matrix = jnp.ones((4, 8)), jnp.ones((8, 24))
    for found in (forward_flops(rows, x, matrix), forward_flops(table, x, matrix.T)):
        assert found.flops == 2 * 4 * 8 * 24
    with token_loop():
        assert not forward_flops(once, x).flops


def test_they_are_compiled_once_and_again_for_other_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = library_file("c++")
    made = first.stat().st_mtime_ns
    assert library_file("c++") == first
    assert first.stat().st_mtime_ns == made
    monkeypatch.setattr(few_rows, "FLAGS", (*few_rows.FLAGS, "-DANOTHER"))
    assert library_file("c++") != first
    assert sorted(p.suffix for p in (tmp_path / "palmette").iterdir()) == [".so", ".so"]


@pytest.mark.parametrize(
    ("source", "said"),
    [(None, "it is not on PATH"), ("this is no C++", "error")],
    ids=["no compiler", "refused"],
)
def test_without_kernels_a_line_says_so_and_nothing_is_left(source, said, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if source is not None:
        (tmp_path / "few_rows.cc").write_text(source)
        monkeypatch.setattr(few_rows, "SOURCE", tmp_path / "few_rows.cc")
    compiler = "no-such-compiler" if source is None else shutil.which("c++")
    compiled.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not compiled(compiler)
        assert not compiled(compiler)
    (line,) = caplog.messages
    assert "\n" not in line
    for word in (compiler, said, "CXX"):
        assert word in line
    assert not list(tmp_path.glob("palmette/*"))
    compiled.cache_clear()


def test_the_source_has_no_warnings():
    flags = [flag for flag in few_rows.FLAGS if flag != "-w"]
    headers = f"-isystem{jax.ffi.include_dir()}"
    done = subprocess.run(
        ["c++", *flags, "-Wall", "-Wextra", "-Werror", "-Wno-attributes", headers, "-fsyntax-only", str(few_rows.SOURCE)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
