"""The stages of a run, resolved: each as the experiment it is, and as what the loop trains.

What a stage may say is `train.curriculum`'s; here its changes are applied to a config and checked before it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from irope_jax.checkpoint.native import Checkpoints
from irope_jax.core.config import ConfigError, fingerprint, from_dict, nearest, override, to_dict
from irope_jax.core.numerics import shape_difference
from irope_jax.data.config import DataConfig
from irope_jax.evals.registry import build_evaluators
from irope_jax.experiment import Experiment, check_devices, near
from irope_jax.model.config import ModelConfig
from irope_jax.model.cost import abstract_params
from irope_jax.train.curriculum import Setting, Stage, Standing, restacked


def stage_experiments(experiment: Experiment) -> tuple[Experiment, ...]:
    """Each stage as the experiment it is: the values that hold in it, its own steps, no stages. Without stages, itself.

    A stage whose data are those of the one before goes on in their stream; else its stream begins with a seed of its
    own, so that it does not show the same texts in the same order.

    Raises:
      ConfigError: a stage that changes what is not there, or what cannot be changed; names it. An evaluation that is
        named and not there.
    """
    for name in experiment.train.eval_during or ():
        _check_evaluation(experiment, name, "config.train.eval_during")
    if not experiment.stages:
        return (experiment,)
    found, at = [], replace(experiment, stages=())
    for number, stage in enumerate(experiment.stages):
        path = f"config.stages.{number}"
        before, at = at, _with_stage(at, stage, path)
        if number and _stream(at.data) != _stream(before.data):
            at = replace(at, data=replace(at.data, seed=at.data.seed + 1))
        if number:
            _check_same_parameters(before.model, at.model, path)
        if stage.gate is not None:
            for place, condition in enumerate(stage.gate.conditions):
                _check_evaluation(at, condition.evaluation, f"{path}.gate.conditions.{place}.evaluation")
        found.append(at)
    return tuple(found)


def _stream(data: DataConfig) -> DataConfig:
    """What decides the order of documents."""
    return replace(data, batch_size=1, prefetch=0)


def _with_stage(experiment: Experiment, stage: Stage, path: str) -> Experiment:
    values, changes = to_dict(experiment), {}
    if stage.length is not None:
        changes["data.seq_len"] = stage.length
    length = stage.length or experiment.data.seq_len
    if stage.batch_tokens is not None:
        if stage.batch_tokens % length:
            fix = f"must be whole rows of {length} tokens; {near(stage.batch_tokens, length)}"
            raise ConfigError(f"{path}.batch_tokens", stage.batch_tokens, fix)
        changes["data.batch_size"] = stage.batch_tokens // length
    for dotted, value in stage.change.items():
        changes |= dict.fromkeys(_paths(values, dotted, f"{path}.change.{dotted}", value), value)
    rows = changes.get("data.batch_size", experiment.data.batch_size)
    steps = stage.steps if stage.tokens is None else -(-stage.tokens // (rows * changes.get("data.seq_len", length)))
    changes["train.steps"] = steps
    try:
        typed = {dotted: value if isinstance(value, str) else repr(to_dict(value)) for dotted, value in changes.items()}
        return from_dict(Experiment, override(values, typed.items()))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.field}", error.value, error.fix) from None


def _paths(values: Any, dotted: str, path: str, value: Any) -> list[str]:
    """Dotted paths that a path with `*` stands for: those entries of lists that have such a field."""
    head, star, rest = dotted.partition(".*.")
    if not star:
        return [dotted]
    node = values
    for name in head.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    found = []
    for index, entry in enumerate(node if isinstance(node, list) else ()):
        below = entry
        *parents, last = rest.split(".")
        for name in parents:
            below = below.get(name) if isinstance(below, Mapping) else None
        if isinstance(below, Mapping) and last in below:
            found.append(f"{head}.{index}.{rest}")
    if not found:
        raise ConfigError(path, value, "no entry has such a field")
    return found


def _check_same_parameters(before: ModelConfig, after: ModelConfig, path: str) -> None:
    """Raises `ConfigError` if a stage's model does not have the parameters of the one before."""
    if before == after:
        return
    try:
        has = jax.eval_shape(lambda p: restacked(p, before, after), nn.meta.unbox(abstract_params(before)))
    except ConfigError as error:
        raise ConfigError(f"{path}: config.model.{error.field}", error.value, error.fix) from None
    if differs := shape_difference(has, nn.meta.unbox(abstract_params(after))):
        name, old, new = differs
        raise ConfigError(f"{path}.change", name, f"the stage before has {old} there, this one would need {new}")


def _check_evaluation(experiment: Experiment, name: str, field: str) -> None:
    names = [spec.name for spec in experiment.evals]
    if name not in names:
        raise ConfigError(field, name, f"no such evaluation; {nearest(name, names)}")


def settings_of(experiment: Experiment, device_count: int) -> list[Setting]:
    """What the loop trains, stage by stage, with the evaluations built.

    Raises:
      ConfigError: as `stage_experiments` and `check_devices`; names the stage.
    """
    found, stages = stage_experiments(experiment), experiment.stages or (None,)
    total, settings, built = sum(one.train.steps for one in found), [], {}
    for number, (one, stage) in enumerate(zip(found, stages, strict=True)):
        try:
            mesh = check_devices(one, device_count)
        except ConfigError as error:
            where = f"config.stages.{number}: " if stage else ""
            raise ConfigError(where + error.field, error.value, error.fix) from None
        spans = total if stage is not None and stage.schedule == "run" else one.train.steps
        key = fingerprint([to_dict(one.model), to_dict(one.evals), to_dict(one.data.tokenizer)])
        if key not in built:  # evaluations compile: the same ones are built once
            built[key] = build_evaluators(one.evals, one.model, one.data.tokenizer)
        settings.append(Setting(stage, one.model, one.data, one.train, mesh, spans, built[key]))
    return settings


def experiment_at(directory: Path, experiment: Experiment, step: int | None = None) -> Experiment:
    """The stage that a checkpoint of a run belongs to (the newest by default), as an experiment.

    Raises:
      CheckpointError: no such checkpoint.
    """
    if not experiment.stages:
        return experiment
    with Checkpoints(directory) as checkpoints:
        standing = from_dict(Standing, checkpoints.meta(step).get("curriculum", {}), str(directory))
    return stage_experiments(experiment)[standing.stage]
