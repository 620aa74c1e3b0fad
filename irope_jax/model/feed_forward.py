"""The dense feed-forward part of a layer: SwiGLU (arXiv 2002.05202).

Belongs here: what every token goes through on its own between attention and attention. `swiglu` is a pure function;
`FeedForward` gives it parameters. Mixtures of several are `moe`; norms and the residual sum belong to the decoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from irope_jax.core.chunks import TokenChunks
from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array, Precision
from irope_jax.model.layers import project
from irope_jax.model.remat import named
from irope_jax.sharding.rules import gathered, token_parts


@dataclass(frozen=True)
class SwiGLU:
    """`down(silu(gate(x)) * up(x))`, without biases.

    Attributes:
      hidden_dim: F, the width of `gate` and `up`.
      chunk: tokens of a device whose hidden layer exists at a time; `None` keeps that of all tokens for the backward
        pass. With a chunk, memory no longer grows with F times the length, at 11/9 of the FLOPs of a training step.
    """

    hidden_dim: int
    chunk: int | None = None
    kind: ClassVar[str] = "swiglu"

    def __post_init__(self):
        if self.hidden_dim < 1:
            raise ConfigError("hidden_dim", self.hidden_dim, "the width of the feed-forward part; use 1 or more")
        if self.chunk is not None and self.chunk < 1:
            raise ConfigError("chunk", self.chunk, "tokens worked on at a time; use 1 or more, or None for all")

    def __str__(self) -> str:
        return f"SwiGLU {self.hidden_dim}" + (f", {self.chunk} tokens at a time" if self.chunk else "")


def swiglu(
    x_BTD: Array,
    w_gate_DF: Array,
    w_up_DF: Array,
    w_down_FD: Array,
    *,
    chunk: int | None = None,
    shards: tuple[int, int] = (1, 1),
) -> jax.Array:
    """`(silu(x @ w_gate) * (x @ w_up)) @ w_down`, `[B, T, D]` in the type of `x_BTD`.

    Args:
      x_BTD: activations; the weights have the same type.
      w_gate_DF, w_up_DF, w_down_FD: weights.
      chunk: tokens of each piece whose hidden layer exists at a time, forward and backward; the backward pass computes
        `gate` and `up` again and sums the gradients of the weights in float32. Reverse mode, first order only; inside
        `shard_map` it needs `check_vma=False`. `None` leaves everything to ordinary differentiation.
      shards: into how many equal pieces devices split the batch and the sequence. Under plain `jit`, the chunked
        gradient of the weights is then kept apart by piece and summed across devices once, not in every chunk.

    Raises:
      ConfigError: a chunk below 1 or shards that do not divide batch and length.
    """
    if chunk is None:
        return _whole(x_BTD, w_gate_DF, w_up_DF, w_down_FD, name=named)
    chunks = TokenChunks.of(*x_BTD.shape[:2], chunk, shards)
    return _chunked(chunks, x_BTD, w_gate_DF, w_up_DF, w_down_FD)


def _whole(x, w_gate_DF, w_up_DF, w_down_FD, name=lambda x, _: x) -> jax.Array:
    gate, up = name(project(x, w_gate_DF), "gate"), name(project(x, w_up_DF), "up")
    return _gated(gate, up, w_down_FD)


@jax.custom_vjp
def _gated(gate, up, w_down_FD) -> jax.Array:
    """`(silu(gate) * up) @ w_down`, which keeps nothing of that width for its backward pass but `gate` and `up`."""
    return project(jax.nn.silu(gate) * up, w_down_FD)


def _gated_forward(gate, up, w_down_FD):
    return _gated(gate, up, w_down_FD), (gate, up, w_down_FD)


def _gated_backward(saved, d_out):
    gate, up, w_down_FD = saved
    share = jax.nn.sigmoid(gate)
    active = gate * share
    d_hidden, d_w_down_FD = jax.vjp(project, active * up, w_down_FD)[1](d_out)
    return d_hidden * up * (share + active * (1 - share)), d_hidden * active, d_w_down_FD


_gated.defvjp(_gated_forward, _gated_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunks: TokenChunks, x_BTD, *weights) -> jax.Array:
    x = chunks.split(x_BTD)
    out = chunks.fold(lambda out, i: chunks.put(out, _whole(chunks.take(x, i), *weights), i), jnp.zeros_like(x))
    return chunks.join(out)


def _forward(chunks: TokenChunks, x_BTD, *weights):
    # Saving the inputs alone is what keeps memory flat: the backward pass starts from them, chunk by chunk.
    return _chunked(chunks, x_BTD, *weights), (x_BTD, weights)


def _backward(chunks: TokenChunks, saved, d_out_BTD):
    x_BTD, weights = saved
    x, d_out = chunks.split(x_BTD), chunks.split(d_out_BTD)

    # One piece of a chunk; mapped over pieces, so that each keeps its own gradient of the weights.
    @partial(jax.vmap, in_axes=(0, 0))
    @partial(jax.vmap, in_axes=(1, 1), out_axes=(1, 0))
    def pull(x_btD, d_out_btD):
        d_x, *d_weights = jax.vjp(_whole, x_btD, *weights)[1](d_out_btD)
        return d_x, d_weights

    def body(carry, i):
        d_x, d_weights = carry
        d_chunk, d_weights_here = pull(chunks.take(x, i), chunks.take(d_out, i))
        return chunks.put(d_x, d_chunk, i), jax.tree.map(jnp.add, d_weights, d_weights_here)

    zeros = [jnp.zeros((*chunks.shards, *w.shape), jnp.float32) for w in weights]
    d_x, d_weights = chunks.fold(body, (jnp.zeros_like(x), zeros))
    return chunks.join(d_x), *(d.sum((0, 1)).astype(w.dtype) for d, w in zip(d_weights, weights))


_chunked.defvjp(_forward, _backward)


class FeedForward(nn.Module):
    """The feed-forward part as its spec says.

    Attributes:
      spec: how wide, and how many tokens at a time.
      precision: number formats of parameters and products.
      init_std: standard deviation of the initial `gate` and `up`.
      out_std: that of `down`, which writes into the residual stream; `None` means `init_std`.
    """

    spec: SwiGLU
    precision: Precision = Precision()
    init_std: float = 0.02
    out_std: float | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Hidden states `[B, T, D]` to the contribution of this layer to the residual stream `[B, T, D]`."""
        (batch, length, width), hidden = x_BTD.shape, self.spec.hidden_dim
        compute = jnp.dtype(self.precision.compute)

        def weight(name: str, axes: tuple[str, str], shape: tuple[int, int], std: float) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
            return gathered(self.param(name, init, shape, jnp.dtype(self.precision.params)).astype(compute), axes)

        gate_DF = weight("gate", ("embed", "mlp"), (width, hidden), self.init_std)
        up_DF = weight("up", ("embed", "mlp"), (width, hidden), self.init_std)
        out_std = self.init_std if self.out_std is None else self.out_std
        down_FD = weight("down", ("mlp", "embed"), (hidden, width), out_std)
        # A batch that the mesh does not divide (one row while parameters are made) is simply not split.
        shards = tuple(math.gcd(size, parts) for size, parts in zip((batch, length), token_parts()))
        return swiglu(x_BTD.astype(compute), gate_DF, up_DF, down_FD, chunk=self.spec.chunk, shards=shards)
