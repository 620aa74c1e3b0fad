"""`irope sweep`: the cells of a study, run one after the other or several at a time, each as a process of its own.

A cell is `irope train` (or `eval`) with a config and overrides, so whatever holds for a run holds for it: killed, it
goes on from its newest checkpoint, and finished, it is not run again; evaluations that its cell got later are added.
This process never computes.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from irope_jax.core.config import ConfigError, nearest
from irope_jax.core.records import RECORDS_FILE
from irope_jax.launch import PROGRAM, STOPPED, end_with_parent
from irope_jax.study.grid import Cell, Study
from irope_jax.sweep_cells import LOGS, Work, command_for, folder_of, is_finished, load_study, standing_of, work_of
from irope_jax.sweep_cluster import write_jobs

_TAIL = 1 << 16
_PLAIN_EVERY = 30.0
"""Seconds between lines about running cells where there is no terminal."""


def sweep_verb(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    if overrides:
        fix = "a sweep takes its values from the grid; write an axis or an override there"
        raise ConfigError(f"config.{overrides[0][0]}", overrides[0][1], fix)
    if args.jobs < 1:
        raise ConfigError("--jobs", args.jobs, "cells at a time; use 1 or more")
    study = load_study(args.grid, args.scale)
    cells = study.chosen(args.only or ())
    root = Path(args.runs or Path("runs") / study.name)
    works = [work_of(cell, folder_of(args.grid), root, study) for cell in cells]
    if args.slurm or args.jobset:
        again = ["irope", "sweep", args.grid, f"--runs={root}"]
        again += [f"--scale={args.scale}"] * bool(args.scale) + [f"--only={word}" for word in args.only or ()]
        for line in write_jobs(study.name, levels(cells), again, args.slurm, args.jobset):
            print(line)
        return 0
    if args.task:
        works = [_task(works, args.task)]
        _check_start(works[0])
    if args.list:
        for work in works:
            print(_line(work, as_command=args.list == "commands"))
        return 0
    with contextlib.nullcontext() if args.task else alone(root):  # tasks of a job array share a study, a cell each
        return Sweep(study, works, args.jobs).run()


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Nobody else sweeps there: two processes in one run directory spoil it.

    Raises:
      ConfigError: somebody does.
    """
    (root / LOGS).mkdir(parents=True, exist_ok=True)
    with open(root / LOGS / "lock", "w") as file:
        if not _locked(file):
            raise ConfigError("--runs", str(root), "another sweep is at work there; wait for it or stop it")
        yield


def _locked(file: IO) -> bool:
    """Whether this process has it alone now, until it closes it or ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def levels(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that start from nothing, those that start from one of them, and so on."""
    depth: dict[str, int] = {}
    for cell in cells:
        depth[cell.name] = depth[cell.starts_from] + 1 if cell.starts_from in depth else 0
    return [[c for c in cells if depth[c.name] == level] for level in range(max(depth.values()) + 1)]


def _task(works: list[Work], name: str) -> Work:
    for work in works:
        if work.cell.name == name:
            return work
    raise ConfigError("--task", name, f"no such cell among those chosen; {nearest(name, [w.cell.name for w in works])}")


def _check_start(work: Work) -> None:
    """What a task starts from is another task's work.

    Raises:
      ConfigError: it is not done.
    """
    if work.start is not None and not is_finished(work.start):
        fix = f"it starts from {work.start}, which is not finished; run that cell first"
        raise ConfigError("--task", work.cell.name, fix)


def _line(work: Work, as_command: bool) -> str:
    cell, standing = work.cell, standing_of(work)
    if as_command:
        return shlex.join(["irope", *command_for(work, standing)])
    about = f"{cell.verb} {cell.config}" + (f", from {cell.starts_from}" if cell.starts_from else "")
    if standing.lacking:
        about = "evaluations to add: " + ", ".join(spec.name for spec in standing.lacking)
    return f"{standing.state:<5} {cell.name:<40} {about}"


