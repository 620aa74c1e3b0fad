"""The optimizer of a run as config: schedule, algorithm, which parameters, averaged weights. Built from optax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ScheduleFreeState

from irope_jax.core.config import ConfigError
from irope_jax.train.algorithms import AdamW, Algorithm, ScheduleFreeAdamW, transformation
from irope_jax.train.patterns import MOVED_BY_RULE, by_path, check_patterns, matches, matching
from irope_jax.train.placement import OnHost, OptimizerState, stored
from irope_jax.train.schedules import ConstantRate, Cosine, ScheduleSpec, rate_by_step


@dataclass(frozen=True)
class Group:
    """Parameters that are trained otherwise than the rest.

    Attributes:
      patterns: glob patterns on their paths.
      learning_rate: factor on the rate.
      weight_decay: instead of the optimizer's, for all of them, `no_decay` or not; None leaves both as they are.
    """

    patterns: tuple[str, ...]
    learning_rate: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self):
        if not self.patterns:
            raise ConfigError("patterns", self.patterns, "names nothing; give it a pattern, or remove the group")
        if self.learning_rate <= 0:
            raise ConfigError("learning_rate", self.learning_rate, "must be positive; use `frozen` for what stays")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ConfigError("weight_decay", self.weight_decay, "must not be negative")


@dataclass(frozen=True)
class OptimizerConfig:
    """An algorithm, clipping by global norm, and what applies to which parameter.

    Attributes:
      learning_rate: the peak.
      schedule: how the rate moves over the run.
      algorithm: what makes a step of a gradient.
      weight_decay: decoupled, multiplied by the rate.
      no_decay: glob patterns on the path of a parameter (`periods/layer_0/attention_norm/scale`) that are not decayed.
      clip_norm: the gradient of all that is trained is scaled down to this global norm; None leaves it.
      groups: parameters with a rate or decay of their own; the first that names a parameter has it.
      trainable: glob patterns on paths of parameters that are trained (`*norm/scale`, `embedding`); the rest stays as
        it is, without optimizer state. A path names a layer of the period, so all its repeats.
      frozen: patterns of those that stay although `trainable` names them.
      ema_decay: evaluations and exports use an exponential moving average of the weights, of which a step keeps this
        much, and less in the beginning: `(1 + steps) / (10 + steps)`. None holds no average.
      state: number format and place of the moments between steps.
    """

    learning_rate: float = 3e-4
    schedule: ScheduleSpec = Cosine()
    algorithm: Algorithm = AdamW()
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ("*scale",)
    clip_norm: float | None = 1.0
    groups: tuple[Group, ...] = ()
    trainable: tuple[str, ...] = ("*",)
    frozen: tuple[str, ...] = ()
    ema_decay: float | None = None
    state: OptimizerState = OptimizerState()

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ConfigError("learning_rate", self.learning_rate, "must be positive")
        if self.weight_decay < 0:
            raise ConfigError("weight_decay", self.weight_decay, "must not be negative")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError("clip_norm", self.clip_norm, "must be positive, or None for no clipping")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError("ema_decay", self.ema_decay, "must be between 0 and 1, or None for no average")
        if isinstance(self.algorithm, ScheduleFreeAdamW):
            if not isinstance(self.schedule, ConstantRate):
                fix = "a schedule-free optimizer averages instead of decaying the rate; use kind='constant'"
                raise ConfigError("schedule.kind", self.schedule.kind, fix)
            if self.ema_decay is not None:
                raise ConfigError("ema_decay", self.ema_decay, "a schedule-free optimizer averages already; use None")


@dataclass(frozen=True)
class Optimizer:
    """`init` and `update` as optax has them, and how the weights to evaluate follow those that are trained.

    Attributes:
      average: `(averaged, params, opt_state, steps) -> averaged`, float32, after `steps` good steps and one more; None
        where the weights that are trained are evaluated.
      on_host: whether its state lies in memory of the host between steps.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    average: Callable[[Any, Any, Any, jax.Array], Any] | None = None
    on_host: bool = False


def learning_rate(config: OptimizerConfig, steps: int, begins: int = 0) -> optax.Schedule:
    """Rate by step of a run of `steps` steps, without the factors of groups; the first step is counted as `begins`.

    Raises:
      ConfigError: warm-up and decay take more steps than there are.
    """
    schedule = rate_by_step(config.schedule, config.learning_rate, steps)
    return (lambda count: schedule(jnp.maximum(count - begins, 0))) if begins else schedule


def decayed(params: Any, patterns: tuple[str, ...]) -> Any:
    """True at each leaf that weight decay applies to."""
    return jax.tree.map(lambda found: not found, matching(params, patterns))


