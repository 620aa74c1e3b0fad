"""The text of an HLO program, parsed: computations of instructions, with types, operands and attributes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\)\s*->.*\{\s*$")
_ASSIGN = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+)\s*=\s*")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_END = re.compile(r'^\}\s*(,\s*execution_thread="[^"]*")?\s*$')
_METADATA = re.compile(r'(?<!\w)metadata=\{(?:"(?:[^"\\]|\\.)*"|[^"}])*\}')
_SCOPE = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=\s]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_PLAIN = re.compile(r'[^()"]+')


@dataclass(frozen=True)
class Array:
    """Type of one array: bits of an element, and sizes."""

    bits: int
    shape: tuple[int, ...]

    @property
    def bytes(self) -> Fraction:
        return Fraction(self.bits * math.prod(self.shape), 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      opcode: as written, so asynchronous ones end in `-start` or `-done`.
      type: of the result, as written.
      inside: the text between the parentheses of the opcode.
      attributes: the text after them, without metadata.
      scope: the `op_name` of the metadata: the path of names in the traced program, "" if it has none.
    """

    name: str
    opcode: str
    type: str
    inside: str
    attributes: str
    scope: str

    @cached_property
    def arrays(self) -> list[Array]:
        """Types of the result; several for a tuple."""
        return arrays_of(self.type)

    @cached_property
    def operands(self) -> list[str]:
        return _NAME.findall(self.inside)

    def integers(self, attribute: str) -> list[int]:
        found = re.search(rf"\b{attribute}=\{{([\d,\s]*)\}}", self.attributes)
        return [int(i) for i in found[1].split(",") if i.strip()] if found else []

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations that the attributes name."""
        names = []
        for attribute in attributes:
            found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
            names += _NAME.findall(found[1]) if found else []
        return names

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass
class Computation:
    """Instructions by name, in order, and the name of the one whose value is the computation's."""

    instructions: dict[str, Instruction]
    root: str | None = None

    @property
    def result(self) -> Instruction | None:
        return self.instructions.get(self.root)

    def operand_arrays(self, op: Instruction) -> list[Array]:
        """Types of all operands, those of tuples laid flat.

        Raises:
          ValueError: an operand that the computation does not have.
        """
        return [array for name in op.operands for array in self.operand(op, name).arrays]

    def operand(self, op: Instruction, name: str) -> Instruction:
        if name not in self.instructions:
            raise ValueError(f"{op.name}: operand of unknown shape in the HLO text")
        return self.instructions[name]

    def users(self, name: str) -> list[Instruction]:
        return [op for op in self.instructions.values() if name in op.operands]


@dataclass(frozen=True)
class Program:
    """A parsed program.

    Attributes:
      computations: by name.
      entry: name of the one that runs.
      devices: on which it runs, by the header of the text.
    """

    computations: dict[str, Computation]
    entry: str
    devices: int


def parse(text: str) -> Program:
    """The program whose text is `text`.

    Raises:
      ValueError: no entry computation, or a line that cannot be read.
    """
    header = text.split("\n", 1)[0]
    counts = [re.search(rf"\b{name}=(\d+)", header) for name in ("num_partitions", "replica_count")]
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _whole_lines(text):
        if _END.match(line):
            if current is not None and current.root is None:
                raise ValueError(f"a computation without a result in the HLO text, before {line!r}")
            current = None
        elif current is None:
            if head := _HEADER.match(line):
                current = computations[head[2]] = Computation({})
                entry = head[2] if head[1] else entry
        elif parsed := _instruction(line):
            instruction, is_root = parsed
            current.instructions[instruction.name] = instruction
            current.root = instruction.name if is_root else current.root
    if not entry:
        raise ValueError("no ENTRY computation; pass the text of compiled.as_text()")
    return Program(computations, entry, math.prod(int(found[1]) for found in counts if found))


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, an instruction on one: what kernels say of themselves stands on several."""
    pending: list[str] = []
    for line in text.splitlines():
        if pending and not (_ASSIGN.match(line) or _END.match(line)):
            pending.append(line)
            continue
        if pending:
            yield "".join(pending)
        pending = [line] if _ASSIGN.match(line) else []
        if not pending:
            yield line
    if pending:
        yield "".join(pending)


def arrays_of(type_text: str) -> list[Array]:
    """Array types in the text of a type; layouts, tilings and memory spaces do not change what is sent."""
    found = []
    for name, dims in _ARRAY.findall(type_text):
        bits = 8 if name == "pred" else int(re.match(r"[a-z]+(\d*)", name)[1] or 0)
        found.append(Array(bits, tuple(int(d.strip("<= ")) for d in dims.split(",") if d.strip())))
    return found


def _instruction(line: str) -> tuple[Instruction, bool] | None:
    head = _ASSIGN.match(line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if not opcode:
        raise ValueError(f"cannot read the HLO instruction {line.strip()[:160]!r}")
    start = opcode.end() - 1
    stop = _closing(rest, start)
    attributes, scope = rest[stop + 1 :], ""
    if metadata := _METADATA.search(attributes):
        named = _SCOPE.search(metadata[0])
        scope = named[1].replace("\\'", "'").replace('\\"', '"') if named else ""
        attributes = attributes[: metadata.start()] + attributes[metadata.end() :]
    return Instruction(head[2], opcode[1], rest[:end], rest[start + 1 : stop], attributes, scope), bool(head[1])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`; quoted text is skipped."""
    depth, i = 0, start
    while i < len(text):
        c = text[i]
        if c == "(":
            depth += 1
        elif c == ")":
            depth -= 1
            if depth == 0:
                return i
        elif c == '"':
            i = _unquote(text, i)
        else:
            i = _PLAIN.match(text, i).end()
            continue
        i += 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[start : start + 120]!r}")


def _unquote(text: str, start: int) -> int:
    """Index of the quote that ends the one at `start`."""
    i = start + 1
    while i < len(text) and text[i] != '"':
        i += 1 + (text[i] == "\\")
    return i
