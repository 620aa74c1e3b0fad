"""Where the optimizer's state lies between steps, and in which number format.

Belongs here: what can be said of any optax transformation, knowing only which of its tensors are running averages. What
a transformation computes is `optimizer.py`; inside its update every average is a plain array on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from irope_jax.core.config import ConfigError

AVERAGES = ("mu", "nu", "trace", "v")
"""Fields of optax's states that hold running averages, as large as the parameters. Others (counts, factored averages,
the iterates of schedule-free methods, averaged weights) keep their format."""

SMALL = 4096
"""Numbers up to which a tensor is left as it is, on the device: coding or moving it would save nothing."""

STEPS_PER_OCTAVE = 5
"""Of the 8-bit code: neighbours differ by 15 %, and 126 steps reach down to 2^-25 of the largest."""


@dataclass(frozen=True)
class OptimizerState:
    """How the running averages of an optimizer are kept from one step to the next.

    Attributes:
      format: `params` is what optax makes, the type of the parameters. `float32`. `bfloat16`, rounded up or down at
        random so that its mean is right: to the nearest, an average that moves by less than 1/256 a step never would.
        `int8`: a sign and a logarithm (base 2, five steps an octave), relative to the largest of its block, rounded at
        random as well; what is not zero never becomes zero. Random numbers depend on the step, so a run is repeatable.
      block: numbers along the last axis that share a scale, at most; the largest divisor of the axis is taken.
      place: `device`, or `host`: pinned memory of the host, from where each tensor comes for the update.
    """

    format: Literal["params", "float32", "bfloat16", "int8"] = "params"
    block: int = 128
    place: Literal["device", "host"] = "device"

    def __post_init__(self):
        if self.block < 16:
            raise ConfigError("block", self.block, "numbers that share a scale of 4 bytes; use 16 or more")


class Coded(NamedTuple):
    """`codes` int8, in the shape of what they say; `scales` float32, the largest of each block along the last axis."""

    codes: jax.Array
    scales: jax.Array


class StoredState(NamedTuple):
    """`inner`: the state of the transformation, its averages in their format; `count`: int32, updates so far."""

    count: jax.Array
    inner: Any


class OnHost(optax.GradientTransformationExtraArgs):
    """A transformation whose state lies in memory of the host between steps (`placed`, `on_device`)."""


def stored(transformation: optax.GradientTransformation, config: OptimizerState) -> optax.GradientTransformation:
    """The same transformation, its state kept in the format and the place of the config."""
    inner = optax.with_extra_args_support(transformation)
    init, update = inner.init, inner.update
    if config.format != "params":

        def init(params):
            return StoredState(jnp.zeros((), jnp.int32), _encode(inner.init(params), jnp.zeros((), jnp.int32), config))

        def update(updates, state, params=None, **extra):
            updates, fresh = inner.update(updates, _decode(state.inner), params, **extra)
            count = state.count + 1
            return updates, StoredState(count, _encode(fresh, count, config))

    kind = OnHost if config.place == "host" else optax.GradientTransformationExtraArgs
    return kind(init, update)


def placed(optimizer: Any, abstract: Any, shardings: Any) -> Any:
    """Shardings of an optimizer's state with the memory in which it lies.

    Args:
      optimizer: an `optimizer.Optimizer`, or what `stored` gave.
      abstract, shardings: shapes and shardings of the state, the same tree.
    """
    if not getattr(optimizer, "on_host", isinstance(optimizer, OnHost)):
        return shardings
    to_host = lambda leaf, sharding: sharding.with_memory_kind("pinned_host") if leaf.size > SMALL else sharding
    return jax.tree.map(to_host, abstract, shardings)


def on_device(tree: Any) -> Any:
    """Traced arrays that lie on the host, brought to the device; others as they are."""

    def bring(x):
        there = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if there else x

    return jax.tree.map(bring, tree)


def _encode(state: Any, count: jax.Array, config: OptimizerState) -> Any:
    """Averages in the format of the config; they may be boxed with their logical axes, and stay so."""
    step_key = jax.random.fold_in(jax.random.key(0), count)
    order = iter(range(1 << 30))

    def encode(path, leaf):
        value = leaf.value if isinstance(leaf, nn.LogicallyPartitioned) else leaf
        if not _is_average(path, value):
            return leaf
        if config.format == "float32" or value.size <= SMALL:
            return _rebox(leaf, value.astype(jnp.float32))
        key = jax.random.fold_in(step_key, next(order))
        bits = jax.random.bits(key, value.shape, jnp.uint16)
        if config.format == "bfloat16":
            return _rebox(leaf, round_to_bfloat16(value.astype(jnp.float32), bits))
        block = largest_divisor(value.shape[-1], config.block)
        if block < 16:  # scales would take more than they save
            return _rebox(leaf, value.astype(jnp.float32))
        codes, scales = encode_int8(value.astype(jnp.float32), bits, block)
        names = (*leaf.names[:-1], None) if isinstance(leaf, nn.LogicallyPartitioned) else None
        return Coded(_rebox(leaf, codes), leaf.replace(value=scales, names=names) if names else scales)

    return jax.tree_util.tree_map_with_path(encode, state, is_leaf=_is_box)


def _decode(state: Any) -> Any:
    """All averages as float32 arrays."""

    def decode(path, leaf):
        if isinstance(leaf, Coded):
            return decode_int8(leaf)
        return leaf.astype(jnp.float32) if _is_average(path, leaf) else leaf

    return jax.tree_util.tree_map_with_path(decode, state, is_leaf=lambda x: isinstance(x, Coded))


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def _is_average(path: tuple, value: Any) -> bool:
    inside = any(getattr(key, "name", None) in AVERAGES for key in path)
    return inside and hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)


def _rebox(leaf: Any, value: jax.Array) -> Any:
    return leaf.replace(value=value) if isinstance(leaf, nn.LogicallyPartitioned) else value


def largest_divisor(size: int, most: int) -> int:
    return next(d for d in range(min(size, most), 0, -1) if size % d == 0)


def round_to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Float32 to one of the two neighbours in bfloat16, each as likely as the value is near; `bits` are uint16."""
    raw = lax.bitcast_convert_type(x, jnp.uint32) + bits.astype(jnp.uint32)
    return lax.bitcast_convert_type((raw >> 16).astype(jnp.uint16), jnp.bfloat16)


