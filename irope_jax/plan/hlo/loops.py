"""How many rounds a loop makes: as the compiler notes it, else read from its start, step and bound."""

from __future__ import annotations

import re

from irope_jax.plan.hlo.text import Computation, Instruction, Program

_TRIPS = re.compile(r'known_trip_count\\?":\s*\{\\?"n\\?":\s*\\?"(\d+)')
_UNKNOWN = ("unknown", -1)
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}
_PASSING = ("copy", "convert", "bitcast", "copy-done", "copy-start", "reshape", "optimization-barrier")


def rounds(op: Instruction, inside: Computation, program: Program) -> int | None:
    """Rounds of the loop `op`, None if the text does not tell."""
    if known := _TRIPS.search(op.attributes):
        return int(known[1])
    (body,), (condition,) = op.called("body"), op.called("condition")
    return _Loop(program).counted(op, inside, body, condition)


class _Loop:
    """Reads `for (i = a; i < b; i += s)` where a, b and s are constants. TPU programs have no other note of it."""

    def __init__(self, program: Program):
        self.computations = program.computations

    def counted(self, op: Instruction, inside: Computation, body: str, condition: str) -> int | None:
        init = inside.instructions.get(op.operands[0])
        test = self._expand(condition, self.computations[condition].root)
        if not init or init.opcode != "tuple" or not test or test[0] not in _FLIPPED:
            return None
        direction, counter, bound = test
        if counter[0] != "carried" or (bound[0] == "carried" and self._is_kept(body, counter[1])):
            direction, counter, bound = _FLIPPED[direction], bound, counter
        if counter[0] != "carried":
            return None
        step = self._expand(body, self._element(body, counter[1]))
        if not step or step[:2] != ("add", counter) or step[2][0] != "constant":
            return None
        if bound[0] == "carried":  # a bound that the body passes on unchanged
            bound = self._atom(inside, init.operands[bound[1]]) if self._is_kept(body, bound[1]) else _UNKNOWN
        first = self._atom(inside, init.operands[counter[1]])
        if first[0] != "constant" or bound[0] != "constant":
            return None
        way, by = bound[1] - first[1], step[2][1]
        if direction in ("GT", "GE"):
            way, by = -way, -by
        if by <= 0 and direction != "NE":
            return None
        if direction == "NE":
            return way // by if by and way % by == 0 and way // by >= 0 else None
        return max(0, -(-(way + (direction in ("LE", "GE"))) // by))

    def _is_kept(self, body: str, index: int) -> bool:
        return self._atom(self.computations[body], self._element(body, index)) == ("carried", index)

    def _element(self, computation: str, index: int) -> str | None:
        root = self.computations[computation].result
        return root.operands[index] if root and root.opcode == "tuple" else None

    def _expand(self, computation: str, name: str | None) -> tuple | None:
        """`(direction or 'add', atom, atom)` of a comparison or addition, looking through one fusion."""
        here = self.computations[computation]
        op = here.instructions.get(name)
        while op is not None and op.opcode in _PASSING:
            op = here.instructions.get(op.operands[0])
        index = None
        if op is not None and op.opcode == "get-tuple-element":  # one result of a fusion that has several
            index = int(re.search(r"index=(\d+)", op.attributes)[1])
            op = here.instructions.get(op.operands[0])
        if op is None or (index is not None and op.opcode != "fusion"):
            return None
        atoms = [self._atom(here, operand) for operand in op.operands]
        if op.opcode == "fusion":
            inner = self.computations[op.called("calls")[0]]
            op = inner.result
            if index is not None:
                op = inner.instructions[op.operands[index]] if op.opcode == "tuple" else op
            found = [self._atom(inner, operand) for operand in op.operands]
            atoms = [atoms[value] if kind == "parameter" else (kind, value) for kind, value in found]
        if op.opcode == "add" and len(atoms) == 2:
            return ("add", *sorted(atoms))
        if op.opcode == "subtract" and len(atoms) == 2 and atoms[1][0] == "constant":
            return ("add", atoms[0], ("constant", -atoms[1][1]))
        found = re.search(r"direction=(\w+)", op.attributes)
        return (found[1], *atoms) if op.opcode == "compare" and found and len(atoms) == 2 else None

    def _atom(self, here: Computation, name: str | None) -> tuple:
        op = here.instructions.get(name)
        while op is not None and op.opcode in _PASSING:
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
