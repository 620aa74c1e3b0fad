"""Progress of long work: a bar on a terminal, a line now and then elsewhere. No files, no arrays."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY_SECONDS = 10.0
"""Without a terminal, at most one line in this time."""


class ProgressBar:
    """Counts work done out of a total, with a few figures beside it and the time left.

    Args:
      what: the work, as a reader would call it.
      total: how many units.
      done: how many are done already (a resumed run).
      quiet: print nothing (every process but one).
    """

    def __init__(self, what: str, total: int, *, done: int = 0, quiet: bool = False):
        self.what, self.total, self.done = what, total, done
        self._figures, self._printed, self._quiet = "", time.monotonic(), quiet
        self._began, self._done_before = time.monotonic(), done
        self._bar = None
        if not quiet and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(what, total=total, completed=done, figures="")

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self._quiet and kind is None:
            self._line()

    def advance(self, units: int = 1, **figures: str) -> None:
        """Count work; keyword arguments are shown as `name value`."""
        self.done += units
        if figures:
            self._figures = "  ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, figures=self._figures)
        elif not self._quiet and time.monotonic() - self._printed > PLAIN_EVERY_SECONDS:
            self._line()

    def _line(self) -> None:
        self._printed = time.monotonic()
        speed = (self.done - self._done_before) / max(self._printed - self._began, 1e-9)
        left = f"{(self.total - self.done) / speed:.0f} s left" if speed > 0 and self.done < self.total else ""
        print(f"{self.what} {self.done}/{self.total}  {self._figures}  {left}".rstrip(), file=sys.stderr, flush=True)


@contextlib.contextmanager
def megabytes(what: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar over `total` bytes, counted in megabytes; gives the function that counts bytes as they pass."""
    up = lambda size: -(-size // 10**6)
    passed = 0
    with ProgressBar(f"{what}, MB", up(total), quiet=quiet) as bar:

        def advance(size: int) -> None:
            nonlocal passed
            passed += size
            bar.advance(up(passed) - bar.done)

        yield advance
