"""What compiled programs send: exact counts through loops, for every way in which programs write groups and pairs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from partitioning import make_mesh
from partitioning.collectives import Collective, collectives, groups, seconds
from partitioning.hlo import leaves, parse
from partitioning.topologies import topology
from partitioning.traffic import traffic

TESTS = Path(__file__).resolve().parents[1]
FLOAT = 4


def mesh_of(**shape):
    """As much of a mesh as is read, with devices that know where they are in a cube of eight to an edge."""
    count = int(np.prod(list(shape.values())))
    devices = np.empty(count, object)
    for i in range(count):
        devices[i] = SimpleNamespace(coords=(i % 8, i // 8 % 8, i // 64))
    devices = devices.reshape(tuple(shape.values()))
    return SimpleNamespace(axis_names=tuple(shape), shape=shape, size=count, devices=devices)


def sent(text, mesh):
    """Kind, axes, bytes and count of what a program sends."""
    return {(one.kind, one.axes, one.bytes, one.count) for one in collectives(parse(text), mesh)}


# Seven trips. A device has [128, 256] of [256, 512] numbers; two of them gathered are [256, 256].
SCAN = {
    ("all-reduce", ("tensor",), 7 * 128 * 256 * FLOAT, 7),
    ("all-gather", ("fsdp",), 7 * 256 * 256 * FLOAT, 7),
    ("reduce-scatter", ("fsdp",), 7 * 256 * 256 * FLOAT, 7),
    ("collective-permute", ("tensor",), 7 * 128 * 256 * FLOAT, 7),
}
# The matrix [512, 1024] is gathered to [512, 512] in bfloat16, its gradient scattered and what is left summed over slices.
SLICES = {
    ("all-gather", ("fsdp",), 512 * 512 * 2, 1),
    ("reduce-scatter", ("fsdp",), 512 * 512 * FLOAT, 1),
    ("all-reduce", ("slice",), 256 * 512 * FLOAT, 1),
}


@pytest.mark.parametrize(
    ("name", "mesh", "known"),
    [
        ("scan", mesh_of(slice=1, data=1, fsdp=2, tensor=2), SCAN),
        ("slices", mesh_of(slice=2, data=1, fsdp=2, tensor=2), SLICES),
    ],
)
def test_programs_for_tpus_send_what_was_written(name, mesh, known):
    assert sent((TESTS / "partitioning" / "programs" / f"{name}.hlo").read_text(), mesh) == known


@pytest.mark.parametrize(("name", "known"), [("scan", SCAN), ("slices", SLICES)])
def test_so_do_those_that_the_installed_compiler_makes(name, known):
    place = {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, str(TESTS / "programs_on_tpus.py"), name],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert {(kind, tuple(axes), count, times) for kind, axes, count, times in json.loads(run.stdout)} == known


def test_loops_inside_loops_multiply_on_this_machine_too():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    place = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))

    def part(x):
        def inner(x, _):
            return jnp.sin(jax.lax.psum(x, "tensor")), None

        def outer(x, _):
            x = jax.lax.scan(inner, x, None, length=3)[0]
            return jax.lax.psum_scatter(jax.lax.all_gather(x, "fsdp", tiled=True), "fsdp", tiled=True), None

        return jax.lax.scan(outer, x, None, length=5)[0]

    run = jax.shard_map(part, mesh=mesh, in_specs=place.spec, out_specs=place.spec, check_vma=False)
    x = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=place)
    assert sent(jax.jit(run).lower(x).compile().as_text(), mesh) == {
        ("all-reduce", ("tensor",), 15 * 8 * 8 * FLOAT, 15),
        ("all-gather", ("fsdp",), 5 * 32 * 8 * FLOAT, 5),
        ("reduce-scatter", ("fsdp",), 5 * 32 * 8 * FLOAT, 5),
    }


def program(*lines):
    """An entry computation over `%x`, 8 numbers."""
    body = "\n".join(f"  {line}" for line in ("%x = f32[8]{0} parameter(0)", *lines))
    return f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("written", "axes"),
    [
        ("[2,4]<=[8]", ("tensor", "expert")),
        ("[4,2]<=[2,4]T(1,0)", ("fsdp",)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("tensor",)),
        ("[4,2]<=[8]", ("expert",)),
        ("[1,8]<=[8]", ("fsdp", "tensor", "expert")),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("fsdp",)),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("tensor",)),
        ("{}", ("fsdp", "tensor", "expert")),
        # As newer compilers write them, with the devices as they are or in another order.
        ("mesh['fsdp'=2,'tensor'=2,'expert'=2] {'tensor'}", ("tensor",)),
        ("mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}", ("fsdp", "expert")),
    ],
)
def test_groups_are_found_along_their_axes(written, axes):
    text = program(f"ROOT %y = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={written}, to_apply=%add")
    assert sent(text, mesh_of(fsdp=2, tensor=2, expert=2)) == {("all-reduce", axes, 8 * FLOAT, 1)}


def test_groups_in_an_unknown_notation_are_no_guess():
    with pytest.raises(ValueError, match="groups in a notation that is not known"):
        groups("replica_groups=mesh['x'=8] {'x':(1)2}, to_apply=%add", 8)


def test_pairs_count_once_and_a_group_of_one_not_at_all():
    text = program(
        "%s = (f32[8]{0}, f32[16]{0}) all-gather-start(%x), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}",
        "%d = f32[16]{0} all-gather-done(%s)",
        "ROOT %y = f32[8]{0} all-reduce(%x), channel_id=2, replica_groups={{0},{1}}, to_apply=%add",
    )
    assert sent(text, mesh_of(data=2)) == {("all-gather", ("data",), 16 * FLOAT, 1)}


@pytest.mark.parametrize(("given", "made"), [(8, 64), (64, 8)])
def test_room_for_the_worst_case_is_not_sent(given, made):
    """Of a ragged all-to-all's two buffers the smaller one bounds what crosses; its tables are left out."""
    text = program(
        f"%g = f32[{given}]{{0}} parameter(1)",
        f"%m = f32[{made}]{{0}} parameter(2)",
        "%t = s32[8]{0} parameter(3)",
        f"%r = f32[{made}]{{0}} ragged-all-to-all(%g, %m, %t, %t, /*index=4*/%t, %t), channel_id=1, "
        "replica_groups={{0,1},{2,3}}",
        "ROOT %y = f32[8]{0} sine(%x)",
    )
    assert sent(text, mesh_of(fsdp=2, expert=2)) == {("ragged-all-to-all", ("expert",), 8 * FLOAT, 1)}
    # Read and written once; and what stands behind it.
    assert traffic(parse(text)) == 2 * 8 * FLOAT + 2 * 8 * FLOAT


