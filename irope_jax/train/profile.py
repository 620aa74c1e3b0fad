"""A trace of some steps for xprof, and, from whoever knows the program, its seconds by part of the step.

irope train --config=... --profile=20:5      # steps 20 to 24, into RUN/profile
xprof RUN/profile                            # every operation on a time line, in a browser
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from irope_jax.core.config import ConfigError

log = logging.getLogger(__name__)

PROFILE_DIRECTORY = "profile"

Sums = Callable[[Path, str], Mapping[tuple[str, ...], float]]


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
    """Traces the steps it is asked for, in the loop; each process into files of its own name.

    Args:
      steps: which; None traces nothing.
      directory: the run directory.
      sums: `(directory of the trace, text of the program) -> seconds by part`, told in the log.
    """

    def __init__(self, steps: Steps | None, directory: Path, sums: Sums | None = None):
        self._steps, self._directory, self._running = steps, directory / PROFILE_DIRECTORY, False
        self._sums = sums

    def before(self, step: int) -> None:
        if self._steps is not None and step == self._steps.first:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, result: Any, program: Callable[[], str]) -> bool:
        """Whether the trace ended here. `program` gives the text of what ran; asked for once, after the last step."""
        if not self._running or step < self._steps.last:
            return False
        jax.block_until_ready(result)
        self.close()
        log.info("trace of steps %d to %d in %s; to look at it: xprof %s", self._steps.first, step,
                 self._directory, self._directory)  # fmt: skip
        if self._sums is None:
            return True
        try:
            found = self._sums(self._directory, program())
        except Exception as error:  # a trace without sums is still a trace
            log.warning("its time by part cannot be told: %s", error)
            return True
        total = sum(found.values()) or 1.0
        for part, seconds in found.items():
            if seconds / total >= 0.005:
                log.info("  %5.1f %%  %s", 100 * seconds / total, " ".join(filter(None, part)))
        return True

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
