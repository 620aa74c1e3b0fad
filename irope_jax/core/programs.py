"""Compiled programs, kept from one run to the next.

A step that compiles for minutes compiles once: jax looks a program up by what it says and what it is compiled for.
"""

from __future__ import annotations

import logging
import os
from hashlib import sha256
from pathlib import Path

import jax

log = logging.getLogger(__name__)

MOST_BYTES = 20 * 2**30
"""Of what is kept; the least recently used goes first."""


def keep_programs() -> None:
    """Turn on jax's cache of compiled programs, once it is known which devices there are.

    It lies in `JAX_COMPILATION_CACHE_DIR`, which may be `gs://…`, or in `~/.cache/irope_jax`; the environment variable
    `JAX_ENABLE_COMPILATION_CACHE=0` turns it off. With several devices of CPUs it stays off: jax 0.10 computes other
    numbers with some of such programs once they come out of the cache.
    """
    given = jax.config.jax_compilation_cache_dir
    if not jax.config.jax_enable_compilation_cache:
        return
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        log.debug("compilation cache not used: it cannot be trusted with several devices of CPUs")
        return
    if given:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "irope_jax"
    try:
        (root / _machine()).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.info("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(root / _machine()))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def _machine() -> str:
    """Names what programs are compiled for: a CPU's program may use what another CPU does not have."""
    if jax.default_backend() != "cpu":
        return jax.default_backend()
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "cpu"
    kinds = {line for line in about.splitlines() if line.startswith(("flags", "Features", "model name"))}
    return "cpu-" + sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:12]
