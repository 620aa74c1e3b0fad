"""Costs read from the text of a compiled program: matrix-product FLOPs and bytes sent, loops multiplied out.

`compiled.cost_analysis()` counts the body of a loop once, so a scan over blocks shows a thousandth of its work. This
module walks the optimized HLO (`compiled.as_text()`) instead: it follows fusions, calls, loops and conditionals from
the entry computation, multiplies loop bodies by their trip counts and counts every dot, convolution and matrix-product
library call. Numbers are per device: after partitioning the text is the program of one device.

What it does not see: products that the compiler rewrote as multiply and reduce (an inner product of two vectors, an
outer product; nothing with two matrices), elementwise work, and the inside of kernels called by name
(`HloCost.opaque_calls` lists them). Nothing here compiles, runs or imports jax.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property


@dataclass(frozen=True)
class HloCost:
    """Cost of one execution of a program on one device.

    Attributes:
      matmul_flops_max: two per multiply-add, each conditional taking its most expensive branch: what devices in
        lockstep pay.
      matmul_flops_min: the same with the cheapest branches. Equal to `matmul_flops_max` without conditionals.
      collective_bytes: bytes a device sends, by kind of collective, ring algorithms assumed: with n devices in a group
        and an operand of b bytes, all-reduce 2 b (n-1)/n, all-gather b (n-1), reduce-scatter and all-to-all
        b (n-1)/n, collective-permute b times the share of devices that send to another one. Of a conditional the
        largest branch counts, kind by kind. XLA:CPU sends bfloat16 as float32.
      unknown_trips: loops whose number of rounds is not static; their bodies were counted once.
      instructions: instructions in the text, those inside fusions included.
      opaque_calls: custom calls whose inside is unknown, by target name, each counted once.
    """

    matmul_flops_max: int
    matmul_flops_min: int
    collective_bytes: dict[str, float]
    unknown_trips: int
    instructions: int
    opaque_calls: dict[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> float:
        """Bytes a device sends, all kinds together."""
        return sum(self.collective_bytes.values())


def analyse(text: str) -> HloCost:
    """Cost of the program whose optimized HLO is `text` (`jax.jit(f).lower(...).compile().as_text()`).

    Raises:
      ValueError: the text has no entry computation, or an instruction that matters is written in an unknown form.
    """
    module = _Module(text)
    cost = module.cost(module.entry)
    return HloCost(
        matmul_flops_max=cost.most,
        matmul_flops_min=cost.least,
        collective_bytes={kind: float(count) for kind, count in sorted(cost.sent.items()) if count},
        unknown_trips=len(module.unknown_loops),
        instructions=sum(len(c.instructions) for c in module.computations.values()),
        opaque_calls=dict(module.opaque),
    )


def matmul_flops(text: str) -> int:
    """Matrix-product FLOPs of a program whose loops are all static.

    Raises:
      ValueError: a loop has an unknown number of rounds, or a conditional has branches of unequal cost; `analyse`
        reports such programs.
    """
    cost = analyse(text)
    if cost.unknown_trips:
        raise ValueError(f"{cost.unknown_trips} loops have no static trip count; analyse() counts their bodies once")
    if cost.matmul_flops_max != cost.matmul_flops_min:
        raise ValueError("branches of a conditional cost differently; read the minimum and maximum from analyse()")
    return cost.matmul_flops_max


# --- reading the text -------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\)\s*->.*\{\s*$")
_ASSIGN = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+)\s*=\s*")
_METADATA = re.compile(r'metadata=\{(?:"(?:[^"\\]|\\.)*"|[^"}])*\}')
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=\s]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count\\?":\s*\{\\?"n\\?":\s*\\?"(\d+)')
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_OTHER_COLLECTIVES = ("ragged-all-to-all", "collective-broadcast")
_UNKNOWN = ("unknown", -1)
_MATMUL_CALL = re.compile(r"gemm|matmul|dot", re.IGNORECASE)


@dataclass(frozen=True)
class _Array:
    bits: int
    shape: tuple[int, ...]

    @property
    def bytes(self) -> Fraction:
        return Fraction(self.bits * math.prod(self.shape), 8)


@dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    type: str
    inside: str  # between the parentheses of the opcode
    attributes: str  # after them, without metadata

    @cached_property
    def arrays(self) -> list[_Array]:
        return _arrays(self.type)

    @cached_property
    def operands(self) -> list[str]:
        return _NAME.findall(self.inside)

    def integers(self, attribute: str) -> list[int]:
        found = re.search(rf"\b{attribute}=\{{([\d,\s]*)\}}", self.attributes)
        return [int(i) for i in found[1].split(",") if i.strip()] if found else []

    def called(self, *attributes: str) -> list[str]:
        names = []
        for attribute in attributes:
            found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
            names += _NAME.findall(found[1]) if found else []
        return names


@dataclass
class _Computation:
    instructions: dict[str, _Instruction]
    root: str | None = None


@dataclass
class _Cost:
    most: int = 0
    least: int = 0
    sent: Counter = field(default_factory=Counter)

    def add(self, other: _Cost, times: int = 1) -> None:
        self.most += times * other.most
        self.least += times * other.least
        for kind, count in other.sent.items():
            self.sent[kind] += times * count


def _arrays(type_text: str) -> list[_Array]:
    found = []
    for name, dims in _ARRAY.findall(type_text):
        bits = 8 if name == "pred" else int(re.match(r"[a-z]+(\d*)", name)[1] or 0)
        found.append(_Array(bits, tuple(int(d.strip("<= ")) for d in dims.split(",") if d.strip())))
    return found


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`; quoted text is skipped."""
    depth, quoted, i = 0, False, start
    while i < len(text):
        c = text[i]
        if quoted:
            i += c == "\\"
            quoted = text[i] != '"' or c == "\\"
        elif c == '"':
            quoted = True
        elif c == "(":
            depth += 1
        elif c == ")":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[start : start + 120]!r}")


