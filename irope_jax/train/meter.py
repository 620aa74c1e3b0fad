"""How fast a run is, how much memory it takes, and what its time goes into."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator

import jax

from irope_jax.core.chips import chip_of


class Meter:
    """Speed since it was last read, and memory."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, begun: tuple[int, int] = (0, 0)):
        """`begun`: steps and tokens before those that it counts."""
        self._tokens, self._flops, self._begun = tokens_per_step, flops_per_token, begun
        self._step: int | None = None
        self._time = time.monotonic()
        self.tokens_per_second = float("nan")
        chip = chip_of(jax.devices()[0].device_kind)
        self._peak = None if chip is None else chip.bf16_flops * jax.device_count()

    def read(self, step: int) -> dict[str, float]:
        """Scalars for the records. `mfu`, the share of the chips' bfloat16 peak, where it is known."""
        now, (steps, before) = time.monotonic(), self._begun
        tokens = before + (step - steps) * self._tokens
        figures = {"tokens": float(tokens), "memory_bytes": float(memory_in_use())}
        if self._step is not None and step > self._step:  # the first step compiles: its time says nothing
            seconds = (now - self._time) / (step - self._step)
            self.tokens_per_second = self._tokens / seconds
            flops = self.tokens_per_second * self._flops
            figures |= {
                "step_seconds": seconds,
                "tokens_per_second": self.tokens_per_second,
                "flops_per_second": flops,
            }
            figures |= {} if self._peak is None else {"mfu": flops / self._peak}
        self._step, self._time = step, now
        return figures

    def pause(self, step: int) -> None:
        """Time since the last reading belongs to something else."""
        self._step, self._time = step, time.monotonic()


def memory_in_use() -> int:
    """Peak bytes: of the first local device where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stopwatch:
    """Divides the time that passes among what a run does; whatever is not said to be something else is `steps`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._since, self._spent = clock, clock(), {}

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """What happens inside is `what`."""
        begin = self._clock()
        try:
            yield
        finally:
            self._spent[what] = self._spent.get(what, 0.0) + self._clock() - begin

    def lap(self) -> dict[str, float]:
        """Seconds by activity since it was last asked."""
        now = self._clock()
        spent, self._spent = self._spent, {}
        steps, self._since = max(now - self._since - sum(spent.values()), 0.0), now
        return {name: round(seconds, 3) for name, seconds in {"steps": steps, **spent}.items()}
