"""From rows on hosts to arrays on the mesh: which rows a process needs, and global arrays made of them.

The mesh decides. Its axes may span processes in any way: several processes may need the same rows of a batch and other
columns of them. Where rows come from is not said here.
"""

from __future__ import annotations

import itertools

import jax
import numpy as np
from jax.sharding import Sharding


def rows_needed(sharding: Sharding, shape: tuple[int, ...], process: int) -> list[tuple[int, int]]:
    """Ranges `(first, past)` of the rows of an array of `shape` on the devices of a process: in order, disjoint."""
    there = sharding.devices_indices_map(shape)
    return sorted(
        {index[0].indices(shape[0])[:2] for device, index in there.items() if device.process_index == process}
    )


def row_block(sharding: Sharding, shape: tuple[int, ...], process: int) -> tuple[int, int] | None:
    """`(index, count)`: of the rows cut into `count` equal consecutive parts, part `index` is what a process needs.

    None if what it needs is no such part.
    """
    needed = rows_needed(sharding, shape, process)
    first, past = needed[0][0], needed[-1][1]
    size = past - first
    unbroken = all(this[1] == following[0] for this, following in itertools.pairwise(needed))
    return (first // size, shape[0] // size) if unbroken and shape[0] % size == 0 and first % size == 0 else None


def global_array(local: np.ndarray, sharding: Sharding, *, first_row: int = 0, rows: int | None = None) -> jax.Array:
    """A global `[rows, …]` array of which this process has rows `first_row …`, whole in every other axis.

    Args:
      local: the rows; those of this process's devices must be among them.
      sharding: of the global array.
      first_row: number of the first of them.
      rows: of the global array; None if `local` is all of it.
    """
    shape = (local.shape[0] if rows is None else rows, *local.shape[1:])

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        first, past, _ = index[0].indices(shape[0])
        return local[(slice(first - first_row, past - first_row), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, piece)
