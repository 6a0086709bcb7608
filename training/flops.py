"""How many FLOPs a function does, and what share of the machine that is.

XLA's `cost_analysis` counts the body of a loop once. Here the jaxpr is walked, and each loop's body counts as often as
it runs. Only products of matrices count, as in the published figures of model FLOPs.

Three conventions. A jitted function whose name begins with `attention_causal` counts by half, since half of its products
are masked. One that is called `room_for_8` counts by an eighth: of the rows that it has room for so many are there. And a
training step is three times its forward pass: what is recomputed in the backward pass is not counted.
"""

import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from partitioning.chips import chip_of

CAUSAL_PREFIX = "attention_causal"
# Experts in blocks loop as long as the choices need; a choice meets one matrix of each stack, twice in the backward pass.
EXPERTS = {"grouped_experts": 1, "grouped_experts_backward": 2}
# A jitted function of this name has room for so many times the rows that are there; its loops walk it in as many parts.
ROOM = re.compile(r"room_for_(\d+)")


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one call.

    Args:
      flops: multiplications and additions in products of matrices, over all devices.
      unbounded: names of the enclosing functions of loops whose length the program does not know; their bodies are
        counted once, so that `flops` is then a lower bound.
    """

    flops: float
    unbounded: tuple[str, ...] = ()

    def __add__(self, other: "FlopCount") -> "FlopCount":
        return FlopCount(self.flops + other.flops, tuple(dict.fromkeys(self.unbounded + other.unbounded)))

    def __rmul__(self, times: float) -> "FlopCount":
        return FlopCount(times * self.flops, self.unbounded)


def forward_flops(function: Callable, *abstract: Any) -> FlopCount:
    """FLOPs of one call of `function`, which is traced and not run.

    Args:
      function: any traceable function.
      abstract: its arguments, as arrays or `jax.ShapeDtypeStruct`.
    """
    return _walk(jax.make_jaxpr(function)(*abstract).jaxpr, getattr(function, "__name__", "function"), 0.5)


def executed_flops(function: Callable, *abstract: Any, masked: bool = True) -> FlopCount:
    """FLOPs that one call of `function` computes, what is recomputed included.

    What no result depends on is left out, as a compiler does.

    Args:
      function, abstract: as in `forward_flops`.
      masked: whether the masked halves of causal attention count, where they are computed: kernels leave them out.
    """
    jaxpr = jax.make_jaxpr(function)(*abstract).jaxpr
    used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _walk(used, getattr(function, "__name__", "function"), 1.0 if masked else 0.5)


def training_flops(forward: FlopCount) -> FlopCount:
    """FLOPs of a forward and a backward pass: each product of the one makes two of the other."""
    return 3.0 * forward


def _walk(jaxpr: Any, name: str, causal: float) -> FlopCount:
    """FLOPs of a jaxpr inside the function `name`; those of causal attention count `causal` times."""
    total = FlopCount(0.0)
    for equation in jaxpr.eqns:
        total += _equation(equation, name, causal)
    return total


def _equation(equation: Any, name: str, causal: float) -> FlopCount:
    kind, params = equation.primitive.name, equation.params
    shapes: list[tuple[int, ...]] = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
    result = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
    if kind == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return FlopCount(2.0 * result * math.prod(shapes[0][axis] for axis in contracted))
    if kind == "conv_general_dilated":
        # A kernel's elements without its output features are what one output element sums.
        out_features = shapes[1][params["dimension_numbers"].rhs_spec[0]]
        return FlopCount(2.0 * result * math.prod(shapes[1]) / out_features)
    if kind in ("ragged_dot", "ragged_dot_general"):
        # Each row meets one of its own only: the [k, n] of its group out of [g, k, n], or for the gradient of that a row [n].
        met = result if len(shapes[1]) > len(shapes[0]) else math.prod(shapes[1])
        return FlopCount(2.0 * math.prod(shapes[0]) * met / shapes[0][0])
    if kind.startswith("dot_product_attention_fwd"):
        # cuDNN's attention, query [B, T, N, H] and key [B, S, N, H]: two products. A causal one is halved by its name.
        return FlopCount(4.0 * math.prod(shapes[0]) * shapes[1][1])
    if kind == "ffi_call" and params["target_name"] in ("palmette_rows", "palmette_table"):
        # models/few_rows.py: products of [..., rows, n] with matrices.
        return FlopCount(2.0 * result * shapes[0][-1])
    if kind == "scan":
        return params["length"] * _walk(params["jaxpr"].jaxpr, name, causal)
    if kind == "while":
        # `fori_loop` between numbers is a scan already: what remains ends by its data, or walks a part of a room.
        body = _walk(params["body_jaxpr"].jaxpr, name, causal)
        if room := ROOM.fullmatch(name):
            return int(room[1]) * body
        return body + FlopCount(0.0, (name,) if body.flops else ())
    if kind == "cond":
        return max((_walk(branch.jaxpr, name, causal) for branch in params["branches"]), key=lambda count: count.flops)
    if kind == "shard_map":
        # The axes' name in the equation differs between releases of jax.
        manual = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
        copies = math.prod(params["mesh"].shape[axis] for axis in manual)
        return copies * _walk(params["jaxpr"], name, causal)
    if kind == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * _walk(params["jaxpr"], name, causal)
    inner = params.get("name") if kind in ("jit", "pjit") else None
    if inner in EXPERTS:
        return EXPERTS[inner] * _experts(equation)
    total = FlopCount(0.0)
    for jaxpr in _inside(params):
        total += _walk(jaxpr, inner or name, causal)
    if inner and (room := ROOM.fullmatch(inner)):
        return 1 / int(room[1]) * total
    if not (inner and inner.startswith(CAUSAL_PREFIX)):
        return total
    # Kernels leave out what is masked.
    return (0.5 if _calls_kernel(params) else causal) * total


def _experts(equation: Any) -> FlopCount:
    """Of the products of choices, one number each in the first whole ones, with stacks of matrices [E, ., .]."""
    arrays = [variable.aval for variable in equation.invars]
    choices = next(math.prod(a.shape) for a in arrays if jnp.issubdtype(a.dtype, jnp.integer))
    return FlopCount(2.0 * choices * sum(math.prod(a.shape[1:]) for a in arrays if a.ndim == 3))


def _calls_kernel(params: dict[str, Any]) -> bool:
    """Whether an equation with these parameters, or one inside it, calls a kernel written for the device."""
    kernels = ("pallas_call", "dot_product_attention_fwd")
    equations = [equation for jaxpr in _inside(params) for equation in jaxpr.eqns]
    return any(e.primitive.name.startswith(kernels) or _calls_kernel(e.params) for e in equations)


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters: of jit, remat, and the forward rules of custom derivatives."""
    for value in params.values():
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns"):
            yield jaxpr


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device, and where the number is from."""

    flops: float
    source: str


def peak_flops(device: Any = None) -> Peak:
    """The FLOP/s that a share of is reported: the data sheet's, or for a device not in the table a measured product's.

    A CPU has no honest data sheet here, and fake CPU devices share its cores: its peak is measured once, for the whole
    machine, as the best of several large float32 products.

    Args:
      device: None is the first device.
    """
    device = jax.devices()[0] if device is None else device
    chip = chip_of(device.device_kind)
    if chip is not None:
        return Peak(chip.flops, f"{device.device_kind}, dense bfloat16, data sheet")
    return _measured_peak(device)


@functools.cache
def _measured_peak(device: Any, size: int = 1024, repeats: int = 5) -> Peak:
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    share = 1 if device.platform != "cpu" else jax.local_device_count(device.platform)
    flops = 2.0 * size**3 / min(seconds) / share
    return Peak(flops, f"{device.device_kind}, measured float32 product of {size} x {size} matrices")


@dataclass(frozen=True)
class Mfu:
    """Model FLOPs utilisation, 0 to 1, with the formula and numbers that made it."""

    value: float
    formula: str


def mfu(count: FlopCount, seconds: float, *, devices: int, peak: Peak) -> Mfu:
    """The share of the devices' peak that a step's model FLOPs are.

    Args:
      count: FLOPs of the step over all devices, from `training_flops`.
      seconds: duration of the step.
      devices: how many devices worked on it.
      peak: of one of them.
    """
    value = count.flops / (seconds * devices * peak.flops)
    return Mfu(value, mfu_formula(count, f"{seconds:.4g}", devices=devices, peak=peak))


def mfu_formula(count: FlopCount, seconds: str, *, devices: int, peak: Peak) -> str:
    """The formula of `mfu` with its numbers; `seconds` may be a word where the time is not known yet."""
    bound = f" (at least: loops of unknown length in {', '.join(count.unbounded)})" if count.unbounded else ""
    return (
        f"MFU = model FLOPs / (seconds x devices x peak) = {count.flops:.4g}{bound} / ({seconds} x {devices} x "
        f"{peak.flops:.4g}); model FLOPs: matrix products, 3 x forward, causal attention by half, recomputation not "
        f"counted; peak: {peak.source}"
    )
