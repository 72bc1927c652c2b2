"""What a compiled program moves through memory, read from its optimised HLO: bytes per pass of every loop, and by instruction.

XLA's own cost analysis counts the body of a loop once, whatever its number of passes, and is not to be had for a device that
is not there. Here a loop of known length counts as often as it runs. Every instruction outside a fusion reads its operands and
writes its result; a slice of an operand counts as the slice, an update in place as the update, and an asynchronous operation
once, where it is done. What a compiler keeps on the chip, as that of a TPU does, moves nothing, and arrays are as large as their
tiles make them. What a cache of the device keeps is not known here, so these are bytes asked for.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import NamedTuple

BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "f16": 16,
    "bf16": 16,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "token": 0,
}
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "iota",
    "partition-id",
}
SLICES = ("dynamic-slice", "slice", "slice-start", "gather")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")


class Loop(NamedTuple):
    """A loop whose number of passes is not known when it is compiled, or the whole program.

    Attributes:
      name: of the instruction, "program" for what is outside of these loops.
      moved: bytes of one pass; loops of known length inside count as often as they run, others not at all.
      movers: (what the instruction came from, bytes of one pass), the largest first.
      paths: where in the jax program the instructions of a pass come from, those of loops inside left out.
    """

    name: str
    moved: int
    movers: list[tuple[str, int]]
    paths: list[str]


class Instruction(NamedTuple):
    """A line of HLO: ``%name = type op(operands), attributes``; that of a parameter is its number, of a constant its value."""

    name: str
    type: str
    op: str
    operands: list[str]
    attributes: str


def loops(text: str) -> list[Loop]:
    """The program, and each of its loops of unknown length, in the order of the text.

    >>> import jax, jax.numpy as jnp
    >>> double = lambda x: jax.lax.scan(lambda x, _: (2 * x, None), x, length=5)[0]
    >>> compiled = jax.jit(double).lower(jnp.ones(1024)).compile()
    >>> 5 * 2 * 4096 <= loops(compiled.as_text())[0].moved <= 8 * 2 * 4096
    True
    """
    program = _parsed(text)
    bodies = [("program", program.entry)]
    for computation in program.computations.values():
        for x in computation.values():
            if x.op == "while" and program.passes(x, computation) is None:
                bodies.append((x.name, _attribute(x, "body")))
    measured = [(name, body, program.movers(body)) for name, body in bodies]
    return [
        Loop(name, movers.total(), movers.most_common(), list(program.paths(body)))
        for name, body, movers in measured
        if movers
    ]


def arrays(text: str) -> list[tuple[str, list[int], int]]:
    """(type, dimensions, bytes) of the arrays that a program writes to memory, the largest first, those alike once.

    >>> import jax, jax.numpy as jnp
    >>> arrays(jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile().as_text())[0]
    ('f32[8,8]', [8, 8], 256)
    """
    program = _parsed(text)
    fused = {_attribute(x, "calls") for xs in program.computations.values() for x in xs.values() if x.op == "fusion"}
    written = {
        (f"{kind}[{dims}]", tuple(int(n) for n in dims.split(",") if n), _array_bytes(kind, dims, layout))
        for name, computation in program.computations.items()
        for x in computation.values()
        if name not in fused and x.op != "while"
        for kind, dims, layout in _ARRAY.findall(x.type)
        if "S(" not in layout
    }
    return [(name, list(dims), size) for name, dims, size in sorted(written, key=lambda array: -array[2])]


def products(text: str) -> Counter[str]:
    """How many products of matrices there are, by the types of their factors; those of a loop once.

    >>> import jax, jax.numpy as jnp
    >>> products(jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile().as_text())
    Counter({'f32 · f32': 1})
    """
    found: Counter[str] = Counter()
    for computation in _parsed(text).computations.values():
        for x in computation.values():
            library = x.op == "custom-call" and re.search(r'custom_call_target="[^"]*(gemm|matmul)', x.attributes)
            if x.op in ("dot", "convolution") or library:
                kinds = [_ARRAY.findall(computation[name].type)[0][0] for name in x.operands[:2] if name in computation]
                found[" · ".join(kinds)] += 1
    return found


def size(shape: str) -> int:
    """Bytes that an array or tuple, as HLO writes types, takes in the device's memory, its tiles full.

    >>> size("(f32[2,3]{1,0}, bf16[4], pred[])")
    33
    >>> size("f32[3,100]{0,1:T(8,128)}"), size("f32[8,128]{1,0:T(8,128)S(1)}")  # [100, 3] in memory; kept on the chip
    (53248, 0)
    """
    return sum(_array_bytes(*array) for array in _ARRAY.findall(shape) if "S(" not in array[2])


def extent(shape: str) -> int:
    """As `size`, in whichever memory of the device it lies.

    >>> extent("f32[8,128]{1,0:T(8,128)S(1)}")
    4096
    """
    return sum(_array_bytes(*array) for array in _ARRAY.findall(shape))


def _array_bytes(kind: str, dimensions: str, layout: str) -> int:
    order, _, tiles = layout.partition(":")
    dims = [int(n) for n in dimensions.split(",") if n]
    if tile := re.match(r"T\(([\d,]+)\)", tiles):
        by_place = [dims[int(i)] for i in reversed(order.split(","))] if order else []
        sides = [int(n) for n in tile[1].split(",")][-len(by_place) :] if by_place else []
        for place, side in enumerate(sides, start=len(by_place) - len(sides)):
            by_place[place] = -(-by_place[place] // side) * side
        dims = by_place
    bits = 8 if kind.startswith("f8") else BITS.get(kind, 32)
    return bits * math.prod(dims) // 8


class _Program:
    """Computations by name, each a dict of instructions by name, in order; the last one is the result."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif instruction := _parse(line):
                current[instruction.name] = instruction
        self.movers: Callable[[str], Counter[str]] = cache(self._movers)

    def paths(self, computation: str) -> Iterator[str]:
        """The ``op_name`` of the instructions of a computation."""
        for x in self.computations[computation].values():
            if match := re.search(r'op_name="([^"]*)"', x.attributes):
                yield match[1]

    def _movers(self, computation: str) -> Counter[str]:
        total: Counter[str] = Counter()
        inside = self.computations[computation]
        for x in inside.values():
            if x.op == "while":
                if passes := self.passes(x, inside):
                    for name, moved in self.movers(_attribute(x, "body")).items():
                        total[name] += moved * passes
            elif x.op == "conditional":
                branches = [self.movers(name) for name in _branches(x)]
                largest = max(branches, key=Counter.total)
                total += largest
            elif x.op == "call":
                total += self.movers(_attribute(x, "to_apply"))
            elif x.op not in FREE and not x.op.endswith("-start"):
                total[_origin(x)] += self._moved(x, inside)
        return total

    def passes(self, x: Instruction, inside: dict[str, Instruction]) -> int | None:
        """Of a loop, where that is known: the compiler says so, or a counter runs from one constant to another."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', x.attributes):
            return int(match[1])
        condition = self.computations[_attribute(x, "condition")]
        last = next(reversed(condition.values()))
        if last.op != "compare" or "direction=LT" not in last.attributes:
            return None
        counter, end = (condition[name] for name in last.operands)
        start, carried = inside.get(x.operands[0]), re.search(r"index=(\d+)", counter.attributes)
        if (
            end.op != "constant"
            or counter.op != "get-tuple-element"
            or start is None
            or start.op != "tuple"
            or not carried
        ):
            return None
        first = inside[start.operands[int(carried[1])]]
        while first.op in ("copy", "bitcast"):
            first = inside[first.operands[0]]
        return int(end.operands[0]) - int(first.operands[0]) if first.op == "constant" else None

    def _moved(self, x: Instruction, inside: dict[str, Instruction]) -> int:
        """Bytes that an instruction reads and writes; of a kernel, what it says itself."""
        if x.op == "custom-call" and (said := re.search(r"kernel_of_(\d+)_bytes", x.attributes)):
            return int(said[1])
        # What an operation that is done has read are the operands of the one that started it.
        started = inside.get(x.operands[0], x) if x.op.endswith("-done") else x
        reader = started._replace(type=x.type)
        read = sum(
            self._read(reader, name, inside[name].type) for name in dict.fromkeys(started.operands) if name in inside
        )
        return read + self._written(x, inside)

    def _read(self, use: Instruction, name: str, shape: str) -> int:
        """Bytes that an instruction reads of an operand of this type."""
        if size(shape) == 0:
            return 0
        if use.op == "fusion":
            body = self.computations[_attribute(use, "calls")]
            inputs = {x.operands[0]: x.name for x in body.values() if x.op == "parameter"}
            numbers = [str(i) for i, operand in enumerate(use.operands) if operand == name]
            uses = [found for number in numbers for found in _uses(inputs[number], body)]
            return min(size(shape), sum(self._read(use, name, shape) for use, name in uses))
        if use.operands[0] == name and use.operands.count(name) == 1:
            if use.op in SLICES:
                return min(extent(use.type), size(shape))
            if use.op == "dynamic-update-slice":
                return 0
        return size(shape)

    def _written(self, x: Instruction, body: dict[str, Instruction]) -> int:
        """Bytes that an instruction writes."""
        if x.op == "fusion":
            inner = self.computations[_attribute(x, "calls")]
            results = list(_results(next(reversed(inner.values())), inner))
            if len(results) == 1 == len(_ARRAY.findall(x.type)):
                return self._written(results[0]._replace(type=x.type), inner)
            return sum(self._written(y, inner) for y in results)
        if x.op == "dynamic-update-slice":
            return min(extent(body[x.operands[1]].type), size(x.type))
        return size(x.type)


@lru_cache(maxsize=1)  # the text is large, and read for its loops, arrays and products in turn
def _parsed(text: str) -> _Program:
    return _Program(text)


def _parse(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
    if not match:
        return None
    name, rest = match.groups()
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    op, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    operands = [rest[: end - 1]] if op in ("parameter", "constant") else re.findall(r"%([\w.\-]+)", rest[: end - 1])
    return Instruction(name, shape, op, operands, rest[end:])


def _closing(text: str) -> int:
    """Where the parenthesis that opens the text has closed."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _attribute(x: Instruction, name: str) -> str:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", x.attributes)
    assert match, (x.name, name)
    return match[1]


