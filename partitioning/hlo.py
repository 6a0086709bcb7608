"""XLA's optimised programs as text: their instructions, and how often each computation runs.

XLA's own counts take the body of a loop once. Here a loop's trips are read from its condition, its first values and what
its body adds, and everything inside counts as often as it runs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
# What another thread runs, such as the sparse cores, says so behind its end.
_END = re.compile(r"^\}(, execution_thread=\"[^\"]*\")?$")
_LINE = re.compile(r"^  (ROOT )?%?[\w.\-]+ = ")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|called_computations|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_LEAF = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Args:
      name: without its %.
      result: its shape as written.
      op: such as fusion.
      operands: names of other instructions of the computation.
      literal: what stands between the parentheses, as written.
      rest: its attributes as written.
    """

    name: str
    result: str
    op: str
    operands: tuple[str, ...]
    literal: str
    rest: str

    def called(self, kind: str = "") -> list[str]:
        """Names of computations that it calls; of one kind of attribute only, where that is given."""
        found = [m for m in _CALLED.finditer(self.rest) if not kind or m[0].startswith(kind + "=")]
        return [name for m in found for name in re.findall(r"[\w.\-]+", m[1])]


@dataclass
class Computation:
    """Instructions by name, in order; the last one or the one marked so is the root."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that take each one's result."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self:
            for operand in instruction.operands:
                found.setdefault(operand, []).append(instruction)
        return found


@dataclass
class Program:
    """A parsed program.

    Args:
      computations: by name.
      entry: the name of the one that runs.
    """

    computations: dict[str, Computation]
    entry: str

    @cached_property
    def runs(self) -> dict[str, float]:
        """How often each computation runs in one call; a loop whose end the program does not tell counts once."""
        found: dict[str, float] = {}
        self.unbounded: list[str] = []

        def visit(name: str, times: float) -> None:
            if name not in self.computations:
                return
            found[name] = found.get(name, 0.0) + times
            for instruction in self.computations[name]:
                if instruction.op != "while":
                    for called in instruction.called():
                        visit(called, times)
                    continue
                trips = self._trips(name, instruction)
                if trips is None:
                    self.unbounded.append(instruction.name)
                    trips = 1
                for body in instruction.called("body"):
                    visit(body, times * trips)

        visit(self.entry, 1.0)
        return found

    def _trips(self, home: str, loop: Instruction) -> int | None:
        told = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if told:
            return int(told[1])
        condition, body = (self.computations[loop.called(kind)[0]] for kind in ("condition", "body"))
        test = condition.instructions[condition.root]
        if test.op == "fusion":
            inner = self.computations[test.called("calls")[0]]
            asked = inner.instructions[inner.root]
            sides = [self._outside(inner, test, name) for name in asked.operands]
        else:
            asked, sides = test, list(test.operands)
        way = re.search(r"direction=(\w+)", asked.rest)
        if asked.op != "compare" or way is None or len(sides) != 2:
            return None
        start = lambda side: self._number(home, loop, condition, side)
        ends = [start(side) for side in sides]
        moving = [self._slot(condition, side) for side in sides]
        for i in (0, 1):
            slot, direction = moving[i], way[1] if i == 0 else {"GT": "LT", "LT": "GT"}.get(way[1], way[1])
            step = None if slot is None else self._step(body, slot)
            first, last = ends[i], ends[1 - i]
            if not step or first is None or last is None:
                continue
            if direction == "NE" or (direction == "LT" and step > 0) or (direction == "GT" and step < 0):
                return max(0, -(-(last - first) // step))
        return None

    def _outside(self, inner: Computation, fusion: Instruction, name: str) -> str:
        """The operand of a fusion that its parameter `name` stands for, or the name itself for a constant inside."""
        one = inner.instructions[name]
        return fusion.operands[int(one.literal)] if one.op == "parameter" else f"{inner.name}/{name}"

    def _slot(self, computation: Computation, name: str) -> int | None:
        """The index of the loop's state that a value in its condition or body is."""
        one = computation.instructions.get(name)
        while one is not None and one.op in ("copy", "bitcast", "convert"):
            one = computation.instructions.get(one.operands[0])
        if one is None or one.op != "get-tuple-element":
            return None
        if computation.instructions[one.operands[0]].op != "parameter":
            return None
        index = re.search(r"index=(\d+)", one.rest)
        return int(index[1]) if index else None

    def _number(self, home: str, loop: Instruction, condition: Computation, name: str) -> int | None:
        """A whole number that a condition compares, as it is before the first trip."""
        if "/" in name:
            inner, name = name.split("/")
            return _constant(self.computations[inner], name)
        slot = self._slot(condition, name)
        if slot is None:
            return _constant(condition, name)
        outside = self.computations[home]
        state = outside.instructions[loop.operands[0]]
        while state.op in ("copy", "bitcast", "opt-barrier"):
            state = outside.instructions[state.operands[0]]
        return _constant(outside, state.operands[slot]) if state.op == "tuple" else None

    def _step(self, body: Computation, slot: int) -> int | None:
        """What one trip adds to a slot of the loop's state."""
        root = body.instructions[body.root]
        if root.op != "tuple":
            return None
        moved = body.instructions[root.operands[slot]]
        while moved.op in ("copy", "bitcast"):
            moved = body.instructions[moved.operands[0]]
        where, names = body, list(moved.operands)
        if moved.op == "fusion":
            where = self.computations[moved.called("calls")[0]]
            inner = where.instructions[where.root]
            if inner.op == "add" and moved.operands and self._slot(body, moved.operands[0]) == slot:
                return next((n for n in (_constant(where, o) for o in inner.operands) if n is not None), None)
            return None
        if moved.op != "add" or slot not in [self._slot(body, n) for n in names]:
            return None
        return next((n for n in (_constant(where, o) for o in names) if n is not None), None)


