"""Memory of the host that a program gives back and takes again at every step: kept instead.

XLA on CPUs asks the system for all temporary memory of a program when it starts and gives it back when it ends. Large
blocks go straight to the kernel, which clears every page of them again: about a tenth of a training step, and far more
on virtual machines that hand free pages to their host.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from pathlib import Path

log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # M_… of glibc's malloc.h
_ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


def keep_freed_memory() -> bool:
    """Make the allocator keep what is freed, for programs of CPUs; whether it does.

    Call it before anything asks jax for a device: threads that exist already keep the pools they have. Memory that was
    used once stays with the process. Nothing is done where there is an accelerator, whose programs do not take memory
    of the host; where the allocator is not glibc's; or where its variables (`MALLOC_…`, `GLIBC_TUNABLES`) are set.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    platforms = os.environ.get("JAX_PLATFORMS", "")
    elsewhere = platforms not in ("", "cpu") or (not platforms and any(Path(p).exists() for p in _ACCELERATORS))
    if not sys.platform.startswith("linux") or chosen or elsewhere:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    except (OSError, AttributeError):
        return False
    # One pool that grows and never shrinks; blocks of any size come from it.
    done = [mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)]
    if not all(done):
        log.debug("the allocator did not take %s", done)
    return all(done)
