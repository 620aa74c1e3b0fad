"""The very steps that will run, lowered for a mesh of any devices, real or described. Nothing is executed."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from irope_jax.context.layout import ContextLayout
from irope_jax.core.types import Batch, TokenInfo
from irope_jax.data.config import DataConfig
from irope_jax.decode.generate import Generation, several_steps
from irope_jax.decode.prefill import piece_step
from irope_jax.model.cache import CacheSpec, KVCache, cache_shardings, empty_cache
from irope_jax.model.config import ModelConfig
from irope_jax.model.cost import abstract_params
from irope_jax.sharding.rules import batch_sharding, tree_shardings
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
    return _lie(abstract, shardings), shardings


def abstract_cache(model: ModelConfig, spec: CacheSpec, mesh: Mesh) -> KVCache:
    """A cache without numbers, each array with its place."""
    made = nn.meta.unbox(jax.eval_shape(lambda: empty_cache(model, spec)))
    return _lie(made, cache_shardings(model, spec, mesh))


def abstract_weights(model: ModelConfig, mesh: Mesh):
    """Parameters alone, as `irope generate` holds them."""
    boxed = abstract_params(model)
    return _lie(nn.meta.unbox(boxed), tree_shardings(boxed, mesh, whole_along_context=True))


def _lie(abstract, shardings):
    lie = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(lie, abstract, shardings)


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


def lower_prefill(
    model: ModelConfig, spec: CacheSpec, mesh: Mesh, piece: int = Generation().piece
) -> jax.stages.Lowered:
    """The step of `decode.prefill` that reads a piece of so many tokens of each row into a cache."""
    logits_BV = jax.ShapeDtypeStruct((spec.batch, model.vocab_size), jnp.float32)
    tokens_BT, real_BT = (jax.ShapeDtypeStruct((spec.batch, piece), dtype) for dtype in (jnp.int32, bool))
    cache = abstract_cache(model, spec, mesh)
    return piece_step(model).lower(abstract_weights(model, mesh), cache, logits_BV, tokens_BT, real_BT)


def lower_decode(
    model: ModelConfig, spec: CacheSpec, mesh: Mesh, asked: Generation | None = None
) -> jax.stages.Lowered:
    """The loop of `decode.generate` that chooses up to `asked.steps` tokens of each row."""
    asked = asked or Generation()
    last_B, done_B, left_B, samples_B = (
        jax.ShapeDtypeStruct((spec.batch,), dtype) for dtype in (jnp.int32, bool, jnp.int32, jnp.int32)
    )
    step = several_steps(model, asked.sampling, asked.stop_tokens, asked.steps)
    return step.lower(
        abstract_weights(model, mesh), abstract_cache(model, spec, mesh), last_B, done_B, left_B, samples_B
    )
