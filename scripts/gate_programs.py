"""The programs that `check_gates.py` reads gates from: compiled for simulated or described devices, never run.

One attention layer across devices (`Layer`), a decoder forward and a training step (`Model`). Each is compiled once and
kept as `Measured`: costs, memory, shapes, time. Which figure must be how large is not said here.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from irope_jax.attention.mask import Global, MaskSpec, visible_pairs
from irope_jax.context.api import attend_sharded
from irope_jax.context.layout import ContextLayout
from irope_jax.context.strategy import ContextConfig
from irope_jax.core.types import Batch, TokenInfo
from irope_jax.model.config import ModelConfig, irope_layers
from irope_jax.model.cost import parameter_counts
from irope_jax.model.decoder import hidden_states
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.plan.compiled import abstract_state
from irope_jax.plan.hlo import HloCost, analyse
from irope_jax.plan.hlo.text import parse
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.sharding.rules import batch_sharding
from irope_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from irope_jax.train.step import make_train_step

Phase = Literal["forward", "backward", "both"]
PAIR_FLOPS = {"forward": 4, "backward": 10, "both": 14}
"""FLOPs per visible pair, query head and head width: 2 products forward, 5 backward as scores are computed again."""


@dataclass(frozen=True)
class Measured:
    """What one compiled program shows; numbers are per device.

    Attributes:
      cost: FLOPs and bytes sent.
      temp: bytes of temporary memory.
      shapes: axes of every array in the program.
      seconds: CPU time of tracing and compiling.
    """

    cost: HloCost
    temp: int
    shapes: frozenset[tuple[int, ...]]
    seconds: float

    @property
    def largest(self) -> int:
        """Elements of the largest array."""
        return max(math.prod(shape) for shape in self.shapes)

    def squares(self, side: int) -> list[tuple[int, ...]]:
        """Arrays with two axes of at least `side`."""
        return [shape for shape in self.shapes if sum(axis >= side for axis in shape) >= 2]


def measure(function, args, mesh: Mesh, **options) -> Measured:
    """Compiles `function` for the mesh."""
    with jax.set_mesh(mesh):
        start = time.process_time()
        program = jax.jit(function, **options).lower(*args).compile()
        seconds = time.process_time() - start
    text = program.as_text()
    ops = (op for computation in parse(text).computations.values() for op in computation.instructions.values())
    shapes = frozenset(array.shape for op in ops for array in op.arrays)
    return Measured(analyse(text), program.memory_analysis().temp_size_in_bytes, shapes, seconds)


def simulated(parts: int) -> Mesh:
    """`parts` simulated devices along the context axis."""
    return make_mesh(MeshConfig(data=1, context=parts), jax.devices()[:parts])


def tokens(layout: ContextLayout, length: int) -> TokenInfo:
    """Shapes and promises of one unbroken row, placed."""
    return jax.eval_shape(lambda: layout.place(TokenInfo.single(1, length)))


@dataclass(frozen=True)
class Layer:
    """Attention of one layer over one row.

    Attributes:
      parts: devices along the context axis.
      length: tokens; keys where `queries` is given.
      phase: `backward` is the pullback alone, its residuals being arguments.
      mask, layout, far, near, gradients: as in `ContextConfig`.
      dtype: of queries, keys and values.
      query_heads, key_heads, width: of the model.
      queries: decoding: so many queries, whole on every device.
    """

    parts: int = 8
    length: int = 131_072
    phase: Phase = "forward"
    mask: MaskSpec = Global()
    layout: Literal["zigzag", "contiguous"] = "zigzag"
    far: str = "ring"
    near: str = "auto"
    gradients: str = "float32"
    dtype: str = "float32"
    query_heads: int = 4
    key_heads: int = 4
    width: int = 128
    queries: int | None = None

    @property
    def local(self) -> int:
        """Tokens of a device."""
        return self.length // self.parts

    @property
    def kappa(self) -> int:
        """Bytes of keys and values per token."""
        return 2 * self.key_heads * self.width * jnp.dtype(self.dtype).itemsize

    @property
    def shard(self) -> int:
        """Bytes of the keys of a device: the K-shard that ring traffic is counted in."""
        return self.local * self.kappa // 2

    @property
    def minimum(self) -> int:
        """FLOPs that all devices together cannot do without."""
        return PAIR_FLOPS[self.phase] * self.query_heads * self.width * visible_pairs(self.mask, self.length)


@cache
def layer(spec: Layer) -> Measured:
    """The layer on simulated devices."""
    return layer_on(spec, simulated(spec.parts))


def layer_on(spec: Layer, mesh: Mesh) -> Measured:
    """The layer on other devices, `spec.parts` along the context axis of `mesh`."""
    return measure(*_program(spec, mesh), mesh)


def _program(spec: Layer, mesh: Mesh):
    def described(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    cut, decoding = P(None, "context"), spec.queries is not None
    width, dtype = spec.width, jnp.dtype(spec.dtype)
    k_info = tokens(ContextLayout("contiguous" if decoding else spec.layout, spec.parts), spec.length)
    q_info, q_spec = k_info, cut
    if decoding:
        q_info, q_spec = jax.eval_shape(lambda: TokenInfo.single(1, spec.queries, start=spec.length - 1)), P()
    k_spec = P() if decoding and spec.mask.reach is not None and spec.length <= spec.mask.reach else cut
    q_info, k_info = (
        jax.tree.map(lambda x, where=where: described(x.shape, x.dtype, where), info)
        for info, where in ((q_info, q_spec), (k_info, k_spec))
    )
    q = described((1, spec.queries or spec.length, spec.query_heads, width), dtype, q_spec)
    k = described((1, spec.length, spec.key_heads, width), dtype, k_spec)
    config = ContextConfig(layout=spec.layout, far=spec.far, near=spec.near, gradients=spec.gradients)

    def forward(q, k, v, q_info, k_info):
        return attend_sharded(q, k, v, q_info, k_info, spec.mask, context=config)

    def pulled(q, k, v, q_info, k_info):
        return jax.vjp(lambda *qkv: forward(*qkv, q_info, k_info), q, k, v)

    def both(q, k, v, q_info, k_info, d_out):
        out, pull = pulled(q, k, v, q_info, k_info)
        return out, pull(d_out)

    args = (q, k, k, q_info, k_info)
    if spec.phase == "forward":
        return forward, args
    if spec.phase == "both":
        return both, (*args, q)
    with jax.set_mesh(mesh):
        pull = jax.eval_shape(lambda *args: pulled(*args)[1], *args)
    return (lambda pull, d_out: pull(d_out)), (pull, q)


@dataclass(frozen=True)
class Model:
    """A small iRoPE decoder: wide enough that every part of memory shows, not wider.

    Attributes:
      parts, length: devices along the context axis, and tokens of the one row.
      chunk: of the local layers.
      layers: a multiple of 4.
      gather: every layer gathers all keys, as a model would that knows no other way.
      others: of `ModelConfig`.
    """

    parts: int = 8
    length: int = 131_072
    chunk: int = 8192
    layers: int = 8
    d_model: int = 256
    query_heads: int = 4
    key_heads: int = 2
    width: int = 64
    hidden: int = 1024
    vocabulary: int = 16_384
    remat: str = "full"
    gather: bool = False

    @property
    def config(self) -> ModelConfig:
        ways = {"far": "gather", "near": "gather"} if self.gather else {"far": "ring"}
        return ModelConfig(
            vocab_size=self.vocabulary, d_model=self.d_model, num_layers=self.layers, num_heads=self.query_heads,
            num_kv_heads=self.key_heads, head_dim=self.width,
            pattern=irope_layers(self.chunk, SwiGLU(self.hidden, 1024)), remat=self.remat,
            context=ContextConfig(**ways),
        )  # fmt: skip

    @property
    def local(self) -> int:
        return self.length // self.parts

    @property
    def ring_bytes(self) -> int:
        """What one global layer sends forward: its keys and values around the ring, once."""
        return (self.parts - 1) * self.local * 2 * self.key_heads * self.width * 4

    @property
    def sync_bytes(self) -> float:
        """What the forward pass sends besides: weights of layers gathered once, and a look-up's ids and columns."""
        attention = self.d_model * self.width * 2 * (self.query_heads + self.key_heads)
        weights = self.layers * (attention + 3 * self.d_model * self.hidden)
        return (self.parts - 1) / self.parts * 4 * (weights + self.length + self.local * self.d_model)

    @property
    def periods(self) -> int:
        return self.layers // 4

    @property
    def parameters(self) -> dict[str, int]:
        return parameter_counts(self.config)

    def pairs(self) -> int:
        """Visible pairs of all layers."""
        return sum(visible_pairs(layer.mask, self.length) for layer in self.config.layers)


