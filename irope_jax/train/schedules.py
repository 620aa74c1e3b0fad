"""Learning rate by step, as config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import optax

from irope_jax.core.config import ConfigError


@dataclass(frozen=True)
class ConstantRate:
    """Linear warm-up, then the peak rate to the end."""

    kind: ClassVar[str] = "constant"
    warmup: int = 0


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine down to `final` times the peak at the last step."""

    kind: ClassVar[str] = "cosine"
    warmup: int = 0
    final: float = 0.1


@dataclass(frozen=True)
class Linear:
    """Linear warm-up, then a straight line down to `final` times the peak at the last step."""

    kind: ClassVar[str] = "linear"
    warmup: int = 0
    final: float = 0.0


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, the peak rate, then a straight line to `final` times the peak over the last `decay` steps."""

    kind: ClassVar[str] = "wsd"
    warmup: int = 0
    decay: int = 0
    final: float = 0.0


ScheduleSpec = ConstantRate | Cosine | Linear | WarmupStableDecay


def rate_by_step(spec: ScheduleSpec, peak: float, steps: int) -> optax.Schedule:
    """Rate by step (counted from 0) of a run of `steps` steps.

    Raises:
      ConfigError: warm-up and decay take more steps than there are.
    """
    rest = steps - spec.warmup - (spec.decay if isinstance(spec, WarmupStableDecay) else 0)
    if rest < 0:
        raise ConfigError(
            "schedule", spec, f"warm-up and decay take more than the {steps} steps of the run; shorten them"
        )
    # The first step is already at peak / (warmup + 1), not at zero: a zero-rate step would be wasted.
    warm = optax.linear_schedule(peak / (spec.warmup + 1), peak, max(spec.warmup, 1))
    match spec:
        case Cosine(final=final):
            then = optax.cosine_decay_schedule(peak, max(rest, 1), alpha=final)
        case Linear(final=final):
            then = optax.linear_schedule(peak, peak * final, max(rest, 1))
        case WarmupStableDecay(decay=decay, final=final):
            then = optax.join_schedules(
                [optax.constant_schedule(peak), optax.linear_schedule(peak, peak * final, max(decay, 1))], [rest]
            )
        case ConstantRate():
            then = optax.constant_schedule(peak)
    return optax.join_schedules([warm, then], [spec.warmup])
