"""How many bytes a compiled program moves to and from a chip's main memory."""

from collections.abc import Iterator

from partitioning.hlo import Computation, Instruction, Program, leaves, size

# They name what is there, or their parts are counted where those stand.
_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "iota", "async-start", "async-update", "async-done"),
}


def traffic(program: Program) -> float:
    """Bytes read and written in main memory by one device in one call, an estimate.

    Every fusion, product, copy and kernel reads its operands and writes its result; what lies in the chip's small fast
    memory costs nothing, and of an operand that is only sliced the slice is read. Padding to tiles is not counted, and a
    kernel is taken to read each operand once.

    Args:
      program: compiled, with its arrays' places in memory.
    """
    inner = {name for c in program.computations.values() for one in c if one.op == "fusion" for name in one.called()}
    total = 0.0
    for name, times in program.runs.items():
        computation = program.computations[name]
        if name not in inner:
            total += times * sum(_moved(program, computation, one) for one in computation)
    return total


def _moved(program: Program, computation: Computation, one: Instruction) -> float:
    if one.op in _FREE or one.op.endswith("-done"):
        return 0.0
    given = [computation.instructions[name].result for name in one.operands]
    if one.op == "fusion":
        return _fusion(program.computations[one.called("calls")[0]], one, given)
    if one.op in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _far(one.result)
    if one.op == "dynamic-update-slice":
        return 2.0 * _far(given[1])
    if one.op == "ragged-all-to-all":
        # One of its buffers has room for the worst case; what is read and written fits in the other.
        return 2.0 * min(map(_far, given[:2]))
    if one.op.endswith("-start"):
        # Its result also names what it reads.
        return 2.0 * sum(_far(shape) for shape in given)
    return _far(one.result) + sum(_far(shape) for shape in given)


def _fusion(inside: Computation, one: Instruction, given: list[str]) -> float:
    read = 0.0
    for parameter in (i for i in inside if i.op == "parameter"):
        shape = given[int(parameter.literal)]
        if not _far(shape):
            continue
        users = list(_uses(inside, parameter))
        if users and all(user.op in ("dynamic-slice", "slice", "gather") for user, _ in users):
            read += sum(size(user.result) for user, _ in users)
        elif not (users and all(user.op == "dynamic-update-slice" and first for user, first in users)):
            read += _far(shape)
    root = inside.instructions[inside.root]
    parts = [inside.instructions[name] for name in root.operands] if root.op == "tuple" else [root]
    outer = [layout for _, layout in leaves(one.result)]
    far = ["S(" not in layout for layout in outer]
    written = 0.0
    for part, here in zip(parts, far, strict=False):
        while part.op in ("bitcast", "copy") and part.operands:
            part = inside.instructions[part.operands[0]]
        update = part.op == "dynamic-update-slice"
        # What was only handed in and out again is not written.
        if part.op != "parameter":
            written += here * size(inside.instructions[part.operands[1]].result if update else part.result)
    return read + written


def _uses(inside: Computation, one: Instruction) -> Iterator[tuple[Instruction, bool]]:
    """Who takes a value, through changes of shape, and whether it is what they slice or update."""
    for user in inside.users.get(one.name, []):
        if user.op == "bitcast":
            yield from _uses(inside, user)
        else:
            yield user, user.operands[0] == one.name


def _far(shape: str) -> float:
    """Bytes of a shape's arrays in main memory: those whose layout names no other place."""
    return float(sum(count for count, layout in leaves(shape) if "S(" not in layout))