def encode_int8(x: jax.Array, bits: jax.Array, block: int) -> Coded:
    """Float32 in the 8-bit code of `OptimizerState`; a code c is `sign(c) * 2^((|c| - 127) / 5)` of its scale."""
    blocked = jnp.abs(x).reshape(*x.shape[:-1], x.shape[-1] // block, block)
    scales = blocked.max(-1)
    share = (blocked / jnp.where(scales > 0, scales, 1.0)[..., None]).reshape(x.shape)
    below = jnp.clip(jnp.floor(127 + STEPS_PER_OCTAVE * jnp.log2(share)), 1, 126)
    low, high = _magnitude(below), _magnitude(below + 1)
    up = (bits.astype(jnp.float32) + 0.5) / 65536 < (share - low) / (high - low)
    codes = jnp.where(x != 0, below + up, 0) * jnp.sign(x)
    return Coded(codes.astype(jnp.int8), scales)


def decode_int8(coded: Coded) -> jax.Array:
    codes, scales = coded
    block = codes.shape[-1] // scales.shape[-1]
    magnitude = _magnitude(jnp.abs(codes.astype(jnp.float32))) * jnp.repeat(scales, block, axis=-1)
    return jnp.where(codes == 0, 0.0, jnp.sign(codes) * magnitude)


def _magnitude(code: jax.Array) -> jax.Array:
    return jnp.exp2((code - 127) / STEPS_PER_OCTAVE)
