"""Keys or values as a cache holds them: stacked over layers, head-major, as floats or as small integers with scales.

Head-major (`[R, B, K, S, H]`) because a product over the slots of one head then reads memory in order; token-major, XLA
turns the whole cache around for every step. Belongs here: number formats. Which slot a token gets is not known here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from irope_jax.core.types import Array

Numbers = Literal["float32", "bfloat16", "int8", "int4"]

LARGEST = {"int8": 127, "int4": 7}
"""Formats of integers, and the largest of each; symmetrical, so that zero is zero."""


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def _of_bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.bfloat16)


@functools.cache
def _hadamard(width: int) -> np.ndarray:
    """Orthogonal, float32 `[width, width]`, for a power of two: Sylvester's construction."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.float32(np.sqrt(2))
    return matrix


@flax.struct.dataclass
class Stored:
    """Vectors of width H at slots.

    Attributes:
      data: `[R, B, K, S, H]` float32 or int8. Of bfloat16 the bits, uint16: XLA:CPU slices and updates bfloat16 as
        float32 only, and copies all of it for that. Of int4 uint8 `[R, B, K, S, H/2]`: entry `i` in the low half of a
        byte, entry `i + H/2` in the high half.
      scales: bits of bfloat16 `[R, B, K, H/block, S]`, what the integers of a block are multiplied by; None for floats.
        A token has its own, so that one more token never touches those that are there. Slots come last, because a TPU
        fills up an axis of a few numbers to 128.
      numbers: the format.
    """

    data: Array
    scales: Array | None
    numbers: Numbers = flax.struct.field(pytree_node=False)

    @classmethod
    def empty(cls, shape: tuple[int, ...], numbers: Numbers, block: int) -> Stored:
        """Zeros of shape `[R, B, K, S, H]`; of integers `block` entries share a scale."""
        *outer, width = shape
        if numbers not in LARGEST:
            return cls(jnp.zeros(shape, jnp.uint16 if numbers == "bfloat16" else jnp.float32), None, numbers)
        scales = jnp.zeros((*outer[:-1], width // block, outer[-1]), jnp.uint16)
        if numbers == "int4":
            return cls(jnp.zeros((*outer, width // 2), jnp.uint8), scales, numbers)
        return cls(jnp.zeros(shape, jnp.int8), scales, numbers)

    @property
    def heads(self) -> int:
        return self.data.shape[2]

    @property
    def slots(self) -> int:
        return self.data.shape[3]

    def spread(self, x: Array) -> Array:
        """Queries or keys `[..., H]` as they meet in this format: for integers turned, float32; floats as they are.

        Keys of trained models have a few large entries, to which the others of a block lose their digits. A Hadamard
        matrix, over the largest power of two that divides H, shares them out, and leaves products of queries and keys
        as they are (QuaRot, arXiv 2404.00456).
        """
        if self.scales is None:
            return x
        width = x.shape[-1] & -x.shape[-1]
        parts = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, width)
        return jnp.matmul(parts, _hadamard(width), precision="highest").reshape(x.shape)

    def pack(self, x: Array) -> tuple[Array, Array | None]:
        """Vectors `[..., H]` in this format: data, and scales `[..., H/block]`."""
        if self.scales is None:
            return _bits(x) if self.numbers == "bfloat16" else x.astype(self.data.dtype), None
        most, count = LARGEST[self.numbers], self.scales.shape[3]
        blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], count, -1)
        # Rounded up, so that the largest entry is not beyond the largest integer; then divided by what is kept.
        scales = _bits(jnp.max(jnp.abs(blocks), axis=-1) * ((1 + 2.0**-8) / most))
        divide = _of_bits(scales).astype(jnp.float32)[..., None]
        whole = jnp.round(blocks / jnp.where(divide > 0, divide, 1.0))
        whole = jnp.clip(whole, -most, most).astype(jnp.int8).reshape(x.shape)
        if self.numbers == "int4":
            low, high = jnp.split(whole.astype(jnp.uint8), 2, axis=-1)
            whole = (low & 15) | (high << 4)
        return whole, scales

    def unpack(self, data: Array, scales: Array | None) -> Array:
        """Vectors `[..., H]` of what `pack` gave: bfloat16 as they are, all others float32."""
        if scales is None:
            return _of_bits(data) if self.numbers == "bfloat16" else data
        if self.numbers == "int4":
            halves = [(data & 15).astype(jnp.int8), (data >> 4).astype(jnp.int8)]
            data = jnp.concatenate([(half ^ 8) - 8 for half in halves], axis=-1)
        blocks = data.astype(jnp.float32).reshape(*data.shape[:-1], scales.shape[-1], -1)
        return (blocks * _of_bits(scales).astype(jnp.float32)[..., None]).reshape(data.shape)

    def rounded(self, x: Array) -> Array:
        """What is read of `x` once it is stored, in the type of `x`."""
        return self.unpack(*self.pack(x)).astype(x.dtype)

    def read(self, repeat: int | Array, start: int | Array, length: int) -> Array:
        """Slots `start … start + length - 1` of one layer, `[B, K, length, H]`."""

        def cut(x, axis):
            if x.shape[0] == 1 and length == x.shape[axis]:
                return x[0]
            start_of, sizes = [repeat, 0, 0, 0, 0], [1, *x.shape[1:]]
            start_of[axis], sizes[axis] = start, length
            # In this order, or XLA:TPU copies all of the cache to the order that it likes for the product.
            return with_layout_constraint(lax.dynamic_slice(x, start_of, sizes)[0], Layout((0, 1, 2, 3)))

        scales = None if self.scales is None else jnp.swapaxes(cut(self.scales, 4), -1, -2)
        return self.unpack(cut(self.data, 3), scales)

    def write(self, repeat: int | Array, slot_BT: Array, x_BTKH: Array) -> Stored:
        """The same with vectors put at slots of one layer; those at slots that do not exist are left out.

        Args:
          slot_BT: those of a row that exist follow one another, or go round from the last to the first.
        """
        data, scales = self.pack(x_BTKH)
        data = _put(self.data, repeat, slot_BT, data, 3)
        if scales is not None:
            scales = _put(self.scales, repeat, slot_BT, scales, 4)
        return self.replace(data=data, scales=scales)


def _put(x: Array, repeat: int | Array, slot_BT: Array, new: Array, axis: int) -> Array:
    """`x [R, B, K, ...]` with `new [B, T, K, ...]` at slots of one layer, which lie along `axis`.

    Slots of a row follow one another, and after the last comes the first. So a stretch of them, or two, is read,
    changed and put back, row after row: of a scatter, and of a loop over rows, XLA:TPU makes a copy of all of `x`.
    """
    (rows, length), slots = slot_BT.shape, x.shape[axis]
    width, real_BT = min(slots, length), slot_BT < slots
    first_B = jnp.take_along_axis(slot_BT, jnp.argmax(real_BT, axis=1)[:, None], axis=1)[:, 0]
    starts = [jnp.minimum(first_B, slots - width)]
    if 1 < width < slots:
        starts.append(jnp.zeros_like(first_B))
    for start_B in starts:
        at_BT = slot_BT - start_B[:, None]
        at_BT = jnp.where(real_BT & (at_BT >= 0), at_BT, width)
        nobody = jnp.full((rows, width), length, jnp.int32)
        token_BW = nobody.at[jnp.arange(rows)[:, None], at_BT].set(jnp.arange(length), mode="drop")
        for row in range(rows):
            start, sizes = [repeat, row, 0, 0, 0], [1, 1, *x.shape[2:]]
            start[axis], sizes[axis] = start_B[row], width
            vectors = jnp.take(new[row], token_BW[row], axis=0, mode="clip")
            vectors = jnp.moveaxis(vectors, 0, axis - 2)[None, None]
            changed = jnp.expand_dims(token_BW[row] < length, [i for i in range(5) if i != axis])
            x = lax.dynamic_update_slice(x, jnp.where(changed, vectors, lax.dynamic_slice(x, start, sizes)), start)
    return with_layout_constraint(x, Layout((0, 1, 2, 3, 4)))


@flax.struct.dataclass
class KeysValues:
    """Keys, already turned by their positions and `spread`, and values of layers."""

    keys: Stored
    values: Stored

    def map(self, of_data: Callable, of_scales: Callable) -> KeysValues:
        """`of_data` of both arrays of vectors, `of_scales` of their scales if there are any."""

        def each(one: Stored) -> Stored:
            return one.replace(data=of_data(one.data), scales=None if one.scales is None else of_scales(one.scales))

        return KeysValues(each(self.keys), each(self.values))

    def write(self, repeat: int | Array, slot_BT: Array, k_BTKH: Array, v_BTKH: Array) -> KeysValues:
        return KeysValues(self.keys.write(repeat, slot_BT, k_BTKH), self.values.write(repeat, slot_BT, v_BTKH))