def frozen(config: OptimizerConfig, params: Any) -> Any:
    """True at each leaf that stays as it is.

    Raises:
      ConfigError: a pattern that matches nothing, or nothing left to train; names the field.
    """
    for field in ("trainable", "frozen"):
        check_patterns(field, getattr(config, field), params)
    trained, kept = matching(params, config.trainable), matching(params, config.frozen + MOVED_BY_RULE)
    found = jax.tree.map(lambda trained, kept: kept or not trained, trained, kept)
    if all(jax.tree.leaves(found)):
        raise ConfigError("train.optimizer.trainable", config.trainable, "leaves nothing to train")
    return found


def make_optimizer(config: OptimizerConfig, steps: int, begins: int = 0) -> Optimizer:
    """The optimizer of a config for `steps` steps, the first counted as `begins`; frozen parameters get zeros."""
    rate = learning_rate(config, steps, begins)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm is not None else optax.identity()
    made, average = optax.chain(clip, _by_group(config, rate)), None
    if config.ema_decay is not None:
        average = _moving_average(config.ema_decay)
    if isinstance(config.algorithm, ScheduleFreeAdamW):
        made, average = _schedule_free(made, rate, config.algorithm.b1), schedule_free_average
    # A schedule-free optimizer would pull back what a rule moves.
    elif config.trainable == ("*",) and not config.frozen:
        return _kept(made, config, average)
    labels = lambda params: jax.tree.map(lambda kept: "frozen" if kept else "trained", frozen(config, params))
    parts = optax.partition({"trained": made, "frozen": optax.set_to_zero()}, labels)
    return _kept(parts, config, average)


def _kept(made: optax.GradientTransformation, config: OptimizerConfig, average: Any) -> Optimizer:
    """The transformation with its state in the format and the place of the config."""
    kept = stored(made, config.state)
    return Optimizer(kept.init, kept.update, average, isinstance(kept, OnHost))


def _by_group(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """The algorithm for each group of parameters and for the rest."""

    def made(factor: float, weight_decay: float, no_decay: tuple[str, ...]) -> optax.GradientTransformation:
        mask = lambda params: decayed(params, no_decay + MOVED_BY_RULE)
        return transformation(config.algorithm, lambda step: factor * rate(step), weight_decay, mask)

    rest = made(1.0, config.weight_decay, config.no_decay)
    if not config.groups:
        return rest
    names = [f"group_{i}" for i in range(len(config.groups))]
    parts = {"rest": rest}
    for name, group in zip(names, config.groups):
        own = group.weight_decay is not None
        decay, without = (group.weight_decay, ()) if own else (config.weight_decay, config.no_decay)
        parts[name] = made(group.learning_rate, decay, without)

    def label(path: str) -> str:
        return next((name for name, group in zip(names, config.groups) if matches(path, group.patterns)), "rest")

    def labels(params: Any) -> Any:
        for i, group in enumerate(config.groups):
            check_patterns(f"groups.{i}.patterns", group.patterns, params, "parameter that is trained")
        return by_path(label, params)

    return optax.partition(parts, labels)


def _moving_average(decay: float) -> Callable[[Any, Any, Any, jax.Array], Any]:
    def average(averaged: Any, params: Any, opt_state: Any, steps: jax.Array) -> Any:
        new = 1 - jnp.minimum(decay, (1.0 + steps) / (10.0 + steps))
        return jax.tree.map(lambda a, p: a + new * (p.astype(jnp.float32) - a), averaged, params)

    return average


def _schedule_free(
    base: optax.GradientTransformation, rate: optax.Schedule, b1: float
) -> optax.GradientTransformationExtraArgs:
    wrapped = optax.contrib.schedule_free(base, rate, b1=b1)

    def init(params: Any) -> ScheduleFreeState:
        for leaf in jax.tree.leaves(params):
            if leaf.dtype != jnp.float32:
                fix = "the average of a schedule-free optimizer is told from the weights, so they must be float32"
                raise ConfigError("model.precision.params", str(leaf.dtype), fix)
        return wrapped.init(params)

    return optax.GradientTransformationExtraArgs(init, wrapped.update)


def schedule_free_average(averaged: Any, params: Any, opt_state: Any, steps: jax.Array) -> Any:
    """The average that a schedule-free optimizer holds within its weights; what it does not train as it is."""
    is_it = lambda x: isinstance(x, ScheduleFreeState)
    (found,) = filter(is_it, jax.tree.leaves(opt_state, is_leaf=is_it))
    masked = lambda x: isinstance(x, optax.MaskedNode)
    trained = jax.tree.map(lambda z, p: z if masked(z) else p, found.z, params, is_leaf=masked)
    told = optax.contrib.schedule_free_eval_params(found, trained)
    return jax.tree.map(lambda x, p: p if masked(x) else x, told, params, is_leaf=masked)
