"""Notices that a Cloud machine gives before it goes: maintenance and preemption, read from its metadata server."""

from __future__ import annotations

import logging
import threading
import urllib.request
from collections.abc import Callable

log = logging.getLogger(__name__)

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/"
NOTICES = {"maintenance-event": ("NONE", ""), "preempted": ("FALSE", "")}
"""Entries of the server, and what they say while nothing is to come."""

EVERY = 5.0
"""Seconds between looks; preemption is told 30 s ahead, maintenance of a TPU a few minutes."""


def read_metadata(entry: str) -> str:
    """What the metadata server says; raises OSError where there is none."""
    asked = urllib.request.Request(METADATA + entry, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(asked, timeout=3) as answer:
        return answer.read().decode().strip()


class NoticeWatch:
    """Calls `came(text)` once, from a thread, between start and stop, when the machine has to go."""

    def __init__(self, came: Callable[[str], None], read: Callable[[str], str] = read_metadata):
        self._came, self._read = came, read
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="notices", daemon=True)

    def look(self) -> str | None:
        """The notice there is, as `entry: value`."""
        for entry, quiet in NOTICES.items():
            try:
                said = self._read(entry)
            except OSError:
                continue  # the server is busy, or does not know the entry
            if said not in quiet:
                return f"{entry}: {said}"
        return None

    def _watch(self) -> None:
        while not self._stop.is_set():
            if notice := self.look():
                log.warning("this machine has to go (%s): saving and leaving", notice)
                self._came(notice)
                return
            self._stop.wait(EVERY)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
