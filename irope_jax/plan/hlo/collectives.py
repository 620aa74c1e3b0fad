"""What a device sends in one collective, and on whose behalf.

Ring algorithms are assumed. Asynchronous forms are recognised: `X-start`/`X-done` pairs (the start counts), collectives
wrapped in another computation (followed there), and two fusions of the TPU compiler: an all-reduce of which each device
keeps a slice, which its kernel does as a reduce-scatter; and a collective spread over several fusions so that it runs
beside products, which stands in the text once in each of them but is sent once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from irope_jax.plan.hlo.text import Computation, Instruction, Program

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
OTHERS = ("ragged-all-to-all", "collective-broadcast")
_PAIRS = re.compile(r'source_target_pairs="?=?"?\{((?:\{\d+,\s*\d+\},?\s*)*)\}')
_PASSING = ("copy", "bitcast", "convert", "copy-done", "copy-start", "transpose", "reshape", "optimization-barrier")


@dataclass(frozen=True)
class Operand:
    """A value that a computation was given: the number of its parameter."""

    place: int


Scope = str | tuple[Operand, str]
"""A path of names, or that of whatever the caller passed as an operand and, if nothing says, the path beside it."""


def collective_sent(op: Instruction, inside: Computation, program: Program) -> tuple[str, dict[Scope, Fraction]] | None:
    """`(kind, bytes by scope)` that a device sends in `op`; None if it is no collective, or one counted elsewhere.

    The compiler merges collectives of several layers into one with many operands; each operand's bytes then go to the
    scope of what made it.

    Raises:
      ValueError: groups or pairs written in an unknown form.
    """
    kind = op.opcode.removesuffix("-start")
    if kind == "send":
        kind = "collective-permute" if _PAIRS.search(op.attributes) else "send"
    if kind not in KINDS and kind not in OTHERS:
        return None
    if "async_collective_fusion_config" in op.attributes and not _starts(op, inside):
        return None
    if kind == "all-reduce" and _keeps_slices(op, inside):
        kind = "reduce-scatter"
    share = _share(kind, op, program)
    # The others carry sizes, offsets and the buffer to fill beside what they send.
    names = op.operands[:1] if kind in OTHERS else op.operands
    sent: Counter[Scope] = Counter()
    for name in names:
        source = inside.operand(op, name)
        scope = op.scope if len(names) == 1 else made_by(source, inside, program) or op.scope
        scope = (scope, op.scope) if isinstance(scope, Operand) else scope
        sent[scope] += share * sum(array.bytes for array in source.arrays)
    if kind == "collective-permute" and (window := re.search(r"slice_sizes=\{\{([\d,]*)\}", op.attributes)):
        # Written in place: operands are two buffers and offsets, and a window of the first is sent.
        element = Fraction(inside.operand(op, names[0]).arrays[0].bits, 8)
        return kind, {op.scope: share * element * math.prod(int(d) for d in window[1].split(",") if d)}
    return kind, dict(sent)


def _starts(op: Instruction, inside: Computation) -> bool:
    return any(user.target == "AsyncCollectiveStart" for user in inside.users(op.name) if user.opcode == "custom-call")


def _keeps_slices(op: Instruction, inside: Computation) -> bool:
    """Of the sum, nothing but slices leaves the fusion that it stands in."""
    if "from-cross-replica-sharding" not in op.attributes:
        return False
    reached, slices = [op], []
    while reached:
        for user in inside.users(reached.pop().name):
            if user.opcode == "dynamic-slice":
                slices.append(user)
            elif user.opcode in (*_PASSING, "get-tuple-element") and user.name != inside.root:
                reached.append(user)
            else:
                return False
    return bool(slices)


def made_by(op: Instruction, inside: Computation, program: Program) -> str | Operand:
    """Scope of what made a value, looking through copies, tuples and fusions; "" if nothing says.

    An `Operand` if the computation was given the value: its caller knows.
    """
    index, callers = None, []  # element of a tuple; fusions that were entered, innermost last
    while True:
        if op.opcode == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", op.attributes)[1])
        elif op.opcode == "parameter" and index is None:
            place = int(op.inside)
            if not callers:
                return Operand(place)
            fusion, inside = callers.pop()
            op = inside.instructions[fusion.operands[place]]
            continue
        elif op.opcode == "fusion" and (index is not None or not op.scope):
            callers.append((op, inside))
            inside = program.computations[op.called("calls")[0]]
            op = inside.result
            continue
        elif op.opcode not in ("tuple", "parameter") and op.scope:
            return op.scope
        elif op.opcode not in (*_PASSING, "tuple", "dynamic-slice", *KINDS):
            return ""
        place = 0 if op.opcode == "get-tuple-element" or index is None else index
        index = index if op.opcode == "get-tuple-element" else None
        if place >= len(op.operands) or op.operands[place] not in inside.instructions:
            return ""
        op = inside.instructions[op.operands[place]]


def _share(kind: str, op: Instruction, program: Program) -> Fraction:
    """Bytes a device sends per byte of its operand."""
    if kind in OTHERS:
        return Fraction(1)
    if kind == "collective-permute":
        found = _PAIRS.search(op.attributes)
        if not found:
            raise ValueError(f"{op.name}: cannot read source_target_pairs")
        pairs = re.findall(r"\{(\d+),\s*(\d+)\}", found[1])
        devices = max(program.devices, len({d for pair in pairs for d in pair}), 1)
        return Fraction(sum(a != b for a, b in pairs), devices)
    n = _group_size(op, program.devices)
    if kind == "all-gather":
        return Fraction(n - 1)
    return Fraction((2 if kind == "all-reduce" else 1) * (n - 1), n)


def _group_size(op: Instruction, devices: int) -> int:
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", op.attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\s*\{([\d,\s]*)\}", op.attributes):
        return len(found[1].split(","))
    # Axes of a mesh, perhaps with the order of its devices between the mesh and the axes.
    if found := re.search(
        r"replica_groups=@?mesh\w*\[([^\]]*)\](?:,\s*device_ids=\([^{]*\))?\s*\{([^}]*)\}", op.attributes
    ):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        # An axis, or `'axis':(before)size` for a part of one.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if re.search(r"replica_groups=\{\s*\}", op.attributes) or "replica_groups=" not in op.attributes:
        return devices
    raise ValueError(f"{op.name}: cannot read replica_groups in {op.attributes[:200]!r}")
