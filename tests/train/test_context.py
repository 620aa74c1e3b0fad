"""Whole training steps of an iRoPE model: every mesh trains what one device trains."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.context.layout import ContextLayout
from irope_jax.context.strategy import ContextConfig
from irope_jax.core.numerics import assert_close
from irope_jax.core.types import Batch, TokenInfo
from irope_jax.model.config import ModelConfig, irope_layers
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.plan.hlo import analyse
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.sharding.rules import batch_sharding
from irope_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from irope_jax.train.state import init_state, state_shardings
from irope_jax.train.step import make_train_step
from tests.quickly import keep

B, T, V, CHUNK, STEPS = 4, 64, 64, 8, 3
MODEL = dict(
    vocab_size=V, d_model=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16,
    pattern=irope_layers(CHUNK, SwiGLU(64), interval=2, qk_norm="rms"), remat="attention", residual_init_std=0.02,
)  # fmt: skip
MESHES = {
    "context 8": MeshConfig(data=1, context=8),
    "data 2 context 4": MeshConfig(data=2, context=4),
    "expert 2 context 2 tensor 2": MeshConfig(data=1, expert=2, context=2, tensor=2),
}
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def batches() -> list[Batch]:
    """Packed and padded rows; documents begin at multiples of the chunk."""
    rng = np.random.default_rng(0)
    cuts = [[T], [24, 40], [8, 16, 32], [40, 16]]
    positions, segments = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for row, lengths in enumerate(cuts):
        begin = 0
        for number, length in enumerate(lengths, start=1):
            positions[row, begin : begin + length] = np.arange(length)
            segments[row, begin : begin + length] = number
            begin += length
    rows = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    info = TokenInfo(positions, segments, rows, first_row=0, document_multiple=CHUNK)
    draw = lambda: rng.integers(0, V, (B, T)).astype(np.int32)
    weights = (segments > 0).astype(np.float32)
    return [Batch(draw(), draw(), weights, info) for _ in range(STEPS)]


@cache
def train(mesh_config: MeshConfig | None, context: ContextConfig):
    """Losses and parameters after some steps, and the compiled program."""
    model = ModelConfig(**MODEL, context=context)
    mesh = make_mesh(mesh_config) if mesh_config else make_mesh(MeshConfig(), jax.devices()[:1])
    layout = ContextLayout(context.layout, mesh.shape["context"])
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    _, shardings = state_shardings(model, optimizer, mesh)
    state = init_state(model, optimizer, mesh, 0)
    step = make_train_step(model, optimizer, learning_rate(OPTIMIZER, STEPS), z_loss=1e-4)
    put = lambda batch: jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), layout.place(batch))
    with jax.set_mesh(mesh):
        take = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        take = take.lower(state, put(batches()[0])).compile()
        losses = []
        for batch in batches():
            state, scalars = take(state, put(batch))
            losses.append(float(scalars["loss"]))
    return jnp.array(losses), jax.device_get(state.params), take.as_text()


ZIGZAG, CONTIGUOUS = ContextConfig(far="ring"), ContextConfig(layout="contiguous")
RUNS = {
    "context 8 contiguous": ("context 8", CONTIGUOUS),
    "data 2 context 4 zigzag": ("data 2 context 4", ZIGZAG),
    "expert 2 context 2 tensor 2 zigzag": ("expert 2 context 2 tensor 2", ZIGZAG),
}


@pytest.mark.parametrize("name", keep("context 8 contiguous", "expert 2 context 2 tensor 2 zigzag", of=RUNS))
def test_three_steps_equal_one_device(name):
    mesh, context = RUNS[name]
    wanted, wanted_params, _ = train(None, ContextConfig())
    losses, params, _ = train(MESHES[mesh], context)
    assert_close(losses, wanted, rtol=0, atol=1e-5, what="losses")
    assert_close(params, wanted_params, rtol=0, atol=1e-5, what="parameters")


def test_only_the_global_layer_sends_keys():
    cost = analyse(train(MESHES["data 2 context 4"], ZIGZAG)[2])
    sent = cost.bytes_by("layer", "kind")
    permuted = {layer for (layer, kind), count in sent.items() if kind == "collective-permute" and count}
    assert permuted == {"layer_1"}