def _branches(x: Instruction) -> list[str]:
    match = re.search(r"branch_computations=\{([^}]*)\}", x.attributes)
    return (
        re.findall(r"%?([\w.\-]+)", match[1])
        if match
        else [_attribute(x, f"{b}_computation") for b in ("true", "false")]
    )


def _origin(x: Instruction) -> str:
    """The end of the jax operation's path that an instruction came from, and the instruction's own kind."""
    match = re.search(r'op_name="([^"]*)"', x.attributes)
    kind = re.sub(r"[.\d]+$", "", x.name)
    return f"{kind} {x.type.split('{')[0]}" + (f" · {'/'.join(match[1].split('/')[-2:])}" if match else "")


def _uses(name: str, body: dict[str, Instruction]) -> Iterator[tuple[Instruction, str]]:
    """The instructions that read a value, looking through those that only rename it, and the name they read it by."""
    root = next(reversed(body))
    for x in body.values():
        if name in x.operands:
            if x.op == "bitcast" and x.name != root:
                yield from _uses(x.name, body)
            else:
                yield x, name


def _results(root: Instruction, body: dict[str, Instruction]) -> Iterator[Instruction]:
    if root.op in ("tuple", "bitcast"):
        for name in root.operands:
            yield from _results(body[name], body)
    else:
        yield root
