"""From rows on hosts to arrays on the mesh: which rows a process needs, and global arrays made of them.

The mesh decides. Its axes may span processes in any way: several processes may need the same rows of a batch and other
columns of them. Where rows come from is not said here.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Sharding


def rows_needed(sharding: Sharding, shape: tuple[int, ...]) -> dict[int, list[tuple[int, int]]]:
    """Per process, the ranges `(first, past)` of rows of an array of `shape` on its devices: in order, disjoint."""
    found = defaultdict(set)
    for device, index in sharding.devices_indices_map(shape).items():
        found[device.process_index].add(index[0].indices(shape[0])[:2])
    return {process: sorted(ranges) for process, ranges in found.items()}


def row_block(needed: Sequence[tuple[int, int]], rows: int) -> tuple[int, int] | None:
    """`(index, count)`: of the rows cut into `count` equal consecutive parts, part `index` is what is needed.

    None if what is needed is no such part.
    """
    first, past = needed[0][0], needed[-1][1]
    size = past - first
    unbroken = all(this[1] == following[0] for this, following in itertools.pairwise(needed))
    return (first // size, rows // size) if unbroken and rows % size == 0 and first % size == 0 else None


def global_array(local: np.ndarray, sharding: Sharding, *, first_row: int = 0, rows: int | None = None) -> jax.Array:
    """A global `[rows, …]` array of which this process has rows `first_row …`, whole in every other axis.

    Args:
      local: the rows; those of this process's devices must be among them.
      sharding: of the global array.
      first_row: number of the first of them.
      rows: of the global array; None if `local` is all of it.

    Raises:
      ValueError: rows that are needed are not there.
    """
    shape = (local.shape[0] if rows is None else rows, *local.shape[1:])

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        first, past, _ = index[0].indices(shape[0])
        if first < first_row or past > first_row + local.shape[0]:
            there = f"rows {first_row} to {first_row + local.shape[0] - 1}"
            raise ValueError(f"a device of this process needs rows {first} to {past - 1}, which are not among {there}")
        return local[(slice(first - first_row, past - first_row), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, piece)
