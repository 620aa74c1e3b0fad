"""The training state: everything that must survive a restart except the place in the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from irope_jax.checkpoint.native import CheckpointError, Checkpoints
from irope_jax.core.config import from_dict
from irope_jax.core.numerics import shape_difference
from irope_jax.model.config import ModelConfig
from irope_jax.model.cost import abstract_params
from irope_jax.model.decoder import init_params, restack
from irope_jax.sharding.rules import tree_shardings
from irope_jax.train.placement import placed


@flax.struct.dataclass
class TrainState:
    """One pytree, donated to every step.

    Attributes:
      step: int32, optimizer steps taken.
      skipped: int32, steps left out because a loss or gradient was not finite, over the whole run.
      skipped_in_a_row: int32, the same since the last good step.
      params: model parameters.
      opt_state: optimizer state.
      rng: key of whatever a step draws at random, folded with the step; data order has its own seed.
    """

    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array


def _create(config: ModelConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    init_key, step_key = jax.random.split(jax.random.key(seed))
    params = init_params(config, init_key)
    zero = lambda: jnp.zeros((), jnp.int32)
    # optax maps over the boxed parameters, so the moments keep their logical axes.
    return TrainState(zero(), zero(), zero(), params, optimizer.init(params), jax.random.key_data(step_key))


def state_shardings(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> tuple[Any, Any]:
    """`(abstract, shardings)` of the unboxed state: shapes without memory, and where each leaf lies."""
    boxed = jax.eval_shape(lambda: _create(config, optimizer, 0))
    abstract, shardings = nn.meta.unbox(boxed), tree_shardings(boxed, mesh)
    return abstract, shardings.replace(opt_state=placed(optimizer, abstract.opt_state, shardings.opt_state))


def init_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """A fresh state, made where it will live: no device ever holds more than its part."""
    _, shardings = state_shardings(config, optimizer, mesh)
    return jax.jit(lambda: nn.meta.unbox(_create(config, optimizer, seed)), out_shardings=shardings)()


def load_params(run_directory: str | Path, config: ModelConfig, mesh: Mesh, step: int | None = None) -> tuple[Any, int]:
    """`(params, step)`: trained or imported parameters of a run directory (the newest by default), laid out on a mesh.

    Raises:
      CheckpointError: nothing there, or parameters of another model.
    """
    boxed = abstract_params(config)
    with Checkpoints(run_directory) as source:
        step = source.latest if step is None else step
        return source.restore_params(nn.meta.unbox(boxed), tree_shardings(boxed, mesh), step), step


def params_for(
    run_directory: str | Path, trained: ModelConfig, config: ModelConfig, mesh: Mesh, step: int | None = None
) -> tuple[Any, int]:
    """`load_params` of a model that was trained, for a model of other layers: each weight stays with its layer.

    Raises:
      CheckpointError: nothing there, or the two do not have the same parameters; names the first that differs.
      ConfigError: another number of layers.
    """
    move = lambda p: restack(p, trained, config)
    boxed = abstract_params(config)
    have = jax.eval_shape(move, nn.meta.unbox(abstract_params(trained)))
    if differs := shape_difference(have, nn.meta.unbox(boxed)):
        name, has, needs = differs
        raise CheckpointError(
            f"{run_directory}: has {has} at {name}, this model needs {needs}; "
            "use a run with the same parameters, or the model it was trained with"
        )
    params, step = load_params(run_directory, trained, mesh, step)
    if len(trained.period) == len(config.period):
        return params, step
    return jax.jit(move, out_shardings=tree_shardings(boxed, mesh))(params), step


def params_from(run_directory: str, config: ModelConfig, mesh: Mesh) -> tuple[Any, int]:
    """`params_for` of whatever model a run says it trained: its newest parameters, to start `config` from."""
    with Checkpoints(run_directory) as source:
        trained = from_dict(ModelConfig, source.meta()["model"], "init_from.model")
    return params_for(run_directory, trained, config, mesh)
