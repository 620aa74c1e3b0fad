"""How a verb that computes begins: its processes find each other before anything asks for a device."""

from __future__ import annotations

import argparse

from irope_jax.core.allocator import keep_freed_memory
from irope_jax.core.hosts import configure_logging, hosts_from, initialise
from irope_jax.core.programs import keep_programs


def join(args: argparse.Namespace) -> None:
    """Bring the processes of the run together, as the flags of hosts say."""
    keep_freed_memory()
    names = ("coordinator", "process_id", "num_processes", "join_timeout")
    initialise(hosts_from({name: getattr(args, name) for name in names}))
    configure_logging()
    keep_programs()