def test_what_runs_on_behind_other_work_counts_where_it_starts():
    """A TPU's program shows such a collective in the fusion that starts it, in those it runs behind, and where it ends."""
    attributes = 'channel_id=9, replica_groups=[1,2]<=[2], dimensions={0}, frontend_attributes={chain_id="0"}'
    gather = f"%g = f32[16]{{0}} all-gather(%p), {attributes}"
    parts = {
        "begins": 'ROOT %c = f32[16]{0} custom-call(%g), custom_call_target="AsyncCollectiveStart"',
        "behind": "ROOT %t = f32[16]{0} sine(%g)",
        "ends": 'ROOT %c = f32[16]{0} custom-call(%g), custom_call_target="AsyncCollectiveDone"',
    }
    inside = "".join(
        f"%{name} (p: f32[8]) -> f32[16] {{\n  %p = f32[8]{{0}} parameter(0)\n  {gather}\n  {last}\n}}\n\n"
        for name, last in parts.items()
    )
    lines = [f"%{name}.1 = f32[16]{{0}} fusion(%x), kind=kCustom, calls=%{name}" for name in parts]
    assert sent(inside + program(*lines), mesh_of(data=2)) == {("all-gather", ("data",), 16 * FLOAT, 1)}


def test_a_loop_that_ends_by_its_data_counts_once_and_is_named():
    def part(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jax.lax.psum(x, "data"), x)

    mesh = make_mesh()
    run = jax.shard_map(part, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    found = parse(jax.jit(run).lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile().as_text())
    assert [one.count for one in collectives(found, mesh)] == [1]
    assert len(found.unbounded) == 1


def test_shapes_as_they_are_written():
    assert leaves("(bf16[2,3]{1,0:T(8,128)S(1)}, pred[4], s4[3]{0}, f8e4m3fn[7], u32[], token[])") == [
        *((12, "1,0:T(8,128)S(1)"), (4, ""), (2, "0"), (7, ""), (4, ""), (0, "")),
    ]


def test_time_on_rings_and_lines():
    """A v5p cube of eight is rings of 100 GB/s each way; the first four of eight are a line."""
    place = topology("v5p:8x8x8")
    mesh = mesh_of(fsdp=512)
    over = lambda kind, group, b=1e9: seconds(Collective(kind, ("fsdp",), b, 1, tuple(group)), mesh, place)
    assert over("all-gather", range(8)) == pytest.approx(1e9 * 7 / 8 / 200e9)
    assert over("all-gather", range(4)) == pytest.approx(1e9 * 3 / 4 / 100e9)
    assert over("all-gather", range(64)) == pytest.approx(1e9 * 63 / 64 / 400e9)
    assert over("all-reduce", range(512)) == pytest.approx(2 * 1e9 * 511 / 512 / 600e9)
    assert over("all-reduce", range(8)) == over("all-gather", range(8)) + over("reduce-scatter", range(8))
    # Four of eight send half of what they have to the other four, over the two links that join the halves of a ring.
    assert over("all-to-all", range(8)) == pytest.approx(4 * (1e9 / 2) / (2 * 100e9))
    across = Collective("all-reduce", ("slice",), 1e9, 1, (0, 256))
    assert seconds(across, mesh, place) == pytest.approx(2 * 1e9 / 2 / 6.25e9)


def test_traffic_counts_slices_as_slices_and_near_memory_as_nothing():
    """Ten trips over a stack: each reads one layer, and one number of every eight lies in near memory."""
    fusion = (
        "%cut (p: f32[10,8], i: s32[]) -> f32[1,8] {\n"
        "  %p = f32[10,8]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n  %z = s32[] constant(0)\n"
        "  ROOT %s = f32[1,8]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,8}\n}\n\n"
    )
    entry = (
        "ENTRY %main (w: f32[10,8], n: s32[]) -> f32[1,8] {\n"
        "  %w = f32[10,8]{1,0} parameter(0)\n  %n = s32[]{:S(4)} parameter(1)\n"
        "  %f = f32[1,8]{1,0} fusion(%w, %n), kind=kLoop, calls=%cut\n"
        "  %near = f32[1,8]{1,0:S(1)} sine(%f)\n"
        "  ROOT %y = f32[1,8]{1,0} cosine(%near)\n}\n"
    )
    assert traffic(parse(fusion + entry)) == (8 + 8) * FLOAT + 8 * FLOAT + 8 * FLOAT


def test_what_another_thread_runs_ends_where_it_ends():
    """Sparse cores name their thread behind the brace; the computations that follow are read too."""
    text = """HloModule m

%gathered (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}, execution_thread="sparsecore"

%fused (y: f32[8]) -> f32[8] {
  ROOT %y = f32[8]{0} parameter(0)
}

ENTRY %main (z: f32[8]) -> f32[8] {
  %z = f32[8]{0} parameter(0)
  ROOT %out = f32[8]{0} fusion(%z), kind=kLoop, calls=%fused
}
"""
    assert {name: list(c.instructions) for name, c in parse(text).computations.items()} == {
        "gathered": ["x"],
        "fused": ["y"],
        "main": ["z", "out"],
    }
