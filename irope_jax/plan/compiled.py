"""The very training step that will run, lowered for a mesh of any devices, real or described. Nothing is executed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from irope_jax.context.layout import ContextLayout
from irope_jax.core.types import Batch, TokenInfo
from irope_jax.data.config import DataConfig
from irope_jax.model.config import ModelConfig
from irope_jax.sharding.rules import batch_sharding
from irope_jax.train.loop import TrainConfig
from irope_jax.train.optimizer import Optimizer, learning_rate, make_optimizer
from irope_jax.train.state import TrainState, state_shardings
from irope_jax.train.step import make_train_step


def abstract_batch(data: DataConfig, layout: ContextLayout, mesh: Mesh) -> Batch:
    """A batch as the feed gives it, without numbers: shapes, promises, and where it lies."""
    layout.check(data.seq_len)

    def array(dtype):
        return jax.ShapeDtypeStruct((data.batch_size, data.seq_len), dtype, sharding=batch_sharding(mesh))

    ids, zigzag = array(jnp.int32), layout.runs_per_piece == 2
    info = TokenInfo(
        ids, ids, ids, first_row=None if zigzag else 0, zigzag=layout.parts if zigzag else None,
        document_multiple=data.packing.document_multiple,
    )  # fmt: skip
    return Batch(ids, ids, array(jnp.float32), info)


def abstract_state(model: ModelConfig, optimizer: Optimizer, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """`(state, shardings)`: the training state without numbers, each leaf with its place, and the places alone."""
    abstract, shardings = state_shardings(model, optimizer, mesh)
    lie = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(lie, abstract, shardings), shardings


def lower_train_step(model: ModelConfig, data: DataConfig, config: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The step that `train.loop` jits, lowered; call it under `jax.set_mesh(mesh)` or `targets.targeting(mesh)`.

    Raises:
      ConfigError: something does not divide by the mesh.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    state, shardings = abstract_state(model, optimizer, mesh)
    rate = learning_rate(config.optimizer, config.steps)
    step = make_train_step(
        model, optimizer, rate, z_loss=config.z_loss, accumulate=config.accumulate, by_layer=config.by_layer
    )
    layout = ContextLayout(model.context.layout, mesh.shape["context"])
    take = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return take.lower(state, abstract_batch(data, layout, mesh))