def _parse(line: str) -> tuple[_Instruction, bool] | None:
    head = _ASSIGN.match(line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if not opcode:
        raise ValueError(f"cannot read the HLO instruction {line.strip()[:160]!r}")
    start = end + opcode.end() - 1
    stop = _closing(rest, start)
    attributes = _METADATA.sub("", rest[stop + 1 :])
    return _Instruction(head[2], opcode[1], rest[:end], rest[start + 1 : stop], attributes), bool(head[1])


class _Module:
    """A parsed program and the memoized cost of each of its computations."""

    def __init__(self, text: str):
        self.computations: dict[str, _Computation] = {}
        self.entry = ""
        self.unknown_loops: set[str] = set()
        self.opaque: Counter = Counter()
        self._costs: dict[str, _Cost] = {}
        header = text.split("\n", 1)[0]
        counts = [re.search(rf"\b{name}=(\d+)", header) for name in ("num_partitions", "replica_count")]
        self.devices = math.prod(int(found[1]) for found in counts if found)
        current = None
        for line in text.splitlines():
            if line.startswith("}"):
                current = None
            elif current is None:
                if head := _HEADER.match(line):
                    current = self.computations[head[2]] = _Computation({})
                    self.entry = head[2] if head[1] else self.entry
            elif parsed := _parse(line):
                instruction, is_root = parsed
                current.instructions[instruction.name] = instruction
                current.root = instruction.name if is_root else current.root
        if not self.entry:
            raise ValueError("no ENTRY computation; pass the text of compiled.as_text()")

    def cost(self, name: str) -> _Cost:
        if name not in self._costs:
            total = _Cost()
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                total.add(self._instruction(instruction, computation))
            self._costs[name] = total
        return self._costs[name]

    def _instruction(self, op: _Instruction, inside: _Computation) -> _Cost:
        opcode = op.opcode.removesuffix("-start")
        if opcode == "while":
            return self._loop(op, inside)
        if opcode == "conditional":
            names = op.called("branch_computations", "true_computation", "false_computation")
            branches = [self.cost(name) for name in names]
            sent = Counter()
            for branch in branches:
                sent |= branch.sent  # the larger of each kind
            return _Cost(max(b.most for b in branches), min(b.least for b in branches), sent)
        total = _Cost()
        if opcode in ("fusion", "call", "async", "custom-call"):
            for name in op.called("calls", "to_apply", "called_computations"):
                total.add(self.cost(name))
        flops = 0
        if opcode == "dot":
            flops = _dot_flops(op, self._operands(op, inside))
        elif opcode == "convolution":
            flops = _convolution_flops(op, self._operands(op, inside))
        elif opcode == "custom-call" and not (total.most or total.sent):
            flops = self._custom_call(op, inside)
        elif opcode in _COLLECTIVES:
            total.sent[opcode] += self._sent(opcode, op, inside)
        elif opcode in _OTHER_COLLECTIVES:
            total.sent[opcode] += sum(a.bytes for a in self._operands(op, inside))
        total.most += flops
        total.least += flops
        return total

    def _operands(self, op: _Instruction, inside: _Computation) -> list[_Array]:
        if not all(name in inside.instructions for name in op.operands):
            raise ValueError(f"{op.name}: operand of unknown shape in the HLO text")
        return [a for name in op.operands for a in inside.instructions[name].arrays]

    def _custom_call(self, op: _Instruction, inside: _Computation) -> int:
        target = re.search(r'custom_call_target="([^"]*)"', op.attributes)[1]
        flops = _library_flops(op, self._operands(op, inside)) if _MATMUL_CALL.search(target) else None
        if flops is None:
            self.opaque[target] += 1
        return flops or 0

    def _sent(self, kind: str, op: _Instruction, inside: _Computation) -> Fraction:
        size = sum(a.bytes for a in self._operands(op, inside))
        if kind == "collective-permute":
            found = re.search(r"source_target_pairs=\{((?:\{\d+,\s*\d+\},?\s*)*)\}", op.attributes)
            if not found:
                raise ValueError(f"{op.name}: cannot read source_target_pairs")
            pairs = re.findall(r"\{(\d+),\s*(\d+)\}", found[1])
            devices = max(self.devices, len({d for pair in pairs for d in pair}), 1)
            return size * Fraction(sum(a != b for a, b in pairs), devices)
        n = self._group_size(op)
        if kind == "all-gather":
            return size * (n - 1)
        return size * Fraction((2 if kind == "all-reduce" else 1) * (n - 1), n)

    def _group_size(self, op: _Instruction) -> int:
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", op.attributes):
            return int(found[1])
        if found := re.search(r"replica_groups=\{\s*\{([\d,\s]*)\}", op.attributes):
            return len(found[1].split(","))
        if found := re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\]\s*\{([^}]*)\}", op.attributes):
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
            # An axis, or `'axis':(before)size` for a part of one.
            axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        if re.search(r"replica_groups=\{\s*\}", op.attributes) or "replica_groups=" not in op.attributes:
            return self.devices
        raise ValueError(f"{op.name}: cannot read replica_groups in {op.attributes[:200]!r}")

    # --- loops --------------------------------------------------------------------------------------------------------

    def _loop(self, op: _Instruction, inside: _Computation) -> _Cost:
        (body,), (condition,) = op.called("body"), op.called("condition")
        known = _TRIPS.search(op.attributes)
        trips = int(known[1]) if known else self._counted(op, inside, body, condition)
        if trips is None:
            self.unknown_loops.add(op.name)
            trips = 1
        total = _Cost()
        total.add(self.cost(body), trips)
        total.add(self.cost(condition), trips)
        return total

    def _counted(self, op: _Instruction, inside: _Computation, body: str, condition: str) -> int | None:
        """Rounds of `for (i = a; i < b; i += s)` when a, b and s are constants in the text, else None."""
        init = inside.instructions.get(op.operands[0])
        test = self._expand(condition, self.computations[condition].root)
        if not init or init.opcode != "tuple" or not test or test[0] not in ("LT", "LE") or test[1][0] != "carried":
            return None
        direction, counter, bound = test
        step = self._expand(body, self._element(body, counter[1]))
        if not step or step[:2] != ("add", counter) or step[2][0] != "constant" or step[2][1] <= 0:
            return None
        if bound[0] == "carried":  # a bound that the body passes on unchanged
            kept = self._atom(self.computations[body], self._element(body, bound[1]))
            bound = self._atom(inside, init.operands[bound[1]]) if kept == bound else _UNKNOWN
        first = self._atom(inside, init.operands[counter[1]])
        if first[0] != "constant" or bound[0] != "constant":
            return None
        return max(0, -(-(bound[1] + (direction == "LE") - first[1]) // step[2][1]))

    def _element(self, computation: str, index: int) -> str | None:
        root = self.computations[computation].instructions.get(self.computations[computation].root)
        return root.operands[index] if root and root.opcode == "tuple" else None

    def _expand(self, computation: str, name: str | None) -> tuple | None:
        """`(direction or 'add', atom, atom)` of a comparison or addition, looking through one fusion."""
        here = self.computations[computation]
        op = here.instructions.get(name)
        if op is None:
            return None
        atoms = [self._atom(here, operand) for operand in op.operands]
        if op.opcode == "fusion":
            inner = self.computations[op.called("calls")[0]]
            op = inner.instructions[inner.root]
            found = [self._atom(inner, operand) for operand in op.operands]
            atoms = [atoms[value] if kind == "parameter" else (kind, value) for kind, value in found]
        if op.opcode == "add" and len(atoms) == 2:
            return ("add", *sorted(atoms))
        found = re.search(r"direction=(\w+)", op.attributes)
        return (found[1], *atoms) if op.opcode == "compare" and found and len(atoms) == 2 else None

    def _atom(self, here: _Computation, name: str | None) -> tuple:
        op = here.instructions.get(name)
        while op is not None and op.opcode in ("copy", "convert", "bitcast"):
            op = here.instructions.get(op.operands[0])
        if op is None:
            return _UNKNOWN
        if op.opcode == "constant" and re.fullmatch(r"-?\d+", op.inside.strip()):
            return ("constant", int(op.inside))
        if op.opcode == "parameter":
            return ("parameter", int(op.inside))
        if op.opcode == "get-tuple-element":
            return ("carried", int(re.search(r"index=(\d+)", op.attributes)[1]))
        return _UNKNOWN


# --- FLOPs of one instruction -----------------------------------------------------------------------------------------


def _dot_flops(op: _Instruction, operands: list[_Array]) -> int:
    summed = math.prod(operands[0].shape[d] for d in op.integers("lhs_contracting_dims"))
    return 2 * math.prod(op.arrays[0].shape) * summed


def _library_flops(op: _Instruction, operands: list[_Array]) -> int | None:
    """FLOPs of a call to a matrix-product library, from its dimension numbers or, without them, from its shapes."""
    lhs, rhs, out = operands[0].shape, operands[1].shape, op.arrays[0].shape
    if found := re.search(r'lhs_contracting_dimensions\\?":\s*\[([^\]]*)\]', op.attributes):
        return 2 * math.prod(out) * math.prod(lhs[int(d)] for d in re.findall(r"\d+", found[1]))
    summed_squared = Fraction(math.prod(lhs) * math.prod(rhs), max(1, math.prod(out) * math.prod(out[:-2])))
    summed = math.isqrt(int(summed_squared))
    return 2 * math.prod(out) * summed if summed * summed == summed_squared else None


def _convolution_flops(op: _Instruction, operands: list[_Array]) -> int:
    """Multiply-adds that touch real inputs (not padding, not the holes of a dilation), times two."""
    lhs_labels, rhs_labels, out_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes).groups()
    lhs, rhs, out = operands[0].shape, operands[1].shape, op.arrays[0].shape
    window = re.search(r"window=\{([^}]*)\}", op.attributes)
    settings = dict(item.split("=") for item in window[1].split()) if window else {}
    spatial = sorted(c for c in rhs_labels if c.isdigit())
    macs = out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    for n, axis in enumerate(spatial):
        setting = {key: int(value.split("x")[n].split("_")[0]) for key, value in settings.items()}
        macs *= _touching(
            taps=rhs[rhs_labels.index(axis)],
            dilation=setting.get("rhs_dilate", 1),
            places=out[out_labels.index(axis)],
            stride=setting.get("stride", 1),
            low=setting.get("pad", 0),
            size=lhs[lhs_labels.index(axis)],
            holes=setting.get("lhs_dilate", 1),
        )
    return 2 * macs


def _touching(taps: int, dilation: int, places: int, stride: int, low: int, size: int, holes: int) -> int:
    """Pairs (place, tap) of one axis whose input index `place * stride + tap * dilation - low` is a real input."""
    last = (size - 1) * holes
    count = 0
    for tap in range(taps):
        offset = tap * dilation - low
        first_place = max(0, -(offset // stride))
        last_place = min(places - 1, (last - offset) // stride)
        if holes == 1:
            count += max(0, last_place - first_place + 1)
        else:
            count += sum((p * stride + offset) % holes == 0 for p in range(first_place, last_place + 1))
    return count
