"""`irope launch`: the processes of one run on one machine, watched, and started again together when one dies.

Training goes on from the newest checkpoint, so starting again is all that is needed. Nothing here knows what is
trained, and jax is not imported: the launcher holds no device and little memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from irope_jax.core.config import ConfigError, nearest

VERBS = ("train", "eval")
"""What several processes can do together."""

PROGRAM = (sys.executable, "-m", "irope_jax.cli")

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = tuple(128 + number for number in FORWARDED)
"""Exit codes of a run that was asked to stop and saved everything."""

WRONG_COMMAND = 2
"""Exit code that no second try changes."""

_PATIENCE = 5.0
"""Seconds between asking those left over to end, and ending them: they wait for one who does not come back."""


@dataclass(frozen=True)
class Launch:
    """What to start, and how often.

    Attributes:
      command: verb and flags for `irope`, the same in every process.
      processes: how many.
      devices_per_process: CPU devices each simulates; None leaves devices to jax.
      restarts: how many times all are started again after one failed.
    """

    command: tuple[str, ...]
    processes: int
    devices_per_process: int | None = None
    restarts: int = 3

    def __post_init__(self):
        verb = self.command[0] if self.command else ""
        if verb not in VERBS:
            fix = f"give what to run after --: {' or '.join(VERBS)}"
            raise ConfigError("irope launch", verb or ConfigError.ABSENT, f"{fix}; {nearest(verb, VERBS)}")
        for flag, value, least in (
            ("--processes", self.processes, 1),
            ("--devices-per-process", self.devices_per_process, 1),
            ("--restarts", self.restarts, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(flag, value, f"must be at least {least}")
        taken = [a for a in self.command if a.startswith(("--coordinator", "--process-id", "--num-processes"))]
        if taken:
            raise ConfigError(taken[0].partition("=")[0], ConfigError.ABSENT, "irope launch sets it; leave it out")


def launch_verb(args: argparse.Namespace, command: Sequence[str]) -> int:
    return Launcher(Launch(tuple(command), args.processes, args.devices_per_process, args.restarts)).run()


def environment(launch: Launch, process: int, port: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of one process: where the others are, and its devices."""
    own = {
        "IROPE_COORDINATOR": f"127.0.0.1:{port}",
        "IROPE_PROCESS_ID": str(process),
        "IROPE_NUM_PROCESSES": str(launch.processes),
        "PYTHONUNBUFFERED": "1",
    }
    if launch.devices_per_process is not None:
        flag = f"--xla_force_host_platform_device_count={launch.devices_per_process}"
        own |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{environ.get('XLA_FLAGS', '')} {flag}".strip()}
    return dict(environ) | own


def told(code: int) -> str:
    """How a process ended, from what `Popen` says of it."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class Launcher:
    """Runs a `Launch` to its end. Signals to it go on to every process; it ends when they have."""

    def __init__(self, launch: Launch):
        self._launch = launch
        self._processes: list[subprocess.Popen] = []
        self._asked: int | None = None
        self._printing = threading.Lock()

    def run(self) -> int:
        """The exit code: 0, that of the process that failed, or 128 + the signal that ended it."""
        previous = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            for attempt in range(self._launch.restarts + 1):
                code = self._attempt()
                if code in (0, WRONG_COMMAND, *STOPPED) or self._asked is not None:
                    return code
                if attempt < self._launch.restarts:
                    self._say(f"starting all again ({attempt + 1} of {self._launch.restarts})")
            self._say(f"given up after {self._launch.restarts} restarts")
            return code
        finally:
            for process in self._processes:
                if process.poll() is None:
                    process.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _attempt(self) -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        began = time.monotonic()
        self._processes, pumps = [], []
        for number in range(self._launch.processes):
            process = self._start(number, port)
            self._processes.append(process)
            if self._asked is not None:  # came while they were being started
                process.send_signal(self._asked)
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                pump = threading.Thread(target=self._pump, args=(f"[{number}] ", source, target), daemon=True)
                pump.start()
                pumps.append(pump)
        pids = ", ".join(str(process.pid) for process in self._processes)
        self._say(f"started {self._launch.processes} processes (pid {pids}), coordinator 127.0.0.1:{port}")
        code = self._wait(began)
        for pump in pumps:
            pump.join(_PATIENCE)
        return code

    def _start(self, number: int, port: int) -> subprocess.Popen:
        return subprocess.Popen(
            [*PROGRAM, *self._launch.command],
            env=environment(self._launch, number, port),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C comes once, through the launcher
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )

    def _wait(self, began: float) -> int:
        """Wait until all ended, ending them when one failed; the exit code of the whole."""
        failed = None
        while failed is None:
            codes = [process.poll() for process in self._processes]
            wrong = [number for number, code in enumerate(codes) if code]
            # who was killed before who complains of it
            failed = min(wrong, key=lambda number: (codes[number] > 0, number), default=None)
            if None not in codes and failed is None:
                return 0
            if failed is None or (codes[failed] in STOPPED and None in codes):
                failed = None  # stopped as asked, and the others are about to
                time.sleep(0.05)
        code = codes[failed]
        if code not in STOPPED:
            pid, after = self._processes[failed].pid, time.monotonic() - began
            others = "; ending the others" if None in codes else ""
            self._say(f"process {failed} (pid {pid}) {told(code)} after {after:.0f} s{others}")
        self._end_all()
        return code if code > 0 else 128 - code

    def _end_all(self) -> None:
        self._signal(signal.SIGTERM)
        until = time.monotonic() + _PATIENCE
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _forward(self, number: int, _: object) -> None:
        self._asked = number
        self._signal(number)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _pump(self, prefix: str, source: BinaryIO, target) -> None:
        for line in source:
            text = prefix + line.decode(errors="replace").rstrip("\n") + "\n"
            with self._printing, contextlib.suppress(OSError, ValueError):  # nobody may be reading any more
                target.write(text)
                target.flush()

    def _say(self, text: str) -> None:
        with self._printing, contextlib.suppress(OSError, ValueError):
            print(f"irope launch: {text}", file=sys.stderr, flush=True)


def end_with_parent() -> None:
    """In a new process: SIGKILL when the launcher is gone, which could not end it any more (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
