"""A run that hangs says so: which step, what it was doing, on which host, and where every thread stands.

A computation across machines hangs, rather than fails, when one of them does not take part. Here: noticing that
nothing moves. Not here: noticing that another process is gone (`pulse.py`).
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

import jax

from irope_jax.core.config import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WatchdogConfig:
    """When a run is thought to hang.

    Attributes:
      seconds: without a finished step, after which it is said, and again after each as many; longer than the longest
        compilation, evaluation and save. None never does.
      exit_code: leave with it, so that a launcher starts the run again; None only says it.
    """

    seconds: float | None = 600.0
    exit_code: int | None = None

    def __post_init__(self):
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError("seconds", self.seconds, "must be greater than 0, or None for no watchdog")
        if self.exit_code is not None and not 3 <= self.exit_code <= 125:
            fix = "choose 3 to 125: 0 to 2 and 128 + signal have a meaning already, and 2 is not started again"
            raise ConfigError("exit_code", self.exit_code, fix)


class Watchdog:
    """Watches while the `with` block runs.

        with Watchdog(WatchdogConfig()) as dog:
            dog.beat(step)                       # a step is finished
            dog.beat(step, "evaluation")         # and what comes now; it has its own time

    Args:
      clock: seconds, monotonic.
      out: where the stacks go, something with a file descriptor.
      leave: ends the process; it must not wait for anything.
    """

    def __init__(
        self,
        config: WatchdogConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        out: TextIO | None = None,
        leave: Callable[[int], object] = os._exit,
    ):
        self._config, self._clock, self._out, self._leave = config, clock, out or sys.stderr, leave
        self._beat = (clock(), 0, "start-up")
        self._told = self._beat[0]
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, step: int, phase: str = "training") -> None:
        """`step` is finished; `phase` is what comes now."""
        self._beat = (self._clock(), step, phase)  # one assignment: the other thread sees all of it or nothing

    def check(self) -> bool:
        """Whether the run seems to hang; says it once per `seconds`. Called by the thread every now and then."""
        if self._config.seconds is None:
            return False
        (last, step, phase), now = self._beat, self._clock()
        if now - max(last, self._told) < self._config.seconds:
            return False
        self._told = now
        log.error(
            "nothing finished for %.0f s: %s after step %d, process %d of %d on %s; its threads:",
            now - last, phase, step, jax.process_index(), jax.process_count(), socket.gethostname(),
        )  # fmt: skip
        self._out.flush()
        faulthandler.dump_traceback(self._out, all_threads=True)
        self._out.flush()
        if self._config.exit_code is not None:
            self._leave(self._config.exit_code)
        return True

    def _watch(self) -> None:
        while not self._stop.wait(min(5.0, self._config.seconds / 10)):
            self.check()

    def __enter__(self) -> Watchdog:
        if self._config.seconds is not None:
            self._beat = (self._clock(), *self._beat[1:])
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
