"""Signs of life of the processes of a run, so that the end of one is told by name.

When a machine dies, the others hang in a computation it takes no part in, or fail with the address of a socket. jax
ends them after a while with a stack trace and a task number. Here every process counts up a number of its own in the
store that jax keeps in process 0; process 0 watches all, and writes who stands still; the others read that one entry.
So each ends in less than a minute with one line that names process and host. What happens if process 0 itself dies jax
notices at once, and ends the others by its own message.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

log = logging.getLogger(__name__)

EVERY = 3.0
SILENT = 30.0
"""Seconds without a sign of life after which a process is given up. A thread gets its turn while others compute."""

GONE = 75
"""Exit code when another process is gone: a launcher may start all again (EX_TEMPFAIL)."""

_ALIVE, _VERDICT = "irope/alive/", "irope/gone"


class Store(Protocol):
    """Of jax's client, what is used; raises if process 0 does not answer."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


class Pulse:
    """One process's part in it. `turn` is called every few seconds by a thread.

    Attributes:
      gone: one line about a process that gave no sign of life; None while all do.
    """

    def __init__(self, store: Store, process: int, *, clock: Callable[[], float] = time.monotonic):
        self._store, self._process, self._clock = store, process, clock
        self._turns = 0
        self._seen: dict[str, tuple[str, float]] = {}
        self._stop = threading.Event()
        self.gone: str | None = None
        self._known = threading.Event()
        self._ending = threading.Lock()

    def turn(self) -> str | None:
        """Give a sign of life, and look for those of others; `gone` or None."""
        if self.gone is None:
            self._turns += 1
            self._say("alive")
            self.gone = self._judge() if self._process == 0 else self._verdict()
            if self.gone is not None:
                self._known.set()
        return self.gone

    def _say(self, what: str) -> None:
        sign = [self._turns, what, socket.gethostname(), os.getpid()]
        self._store.key_value_set(f"{_ALIVE}{self._process}", json.dumps(sign), allow_overwrite=True)

    def _verdict(self) -> str | None:
        found = dict(self._store.key_value_dir_get(_VERDICT))
        return found.get(f"{_VERDICT}/it")

    def _judge(self) -> str | None:
        now = self._clock()
        for key, sign in self._store.key_value_dir_get(_ALIVE):
            _, what, host, pid = json.loads(sign)
            if self._seen.get(key, ("", 0.0))[0] != sign or what == "left":
                self._seen[key] = (sign, now)
            elif now - self._seen[key][1] >= SILENT:
                number = key.rpartition("/")[2]
                gone = f"process {number} (pid {pid} on {host}) is gone: no sign of life for {SILENT:.0f} s"
                self._store.key_value_set(f"{_VERDICT}/it", gone, allow_overwrite=True)
                return gone
        return None

    def leave(self) -> None:
        """This process is done; its silence means nothing from now on."""
        self._stop.set()
        try:
            self._say("left")
        except Exception:  # process 0 left before: nobody is there to be told
            log.debug("could not say that this process leaves", exc_info=True)

    def who(self, seconds: float = SILENT + 3 * EVERY) -> str | None:
        """Wait until it is known who is gone; None if nobody is, so far."""
        self._known.wait(seconds)
        return self.gone

    def beat(self, end: Callable[[str], Any]) -> None:
        """Take turns until `leave`; `end(gone)` is called once somebody is gone."""
        while not self._stop.wait(EVERY):
            try:
                gone = self.turn()
            except Exception:  # jax's own client notices that process 0 is gone, and ends this process
                log.debug("no answer from process 0", exc_info=True)
                continue
            if gone is not None:
                end(gone)
                return

    def start(self) -> None:
        threading.Thread(target=self.beat, args=(self.end,), name="pulse", daemon=True).start()

    def end(self, gone: str) -> None:
        """One line, and this process is over: what it waits for does not come. Process 0 goes when others have read."""
        fix = "start all again, the run goes on from its last checkpoint"
        if self._ending.acquire(blocking=False):  # the thread and the computation that failed may both come here
            print(f"irope: error: {gone}; {fix}", file=sys.stderr, flush=True)
        if self._process == 0:
            time.sleep(2 * EVERY)
        os._exit(GONE)
