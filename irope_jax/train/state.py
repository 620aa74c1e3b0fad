"""The training state: everything that must survive a restart except the place in the data."""

from __future__ import annotations

import logging
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from irope_jax.checkpoint.native import CheckpointError, Checkpoints
from irope_jax.core.config import from_dict
from irope_jax.core.numerics import shape_difference
from irope_jax.model.config import ModelConfig
from irope_jax.model.cost import abstract_params
from irope_jax.model.decoder import init_params, restack
from irope_jax.position.temperature import is_learned
from irope_jax.sharding.rules import tree_shardings
from irope_jax.train.optimizer import Optimizer
from irope_jax.train.placement import placed

log = logging.getLogger(__name__)

Weights = Literal["averaged", "params"]
"""Which weights of a checkpoint: those averaged over steps, or those that were trained."""


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
      averaged: the weights to evaluate, float32, a tree like `params`; None where those are evaluated themselves.
    """

    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array
    averaged: Any = None


def evaluation_params(state: TrainState) -> Any:
    """The parameters that evaluations use: the averaged ones, in the types of the trained, or these."""
    if state.averaged is None:
        return state.params
    return jax.tree.map(lambda averaged, p: averaged.astype(p.dtype), state.averaged, state.params)


def start_from(state: TrainState, params: Any, optimizer: Optimizer, shardings: TrainState) -> TrainState:
    """The state with other parameters, and with optimizer state and average as they are before a first step."""
    places = (shardings.opt_state, shardings.averaged)
    opt_state, averaged = jax.jit(lambda p: beside(optimizer, p), out_shardings=places)(params)
    return state.replace(params=params, opt_state=opt_state, averaged=averaged)


def beside(optimizer: Optimizer, params: Any) -> tuple[Any, Any]:
    """`(opt_state, averaged)` before the first step."""
    copy = lambda p: jnp.array(p, jnp.float32, copy=True)  # both are donated, so they must not be one
    return optimizer.init(params), None if optimizer.average is None else jax.tree.map(copy, params)


@flax.struct.dataclass
class _Shaped(nn.LogicallyPartitioned):
    """A box that remembers the shape of the parameter, whatever an optimizer puts in it."""

    shape: tuple[int, ...] = flax.struct.field(default=(), pytree_node=False)


def _name_axes(box: Any) -> Any:
    """What an optimizer made in the box of a parameter, with the names of the axes that it has of it.

    Moments are of the parameter's shape; those of rows and columns lack an axis; what has none of them loses the box,
    and lies whole on every device.
    """
    if not isinstance(box, _Shaped):
        return box
    if not hasattr(box.value, "shape"):  # an empty node where a transformation skips a parameter
        return nn.LogicallyPartitioned(box.value, box.names)
    # Two axes of the same length may be taken for one another: where it lies is then less good, never wrong.
    for axes in combinations(range(len(box.shape)), len(box.value.shape)):
        if tuple(box.shape[i] for i in axes) == tuple(box.value.shape):
            return nn.LogicallyPartitioned(box.value, tuple(box.names[i] for i in axes))
    return box.value


def _create(config: ModelConfig, optimizer: Optimizer, seed: int) -> TrainState:
    init_key, step_key = jax.random.split(jax.random.key(seed))
    params = init_params(config, init_key)
    zero = lambda: jnp.zeros((), jnp.int32)
    # optax maps over the boxed parameters, so the moments keep their logical axes.
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
    shaped = jax.tree.map(lambda box: _Shaped(box.value, box.names, shape=box.value.shape), params, is_leaf=is_box)
    opt_state, averaged = jax.tree.map(_name_axes, beside(optimizer, shaped), is_leaf=is_box)
    return TrainState(zero(), zero(), zero(), params, opt_state, jax.random.key_data(step_key), averaged)


def state_shardings(config: ModelConfig, optimizer: Optimizer, mesh: Mesh) -> tuple[Any, Any]:
    """`(abstract, shardings)` of the unboxed state: shapes without memory, and where each leaf lies."""
    boxed = jax.eval_shape(lambda: _create(config, optimizer, 0))
    abstract, shardings = nn.meta.unbox(boxed), tree_shardings(boxed, mesh)
    return abstract, shardings.replace(opt_state=placed(optimizer, abstract.opt_state, shardings.opt_state))


def init_state(config: ModelConfig, optimizer: Optimizer, mesh: Mesh, seed: int) -> TrainState:
    """A fresh state, made where it will live: no device ever holds more than its part."""
    _, shardings = state_shardings(config, optimizer, mesh)
    return jax.jit(lambda: nn.meta.unbox(_create(config, optimizer, seed)), out_shardings=shardings)()


def fresh_params(config: ModelConfig, mesh: Mesh, seed: int) -> Any:
    """The parameters of `init_state`, alone."""
    init_key, _ = jax.random.split(jax.random.key(seed))
    make = lambda: nn.meta.unbox(init_params(config, init_key))
    return jax.jit(make, out_shardings=tree_shardings(abstract_params(config), mesh))()


def load_params(
    run_directory: str | Path,
    config: ModelConfig,
    mesh: Mesh,
    step: int | None = None,
    weights: Weights | None = None,
    *,
    for_decoding: bool = False,
) -> tuple[Any, int]:
    """`(params, step)`: trained or imported parameters of a run directory (the newest by default), laid out on a mesh.

    As in training; for decoding, whole on every device of `context`.

    They are the averaged ones if there are any, unless `weights` says which.

    Raises:
      CheckpointError: nothing there, or parameters of another model.
    """
    boxed = abstract_params(config)
    with Checkpoints(run_directory) as source:
        step = source.latest if step is None else step
        places = tree_shardings(boxed, mesh, whole_along_context=for_decoding)
        return source.restore_params(nn.meta.unbox(boxed), places, step, weights), step


def params_for(
    run_directory: str | Path,
    trained: ModelConfig,
    config: ModelConfig,
    mesh: Mesh,
    step: int | None = None,
    weights: Weights | None = None,
    *,
    for_decoding: bool = False,
    fresh_temperatures: bool = False,
) -> tuple[Any, int]:
    """`load_params` of a model that was trained, for a model of other layers: each weight stays with its layer.

    With `fresh_temperatures`, learned temperatures that the trained model lacks begin fresh and those that `config`
    lacks are left out; the log names the layers.

    Raises:
      CheckpointError: nothing there, or the two do not have the same parameters; names the first that differs.
      ConfigError: another number of layers.
    """
    learns = lambda model, i: is_learned(model.period[i % len(model.period)].temperature)
    other = [i for i in range(config.num_layers) if learns(trained, i) != learns(config, i)]
    if other:
        which = f"attention/temperature of layers {', '.join(map(str, other))}"
        if not fresh_temperatures:
            raise CheckpointError(
                f"{run_directory}: {which} is learned in one of the two models only; train on from it "
                "(train.init_from), or use the model it was trained with"
            )
        log.info("%s: in one of the two models only, begins fresh or ends here", which)
    move = lambda p: restack(p, trained, config, fresh_temperatures=bool(other))
    boxed = abstract_params(config)
    have = jax.eval_shape(move, nn.meta.unbox(abstract_params(trained)))
    if differs := shape_difference(have, nn.meta.unbox(boxed)):
        name, has, needs = differs
        raise CheckpointError(
            f"{run_directory}: has {has} at {name}, this model needs {needs}; "
            "use a run with the same parameters, or the model it was trained with"
        )
    params, step = load_params(run_directory, trained, mesh, step, weights, for_decoding=for_decoding)
    if len(trained.period) == len(config.period) and not other:
        return params, step
    places = tree_shardings(boxed, mesh, whole_along_context=for_decoding)
    return jax.jit(move, out_shardings=places)(params), step


def params_from(run_directory: str, config: ModelConfig, mesh: Mesh, weights: Weights | None = None) -> tuple[Any, int]:
    """`params_for`, with `fresh_temperatures`, of whatever model a run says it trained: its newest, to start from."""
    with Checkpoints(run_directory) as source:
        trained = from_dict(ModelConfig, source.meta()["model"], "init_from.model")
    return params_for(run_directory, trained, config, mesh, weights=weights, fresh_temperatures=True)
