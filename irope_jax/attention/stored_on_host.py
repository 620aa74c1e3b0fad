"""Keys or values that lie in the memory of the host: written token by token, read a block of slots at a time.

For layers that see everything, whose slots are most of a cache. A device holds one block of them; every step reads all
of them over the bus to the host, so this buys length with time.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from irope_jax.attention.stored import Stored
from irope_jax.core.types import Array


def beside(x: Array, other: Array) -> Array:
    """`x` in the memory where `other` lies: on CPUs, and where flax traces a scan only for its shapes, there is one."""
    return jax.device_put(x, jax.typeof(other).memory_space)


@flax.struct.dataclass
class StoredOnHost(Stored):
    """Vectors of width H at slots, floats only.

    A TPU slices what lies on its host along the first axis alone, and only between whole tiles. So layers, rows and
    slots are one axis, `[R B (S + 1), K, H]`; the last slot of each row takes tokens that are not kept.

    Attributes:
      rows: B.
      kept_slots: S.
    """

    rows: int = flax.struct.field(pytree_node=False, default=1)
    kept_slots: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def heads(self) -> int:
        return self.data.shape[1]

    @property
    def slots(self) -> int:
        return self.kept_slots

    def _place(self, repeat: int | Array, row: int, slot: int | Array) -> int | Array:
        return (repeat * self.rows + row) * (self.kept_slots + 1) + slot

    def read(self, repeat: int | Array, start: int | Array, length: int) -> Array:
        """Slots `start … start + length - 1` of one layer, `[B, K, length, H]`, on the device."""

        def cut(row: int) -> Array:
            there_SKH = lax.dynamic_slice_in_dim(self.data, self._place(repeat, row, start), length, 0)
            # In this order, or XLA:TPU asks for one that it cannot slice on the host.
            return with_layout_constraint(jax.device_put(there_SKH, jax.memory.Space.Device), Layout((0, 1, 2)))

        data_BSKH = jnp.stack([cut(row) for row in range(self.rows)])
        return self.unpack(jnp.swapaxes(data_BSKH, 1, 2), None)

    def write(self, repeat: int | Array, slot_BT: Array, x_BTKH: Array) -> StoredOnHost:
        """The same with vectors put at slots of one layer; those at slots that do not exist are left out."""
        data_BTKH, _ = self.pack(x_BTKH)
        slot_BT = jnp.minimum(slot_BT, self.kept_slots)

        def put(t: Array, data: Array) -> Array:
            for row in range(self.rows):
                vector = lax.dynamic_slice_in_dim(data_BTKH[row], t, 1, 0)
                at = self._place(repeat, row, lax.dynamic_index_in_dim(slot_BT[row], t, keepdims=False))
                data = lax.dynamic_update_slice_in_dim(data, beside(vector, data), at, 0)
            return data

        return self.replace(data=lax.fori_loop(0, slot_BT.shape[1], put, self.data))
