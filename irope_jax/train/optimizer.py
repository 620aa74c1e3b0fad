"""Optimizer and learning-rate schedule as config, built from optax."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import optax

from irope_jax.core.config import ConfigError, nearest
from irope_jax.train.placement import OptimizerState, stored


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


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with clipping by global norm.

    Attributes:
      learning_rate: the peak.
      schedule: how the rate moves over the run.
      b1, b2, eps: Adam's moments.
      weight_decay: decoupled, multiplied by the rate.
      no_decay: glob patterns on the path of a parameter (`periods/layer_0/attention_norm/scale`) that are not decayed.
      clip_norm: the gradient is scaled down to this global norm; None leaves it.
      trainable: glob patterns on paths of parameters that are trained (`*norm/scale`, `embedding`); the rest stays as
        it is, without optimizer state. A path names a layer of the period, so all its repeats.
      frozen: patterns of those that stay although `trainable` names them.
      state: number format and place of the moments between steps.
    """

    learning_rate: float = 3e-4
    schedule: ScheduleSpec = Cosine()
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ("*scale",)
    clip_norm: float | None = 1.0
    trainable: tuple[str, ...] = ("*",)
    frozen: tuple[str, ...] = ()
    state: OptimizerState = OptimizerState()

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ConfigError("learning_rate", self.learning_rate, "must be positive")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be in [0, 1)")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError("clip_norm", self.clip_norm, "must be positive, or None for no clipping")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Rate by step (counted from 0) of a run of `steps` steps.

    Raises:
      ConfigError: warm-up and decay take more steps than there are.
    """
    peak, spec = config.learning_rate, config.schedule
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


MOVED_BY_RULE = ("*/balance_bias",)
"""Parameters that no gradient moves, whatever a config says."""


def _path(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _matching(params: Any, patterns: tuple[str, ...]) -> Any:
    """True at each leaf whose path matches one of the patterns."""

    def matches(path, _):
        return any(fnmatch.fnmatchcase(_path(path), pattern) for pattern in patterns)

    # A box, in which parameters lie while a state is made, is a leaf: paths are the same with and without.
    return jax.tree_util.tree_map_with_path(matches, params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def decayed(params: Any, patterns: tuple[str, ...]) -> Any:
    """True at each leaf that weight decay applies to."""
    return jax.tree.map(lambda found: not found, _matching(params, patterns))


def frozen(config: OptimizerConfig, params: Any) -> Any:
    """True at each leaf that stays as it is.

    Raises:
      ConfigError: a pattern that matches nothing, or nothing left to train; names the field.
    """
    for field in ("trainable", "frozen"):
        for pattern in getattr(config, field):
            if not any(jax.tree.leaves(_matching(params, (pattern,)))):
                paths = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(params))
                names = sorted(_path(path) for path, _ in paths)
                raise ConfigError(
                    f"train.optimizer.{field}", pattern, f"matches no parameter; {nearest(pattern, names)}"
                )
    trained, kept = _matching(params, config.trainable), _matching(params, config.frozen + MOVED_BY_RULE)
    found = jax.tree.map(lambda trained, kept: kept or not trained, trained, kept)
    if all(jax.tree.leaves(found)):
        raise ConfigError("train.optimizer.trainable", config.trainable, "leaves nothing to train")
    return found


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optax transformation of a config for a run of `steps` steps; frozen parameters get updates of zero."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm is not None else optax.identity()
    adamw = optax.chain(
        clip,
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: decayed(params, config.no_decay + MOVED_BY_RULE),
        ),
    )
    if config.trainable == ("*",) and not config.frozen:
        return stored(adamw, config.state)
    labels = lambda params: jax.tree.map(lambda kept: "frozen" if kept else "trained", frozen(config, params))
    return stored(optax.partition({"trained": adamw, "frozen": optax.set_to_zero()}, labels), config.state)