@cache
def decoder(model: Model) -> Measured:
    """Tokens to hidden states."""
    mesh = simulated(model.parts)
    state, batch = _state(model, mesh)[0], _batch(model, mesh)
    return measure(
        lambda params, batch: hidden_states(model.config, params, batch.tokens, batch.info)[0],
        (state.params, batch), mesh,
    )  # fmt: skip


@cache
def train_step(model: Model) -> Measured:
    """A whole training step, its state donated."""
    mesh, config = simulated(model.parts), OptimizerConfig()
    state, shardings, optimizer = _state(model, mesh)
    step = make_train_step(model.config, optimizer, learning_rate(config, 100))
    return measure(
        step, (state, _batch(model, mesh)), mesh, donate_argnums=0, out_shardings=(shardings, None)
    )  # fmt: skip


def _state(model: Model, mesh: Mesh):
    optimizer = make_optimizer(OptimizerConfig(), 100)
    return *abstract_state(model.config, optimizer, mesh), optimizer


def _batch(model: Model, mesh: Mesh) -> Batch:
    info = tokens(ContextLayout("zigzag", model.parts), model.length)
    ids, weights = info.rows, jax.ShapeDtypeStruct(info.shape, jnp.float32)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))
    return jax.tree.map(place, Batch(ids, ids, weights, info))
