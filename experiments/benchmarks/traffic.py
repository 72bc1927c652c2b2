"""What a compiled program moves through memory, read from its optimised HLO: bytes per pass of every loop, and by instruction.

XLA's own cost analysis counts the body of a loop once, whatever its number of passes, and is not to be had for a device that
is not there. Here a loop of known length counts as often as it runs. Every instruction outside a fusion reads its operands and
writes its result; a slice of an operand counts as the slice, an update in place as the update. What a cache of the device
keeps is not known here, so these are bytes asked for.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

WIDTHS = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "token": 0,
}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "iota"}
SLICES = ("dynamic-slice", "slice", "gather")


class Loop(NamedTuple):
    """A loop whose number of passes is not known when it is compiled, or the whole program.

    Attributes:
      name: of the instruction, "program" for what is outside of these loops.
      moved: bytes of one pass; loops of known length inside count as often as they run, others not at all.
      movers: (what the instruction came from, bytes of one pass), the largest first.
    """

    name: str
    moved: int
    movers: list[tuple[str, int]]


class Instruction(NamedTuple):
    """A line of HLO: ``%name = type op(operands), attributes``."""

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
    program = _Program(text)
    bodies = [("program", program.entry)]
    for computation in program.computations.values():
        for x in computation.values():
            if x.op == "while" and _passes(x) is None:
                bodies.append((x.name, _attribute(x, "body")))
    measured = [(name, program.movers(body)) for name, body in bodies]
    return [Loop(name, sum(movers.values()), movers.most_common()) for name, movers in measured if movers]


def size(shape: str) -> int:
    """Bytes of an array or tuple, as HLO writes types.

    >>> size("(f32[2,3]{1,0}, bf16[4], pred[])")
    33
    """
    return sum(
        WIDTHS.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape)
    )


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

    def _movers(self, computation: str) -> Counter[str]:
        total: Counter[str] = Counter()
        inside = self.computations[computation]
        for x in inside.values():
            if x.op == "while":
                for name, moved in self.movers(_attribute(x, "body")).items() if _passes(x) is not None else ():
                    total[name] += moved * (_passes(x) or 0)
            elif x.op == "conditional":
                branches = [self.movers(name) for name in _branches(x)]
                largest = max(branches, key=Counter.total)
                total += largest
            elif x.op == "call":
                total += self.movers(_attribute(x, "to_apply"))
            elif x.op not in FREE and not x.op.endswith("-done"):
                total[_origin(x)] += self._moved(x, inside)
        return total

    def _moved(self, x: Instruction, inside: dict[str, Instruction]) -> int:
        """Bytes that an instruction reads and writes."""
        if x.op != "fusion":
            read = sum(_read(x, name, inside[name].type) for name in dict.fromkeys(x.operands) if name in inside)
            return read + (_update(x, inside) if x.op == "dynamic-update-slice" else size(x.type))
        body = self.computations[_attribute(x, "calls")]
        read = 0
        for p in body.values():
            if p.op == "parameter":
                uses = list(_uses(p.name, body))
                read += min(size(p.type), sum(_read(use, name, p.type) for use, name in uses))
        return read + sum(
            _update(y, body) if y.op == "dynamic-update-slice" else size(y.type)
            for y in _results(next(reversed(body.values())), body)
        )


def _parse(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
    if not match:
        return None
    name, rest = match.groups()
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    op, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    return Instruction(name, shape, op, re.findall(r"%([\w.\-]+)", rest[: end - 1]), rest[end:])


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


def _passes(x: Instruction) -> int | None:
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"', x.attributes)
    return int(match[1]) if match else None


def _origin(x: Instruction) -> str:
    """The end of the jax operation's path that an instruction came from, and the instruction's own kind."""
    match = re.search(r'op_name="([^"]*)"', x.attributes)
    kind = re.sub(r"[.\d]+$", "", x.name)
    return f"{kind} {x.type.split('{')[0]}" + (f" · {'/'.join(match[1].split('/')[-2:])}" if match else "")


def _uses(name: str, body: dict[str, Instruction]) -> Iterator[tuple[Instruction, str]]:
    """The instructions that read a value, looking through those that only rename it, and the name they read it by."""
    for x in body.values():
        if name in x.operands:
            if x.op == "bitcast":
                yield from _uses(x.name, body)
            else:
                yield x, name


def _read(use: Instruction, name: str, shape: str) -> int:
    """Bytes that an instruction reads of an operand."""
    if use.operands[0] == name and use.operands.count(name) == 1:
        if use.op in SLICES:
            return min(size(use.type), size(shape))
        if use.op == "dynamic-update-slice":
            return 0
    return size(shape)


def _update(x: Instruction, body: dict[str, Instruction]) -> int:
    return size(body[x.operands[1]].type)


def _results(root: Instruction, body: dict[str, Instruction]) -> Iterator[Instruction]:
    if root.op in ("tuple", "bitcast"):
        for name in root.operands:
            yield from _results(body[name], body)
    else:
        yield root