class Sweep:
    """Runs cells to their end. SIGINT and SIGTERM let the running ones save; a second signal ends them."""

    def __init__(self, study: Study, works: Sequence[Work], jobs: int):
        self._study, self._works, self._jobs = study, list(works), jobs
        self._by_name = {work.cell.name: work for work in works}
        self._asked: int | None = None
        self._console = Console(stderr=True)
        self._told = 0.0

    def run(self) -> int:
        """0; 1 if a cell failed; 128 + the signal that ended the sweep, or else a cell of it."""
        for work in self._works:
            standing = standing_of(work)
            if standing.state == "done":
                work.state, work.seen = "done", _last_record(work.directory)
            elif standing.state == "other":
                work.state, work.note = "failed", standing.note
            else:
                work.command = command_for(work, standing)
        previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        live = Live(console=self._console, refresh_per_second=2, get_renderable=self.table, transient=True)
        try:
            with live if self._console.is_terminal else contextlib.nullcontext():
                while self._advance():
                    time.sleep(0.2)
        finally:
            for work in self._works:
                if work.process is not None and work.process.poll() is None:
                    work.process.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        self._console.print(self.table())
        failed = [work for work in self._works if work.state in ("failed", "blocked")]
        for work in failed:
            print(f"irope sweep: {work.cell.name} {work.state}: {work.note}", file=sys.stderr)
        stopped = [work for work in self._works if work.state == "stopped"]
        if self._asked is not None or stopped:
            print("irope sweep: stopped; the same command goes on", file=sys.stderr)
            return 128 + self._asked if self._asked is not None else 1 if failed else stopped[0].code
        return 1 if failed else 0

    def _advance(self) -> bool:
        """Look after what runs and start what can be; whether anything is left to wait for."""
        for work in self._works:
            if work.state == "running":
                self._look_after(work)
        running = sum(work.state == "running" for work in self._works)
        for work in self._works:
            if work.state != "waiting" or self._asked is not None:
                continue
            before = self._by_name.get(work.cell.starts_from)
            if before is not None and before.state in ("failed", "blocked"):
                work.state, work.note = "blocked", f"it starts from {before.cell.name}, which failed"
                self._say(work)
            elif running < self._jobs and (before is None or before.state == "done"):
                self._start(work)
                running += work.state == "running"
        if not self._console.is_terminal and time.monotonic() - self._told > _PLAIN_EVERY:
            for work in self._works:
                if work.state == "running":
                    self._say(work)
        return running > 0

    def _start(self, work: Work) -> None:
        work.log.parent.mkdir(parents=True, exist_ok=True)
        work.lock = open(work.log.with_suffix(".lock"), "w")  # noqa: SIM115 (closed when the cell ends)
        if not _locked(work.lock):
            work.lock.close()
            work.state, work.note = "failed", "another sweep or task is at work on it; wait for it or stop it"
            self._say(work)
            return
        with open(work.log, "ab") as log:
            log.write(f"\n$ irope {shlex.join(work.command)}\n".encode())
            log.flush()
            work.process = subprocess.Popen(
                [*PROGRAM, *work.command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True,
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip
        if self._asked is not None:  # came while it was being started
            work.process.send_signal(signal.SIGTERM)
        work.state, work.began = "running", time.monotonic()
        work.first_step = int(_last_record(work.directory).get("step", 0))
        self._say(work)

    def _look_after(self, work: Work) -> None:
        work.seconds = time.monotonic() - work.began
        work.seen = _last_record(work.directory)
        code = work.process.poll()
        if code is None:
            return
        work.code = code
        work.lock.close()
        if code == 0:
            work.state = "done"
        elif code in STOPPED or (self._asked is not None and code < 0):
            work.state, work.note = "stopped", "saved"
        else:
            work.state, work.note = "failed", f"exit code {code}: {_last_line(work.log)}; see {work.log}"
        self._say(work)

    def _ask(self, number: int, _: object) -> None:
        again, self._asked = self._asked is not None, number
        for work in self._works:
            if work.process is not None and work.process.poll() is None:
                work.process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    def table(self) -> Table:
        """Cells and how far they are."""
        done = sum(work.state == "done" for work in self._works)
        table = Table(title=f"{self._study.name}: {done} of {len(self._works)} cells done")
        for column in ("cell", "state", "step", "loss", "time", "left"):
            table.add_column(column, justify="left" if column in ("cell", "state") else "right")
        for work in self._works:
            step = int(work.seen.get("step", 0))
            shown = f"{step:,} / {work.steps:,}" if work.cell.verb == "train" and step else ""
            loss = work.seen.get("loss")
            table.add_row(
                work.cell.name, work.state, shown, f"{loss:.3f}" if isinstance(loss, float) else "",
                _clock(work.seconds) if work.seconds else "", self._left(work),
            )  # fmt: skip
        return table

    def _left(self, work: Work) -> str:
        made = int(work.seen.get("step", 0)) - work.first_step
        if work.state != "running" or made <= 0:
            return ""
        return _clock(work.seconds / made * max(work.steps - work.first_step - made, 0))

    def _say(self, work: Work) -> None:
        """Where there is no table to look at."""
        if self._console.is_terminal:
            return
        self._told = time.monotonic()
        done = sum(one.state == "done" for one in self._works)
        step, loss = work.seen.get("step"), work.seen.get("loss")
        words = [f"[{done}/{len(self._works)}] {work.cell.name} {work.state}"]
        if step and work.cell.verb == "train":
            words.append(f"step {step:,}/{work.steps:,}" + (f" loss {loss:.3f}" if isinstance(loss, float) else ""))
        words += [f"{_clock(work.seconds)}"] if work.seconds else []
        words += [f"{left} left"] if (left := self._left(work)) else []
        print("  ".join(words), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _last_record(directory: Path) -> dict[str, Any]:
    """The last complete train line of a run, without reading all of it."""
    try:
        with open(directory / RECORDS_FILE, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and record.get("kind") == "train":
                return record
    return {}


def _last_line(log: Path) -> str:
    """What the process that was started last said last: its error."""
    with contextlib.suppress(OSError):
        _, _, said = log.read_text(errors="replace").rpartition("\n$ irope ")
        lines = [line for line in said.splitlines()[1:] if line.strip()]
        errors = [line for line in lines if line.startswith("irope: error: ")]
        return (errors or lines or [""])[-1].removeprefix("irope: error: ")
    return ""