def _constant(computation: Computation, name: str) -> int | None:
    one = computation.instructions.get(name)
    while one is not None and one.op in ("copy", "bitcast", "copy-done", "copy-start"):
        one = computation.instructions.get(one.operands[0])
    if one is None or one.op != "constant":
        return None
    return int(one.literal) if re.fullmatch(r"-?\d+", one.literal) else None


def parse(text: str) -> Program:
    """Reads a program's text, such as `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, here = "", None
    for line in text.splitlines():
        if here is None:
            head = _HEAD.match(line)
            if head:
                here = computations[head[2]] = Computation(head[2])
                entry = head[2] if head[1] else entry
        elif _END.match(line):
            here = None
        elif _LINE.match(line):
            # Other lines go on with a kernel's own text.
            one, root = _instruction(line)
            here.instructions[one.name] = one
            here.root = one.name if root or not here.root else here.root
    return Program(computations, entry)


def _instruction(line: str) -> tuple[Instruction, bool]:
    left, _, right = line.strip().partition(" = ")
    root = left.startswith("ROOT ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    result, right = right[:end], right[end:].lstrip()
    op, _, _ = right.partition("(")
    close = _closing(right, len(op))
    literal = right[len(op) + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    name = left.removeprefix("ROOT ").removeprefix("%")
    return Instruction(name, result, op, operands, literal, right[close + 1 :]), root


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def leaves(shape: str) -> list[tuple[int, str]]:
    """Bytes and layout of each array of a shape as written; the padding of a layout's tiles is not counted."""
    out = []
    for kind, extents, layout in _LEAF.findall(shape):
        bits = _BITS.get(kind) or (8 if kind.startswith("f8") else int(re.sub(r"\D", "", kind) or 0))
        count = 1
        for extent in filter(None, extents.split(",")):
            count *= int(extent)
        out.append((-(-count * bits // 8), layout))
    return out


def size(shape: str) -> int:
    """Bytes of all arrays of a shape as written."""
    return sum(count for count, _ in leaves(shape))
