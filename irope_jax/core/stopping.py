"""How a run is asked to stop: signals and notices, heard by all of its processes at the same step."""

from __future__ import annotations

import os
import signal
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from irope_jax.core.hosts import tpu_chips
from irope_jax.core.notices import NoticeWatch


class StopRequest:
    """Turns SIGTERM, SIGUSR1 and SIGINT into a flag while the `with` block runs; a second SIGINT interrupts at once.

    Preemptible machines send SIGTERM some seconds before they go, SLURM what `--signal` names; a Cloud TPU host is told
    by its metadata server, which counts as SIGTERM here. The training loop looks at `signal` between steps, saves, and
    leaves.

    Often one process only gets the signal, and all have to leave at the same step. Each process adds a `vote` to every
    training step, one integer of which the step returns the greatest; `hear` reads it one step later, when it is there
    already, so that no device waits for the host. So the run stops one or two steps after the signal, everywhere at the
    same one, at the cost of an all-reduce of four bytes a step. Alone, there is no vote and `signal` is what came.
    """

    def __init__(self) -> None:
        self._came: signal.Signals | None = None
        self._agreed: signal.Signals | None = None
        self._unread: list[jax.Array] = []
        self._previous: dict[int, object] = {}
        self._notices: NoticeWatch | None = None

    @property
    def signal(self) -> signal.Signals | None:
        """The signal to stop for; with several processes the one that all know of."""
        return self._came if jax.process_count() == 1 else self._agreed

    def vote(self, mesh: Mesh) -> jax.Array | None:
        """What this process adds to a step: int32, one entry per device, the signal's number or 0; None if alone."""
        if jax.process_count() == 1:
            return None
        mine = np.full(1, self._came or 0, np.int32)
        sharding = NamedSharding(mesh, P(mesh.axis_names))
        return jax.make_array_from_callback((mesh.size,), sharding, lambda _: mine)

    def hear(self, greatest: jax.Array | None, *, newest: bool) -> None:
        """Take the greatest vote of a step just started; read those of the steps before it, its own only if `newest`.

        `newest` waits for the step. It must be said for the same steps in every process.
        """
        if greatest is None:
            return
        self._unread.append(greatest)
        ready = len(self._unread) if newest else len(self._unread) - 1
        self._settle(max((int(vote) for vote in self._unread[:ready]), default=0))
        del self._unread[:ready]

    def ask(self) -> bool:
        """Whether to stop, asking the others now: between things that take long. All must call it together."""
        if jax.process_count() > 1:
            self._settle(max(multihost_utils.process_allgather(np.asarray(self._came or 0, np.int32)).tolist()))
        return self.signal is not None

    def _settle(self, number: int) -> None:
        if number and self._agreed is None:
            self._agreed = signal.Signals(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._came is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._came = signal.Signals(number)

    def _notice(self, _: str) -> None:
        if self._came is None:
            self._came = signal.SIGTERM

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._handle)
        if tpu_chips() and "TPU_SKIP_MDS_QUERY" not in os.environ:
            self._notices = NoticeWatch(self._notice)
            self._notices.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._notices is not None:
            self._notices.stop()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
