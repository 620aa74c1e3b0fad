"""Where the time of a step goes: a trace of the runtime summed by part of the step.

What the runtime says of each operation it ran is joined with what the compiled program says of where in the model the
operation comes from. Taking the trace is `train.profile`'s.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jax

from irope_jax.plan.hlo.text import parse

PARTS = (
    ("optimizer", "optimizer"),
    ("loss", "output and loss"),
    ("attend", "attention"),
    ("attention", "attention projections"),
    ("feed_forward", "feed-forward"),
    ("embed", "embedding"),
)
"""Names of scopes in the order they are looked for, and what the part is called."""

_CONTROL = re.compile(r"^(while|call|cond|async-)(\b|[.\d_-]|itional)")


class Part(NamedTuple):
    """A part of a step, and whether it belongs to the forward or the backward pass, or to neither."""

    name: str
    direction: str


def part_of(op_name: str) -> Part:
    """The part that an operation belongs to, by the path of scopes that the compiler kept."""
    scopes = re.split(r"[/()]+", op_name)
    name = next((part for scope, part in PARTS if scope in scopes), "other")
    backward = "transpose" in scopes or "rematted_computation" in scopes
    return Part(name, "" if name == "optimizer" else "backward" if backward else "forward")


def parts_of_program(text: str) -> dict[str, Part]:
    """The part of each operation of an optimized program, by its name in the program (`Compiled.as_text()`).

    An operation without a name has that of the first that it computes, or that stands beside it in a branch or a loop.
    """
    computations = parse(text).computations
    first = {
        name: next((op.scope for op in computation.instructions.values() if op.scope), "")
        for name, computation in computations.items()
    }
    found = {}
    for name, computation in computations.items():
        for op in computation.instructions.values():
            inside = next((first[called] for called in op.called("calls") if first.get(called)), "")
            found[op.name] = part_of(op.scope or inside or first[name])
    return found


def seconds_by_operation(directory: str | Path) -> dict[str, float]:
    """Seconds that each operation ran, summed over the newest trace below a directory.

    Operations that only hold others (loops, calls) are left out. On several devices or threads they overlap: shares are
    meaningful, the sum is not the time that passed.

    Raises:
      FileNotFoundError: no trace below the directory.
    """
    traces = sorted(Path(directory).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise FileNotFoundError(f"{directory}: no trace below it")
    found: dict[str, float] = defaultdict(float)
    for plane in jax.profiler.ProfileData.from_file(str(traces[-1])).planes:
        for line in plane.lines:
            for event in line.events:
                name = event.name
                if name.startswith(("$", "end: ")) or _CONTROL.match(name):
                    continue
                if any(key == "hlo_op" for key, _ in event.stats):
                    found[name] += event.duration_ns / 1e9
    return dict(found)


def seconds_by_part(directory: str | Path, program: str) -> dict[Part, float]:
    """Seconds by part of the step that was traced below a directory, the largest first; `program` is its text.

    What the program does not name (copies, for one) is `other`.
    """
    operations = seconds_by_operation(directory)
    parts, total = parts_of_program(program), defaultdict(float)
    for name, seconds in operations.items():
        total[parts.get(name, Part("other", ""))] += seconds
    return dict(sorted(total.items(), key=lambda item: -item[1]))
