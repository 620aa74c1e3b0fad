"""Processes and signals: who logs, and how a run is asked to stop. No files and no arrays."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType

import jax


def is_main_process() -> bool:
    """True in the one process that writes records and prints."""
    return jax.process_index() == 0


def configure_logging(level: int = logging.INFO) -> None:
    """Log lines of this package to standard error, warnings of others; only errors outside process 0."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname).1s %(name)s: %(message)s"))
    package = logging.getLogger("irope_jax")
    package.handlers[:] = [handler]
    package.propagate = False
    package.setLevel(level if is_main_process() else logging.ERROR)


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag while the `with` block runs; a second SIGINT interrupts at once.

    Preemptible machines send SIGTERM some seconds before they go; the training loop looks at `signal` between steps,
    saves, and leaves.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
