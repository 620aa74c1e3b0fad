"""The most memory that was held since a moment: of the process on CPUs, of the busiest device on accelerators."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

import jax

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Starts to watch when it is made; `bytes_since` is what came on top of what was held then.

    A process is asked of Linux, after what the allocator had kept for later has been given back. Devices remember the
    peak of their whole life: what stayed below an earlier one is not known.
    """

    def __init__(self):
        self._devices = [d for d in jax.local_devices() if d.memory_stats() is not None]
        if self._devices:
            self._before = [d.memory_stats() for d in self._devices]
        else:
            self._before = _process() if _forget() else None

    def bytes_since(self) -> int | None:
        """Bytes; None where nobody can tell."""
        if self._devices:
            found = [_device(d, before) for d, before in zip(self._devices, self._before, strict=True)]
            return None if None in found else max(found)
        if self._before is None:
            return None
        return max(_process()["VmHWM"] - self._before["VmRSS"], 0)


def _device(device: jax.Device, before: dict[str, int]) -> int | None:
    now = device.memory_stats().get("peak_bytes_in_use")
    if now is None or now <= before.get("peak_bytes_in_use", 0):
        return None
    return now - before["bytes_in_use"]


def _process() -> dict[str, int]:
    found = re.findall(r"^(VmHWM|VmRSS):\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return {name: int(number) * 1024 for name, number in found}


def _forget() -> bool:
    """Give back what is free and forget earlier peaks; whether the system can."""
    with contextlib.suppress(OSError, AttributeError):  # another allocator: what it keeps counts as held
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _RESET.write_text("5")  # 5: the peak of resident memory
        return {"VmHWM", "VmRSS"} <= set(_process())
    except OSError:
        return False
