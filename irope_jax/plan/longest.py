"""The longest context that fits: bisection by hand, confirmed by compiles."""

from __future__ import annotations

from collections.abc import Callable

from irope_jax.core.chips import Chip
from irope_jax.core.config import ConfigError
from irope_jax.plan.analytic import closed_form
from irope_jax.plan.job import Failure, Figures, Job

LARGEST = 30
"""Power of two: beyond 2^30 tokens int32 rows come to their end."""


def longest(
    build: Callable[[int], Job], chip: Chip, compile_job: Callable[[Job], Figures | Failure | None]
) -> tuple[int | None, list[str]]:
    """`(tokens, what was tried)`: the greatest power of two whose step fits the chip.

    What fits by hand is where compiles begin: it is halved until one fits. Without a compiler it is the answer.

    Args:
      build: the job of a length; raises `ConfigError` where something does not divide.
      compile_job: its compiled figures, or None without a compiler.
    """
    tried: list[str] = []
    power = _greatest(build, chip, tried)
    while power is not None and power > 0:
        length = 1 << power
        try:
            job = build(length)
        except ConfigError as error:
            tried.append(f"{length:,} tokens: {error}")
            return None, tried
        result = compile_job(job)
        if result is None:
            tried.append(f"{length:,} tokens: {closed_form(job).total / 1e9:.1f} GB by hand")
            return length, tried
        if isinstance(result, Figures) and result.total <= chip.memory:
            tried.append(f"{length:,} tokens: {result.total / 1e9:.1f} GB, fits")
            return length, tried
        why = result.why if isinstance(result, Failure) else f"{result.total / 1e9:.1f} GB of {chip.memory / 1e9:.0f}"
        tried.append(f"{length:,} tokens: {why}")
        power -= 1
    return None, tried


def _greatest(build: Callable[[int], Job], chip: Chip, tried: list[str]) -> int | None:
    """The greatest power of two that fits by hand; None if none does, and `tried` is told why."""

    errors = []

    def total(power: int) -> float | None:
        try:
            return closed_form(build(1 << power)).total
        except ConfigError as error:
            errors.append(error)
            return None  # too short to be cut so

    possible = [power for power in (LARGEST, *range(10, LARGEST)) if total(power) is not None]
    if not possible:
        tried.append(f"no power of two: {errors[-1]}")
        return None
    low, high = min(possible), LARGEST
    if (least := total(low)) > chip.memory:
        tried.append(f"{1 << low:,} tokens: {least / 1e9:.1f} GB of {chip.memory / 1e9:.0f} by hand")
        return None
    while low < high:
        middle = (low + high + 1) // 2
        found = total(middle)
        low, high = (middle, high) if found is not None and found <= chip.memory else (low, middle - 1)
    return low
