"""Where the time of a step goes: a trace of some steps for xprof, and its seconds summed by part of the step.

    irope train --config=... --profile=20:5      # steps 20 to 24, into RUN/profile
    xprof RUN/profile                            # every operation on a time line, in a browser

The sums need no browser. They join two things: what the runtime says of each operation it ran, and what the compiled
program says of where in the model the operation comes from.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from irope_jax.core.config import ConfigError

log = logging.getLogger(__name__)

PROFILE_DIRECTORY = "profile"

PARTS = (
    ("optimizer", "optimizer"),
    ("loss", "output and loss"),
    ("attend", "attention"),
    ("attention", "attention projections"),
    ("feed_forward", "feed-forward"),
    ("embed", "embedding"),
)
"""Names of scopes in the order they are looked for, and what the part is called."""

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OP_NAME = re.compile(r"op_name=\"([^\"]*)\"")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_CONTROL = re.compile(r"^(while|call|cond|async-)(\b|[.\d_-]|itional)")


@dataclass(frozen=True)
class Steps:
    """Which steps to trace: `first`, and how many. Steps are counted as in the records, from 1."""

    first: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Steps:
        """From `FIRST:COUNT`.

        Raises:
          ConfigError: anything else.
        """
        first, colon, count = text.partition(":")
        if not (first.isdecimal() and (count.isdecimal() or not colon) and int(first) and int(count or 1)):
            fix = "give the first step, and how many: --profile=20:5; the first steps of a run also compile"
            raise ConfigError("--profile", text, fix)
        return cls(int(first), int(count or 1))

    @property
    def last(self) -> int:
        return self.first + self.count - 1


class Profiler:
    """Traces the steps it is asked for, in the loop; each process into files of its own name."""

    def __init__(self, steps: Steps | None, directory: Path):
        self._steps, self._directory, self._running = steps, directory / PROFILE_DIRECTORY, False

    def before(self, step: int) -> None:
        if self._steps is not None and step == self._steps.first:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, result: Any, program: Callable[[], str]) -> None:
        """`program` gives the text of what ran; asked for once, after the last step."""
        if not self._running or step < self._steps.last:
            return
        jax.block_until_ready(result)
        self.close()
        log.info("trace of steps %d to %d in %s; to look at it: xprof %s", self._steps.first, step,
                 self._directory, self._directory)  # fmt: skip
        try:
            found = seconds_by_part(self._directory, program())
        except Exception as error:  # a trace without sums is still a trace
            log.warning("its time by part cannot be told: %s", error)
            return
        total = sum(found.values()) or 1.0
        for part, seconds in found.items():
            if seconds / total >= 0.005:
                log.info("  %5.1f %%  %s", 100 * seconds / total, " ".join(filter(None, part)))

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


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
    within, holder, calls, names = "", {}, {}, {}
    inside: dict[str, str] = {}
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            within = found[1]
        elif found := _OPERATION.match(line):
            holder[found[1]] = within
            if called := _CALLS.search(line):
                calls[found[1]] = called[1]
            if named := _OP_NAME.search(line):
                names[found[1]] = named[1]
                inside.setdefault(within, named[1])

    def name_of(operation: str) -> str:
        places = (calls.get(operation), holder[operation])
        return names.get(operation) or next((inside[place] for place in places if place in inside), "")

    return {operation: part_of(name_of(operation)) for operation in holder}


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
    parts, total = parts_of_program(program), defaultdict(float)
    for name, seconds in seconds_by_operation(directory).items():
        total[parts.get(name, Part("other", ""))] += seconds
    return dict(sorted(total.items(), key=lambda item: -item[1]))
