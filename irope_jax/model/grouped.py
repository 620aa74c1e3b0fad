"""Products of rows with the matrix of their group: rows in order of groups, one `[D, F]` matrix a group.

Belongs here: the product, its gradient and the reordering around it. Which row goes to which group does not.

`jax.lax.ragged_dot` says this, and on TPU its forward product costs what the rows cost. Two of its lowerings do not: on
CPU it multiplies every row with every matrix, and the gradient of the matrices does so on TPU as well (jax 0.10:
`scripts/bench_moe.py` prints the FLOPs). Those two go tile by tile here.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_ROWS_OF_A_TILE = (32, 512)


@jax.custom_vjp
def grouped_dot(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`x[row] @ w[group of row]`, `[M, F]` in the type of `x_MD`; products accumulate in float32.

    Args:
      x_MD: rows, those of group 0 first, then those of group 1 …; rows past the last group give zeros.
      w_EDF: a matrix for each group, in the type of `x_MD`.
      sizes_E: int32, rows of each group; their sum is at most M.

    Reverse mode, first order only; inside `shard_map` it needs `check_vma=False`.
    """
    return _product(x_MD, w_EDF, sizes_E, contract=1)


def _forward(x_MD, w_EDF, sizes_E):
    return _product(x_MD, w_EDF, sizes_E, contract=1), (x_MD, w_EDF, sizes_E)


def _backward(saved, d_out_MF):
    x_MD, w_EDF, sizes_E = saved
    d_x = _product(d_out_MF, w_EDF, sizes_E, contract=2)
    return d_x, _outer(x_MD, d_out_MF, sizes_E).astype(w_EDF.dtype), None


grouped_dot.defvjp(_forward, _backward)


def _product(x_MA, w_EDF, sizes_E, contract: int) -> jax.Array:
    """Rows times `w[group]` along its axis `contract`."""
    ragged, tiled = partial(_ragged, contract=contract), partial(_tiled, contract=contract)
    return lax.platform_dependent(x_MA, w_EDF, sizes_E, tpu=ragged, default=tiled)


def _ragged(x_MA, w_EDF, sizes_E, *, contract: int) -> jax.Array:
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (contract,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    out = lax.ragged_dot_general(x_MA, w_EDF, sizes_E, dims, preferred_element_type=jnp.float32)
    rows = jnp.arange(x_MA.shape[0])
    return jnp.where(rows[:, None] < sizes_E.sum(), out, 0).astype(x_MA.dtype)


class _Tiles(NamedTuple):
    """Stretches of at most `height` rows, each of one group, in order of rows; the last ones may be of no rows."""

    group: jax.Array
    first: jax.Array
    rows: jax.Array

    @staticmethod
    def height(rows: int, groups: int) -> int:
        """Rows that a tile has at most: groups that are cut into several waste at most a sixteenth of the work."""
        least, most = _ROWS_OF_A_TILE
        even = max(rows // (16 * groups), 1)
        return max(1, min(rows, max(least, min(most, 1 << (even.bit_length() - 1)))))

    @classmethod
    def of(cls, sizes_E: jax.Array, rows: int, height: int) -> _Tiles:
        count = rows // height + min(len(sizes_E), rows)  # at most that many, whatever the sizes
        ends = jnp.cumsum(sizes_E)
        tiles_E = -(-sizes_E // height)
        last = jnp.cumsum(tiles_E)
        tile = jnp.arange(count, dtype=sizes_E.dtype)
        group = jnp.minimum(jnp.searchsorted(last, tile, side="right"), len(sizes_E) - 1).astype(sizes_E.dtype)
        first = ends[group] - sizes_E[group] + (tile - last[group] + tiles_E[group]) * height
        used = tile < last[-1]
        return cls(
            group,
            jnp.where(used, first, rows),
            jnp.where(used, jnp.clip(ends[group] - first, 0, height), 0).astype(sizes_E.dtype),
        )


def _tiled(x_MA, w_EDF, sizes_E, *, contract: int) -> jax.Array:
    rows, groups = x_MA.shape[0], w_EDF.shape[0]
    height = _Tiles.height(rows, groups)
    x_MA = jnp.pad(x_MA, ((0, height), (0, 0)))

    def body(out, tile: _Tiles):
        # What a tile writes past its rows the next one overwrites; tiles without rows write into the padding.
        here = lax.dynamic_slice_in_dim(x_MA, tile.first, height)
        w = lax.dynamic_index_in_dim(w_EDF, tile.group, keepdims=False)
        product = lax.dot_general(here, w, (((1,), (contract - 1,)), ((), ())), preferred_element_type=jnp.float32)
        return lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), tile.first, 0), None

    out = jnp.zeros((rows + height, w_EDF.shape[3 - contract]), x_MA.dtype)
    out, _ = lax.scan(body, out, _Tiles.of(sizes_E, rows, height))
    return jnp.where(jnp.arange(rows)[:, None] < sizes_E.sum(), out[:rows], 0)


def _outer(x_MD, y_MF, sizes_E) -> jax.Array:
    """`x^T y` over the rows of each group, float32 `[E, D, F]`."""
    rows, groups = x_MD.shape[0], len(sizes_E)
    height = _Tiles.height(rows, groups)
    x_MD, y_MF = (jnp.pad(z, ((0, height), (0, 0))) for z in (x_MD, y_MF))

    def body(sums, tile: _Tiles):
        x, y = (lax.dynamic_slice_in_dim(z, tile.first, height) for z in (x_MD, y_MF))
        x = jnp.where(jnp.arange(height)[:, None] < tile.rows, x, 0)
        product = lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        sum_here = lax.dynamic_index_in_dim(sums, tile.group, keepdims=False) + product
        return lax.dynamic_update_index_in_dim(sums, sum_here, tile.group, 0), None

    sums = jnp.zeros((groups, x_MD.shape[1], y_MF.shape[1]), jnp.float32)
    return lax.scan(body, sums, _Tiles.of(sizes_E, rows, height))[0]


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """`x[order]`, whose gradient is again a look-up, by the inverse permutation, not a scattered sum."""
    return x[order]


permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, d: (d[inverse], None, None))
