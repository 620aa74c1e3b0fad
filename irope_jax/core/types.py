"""The structs that travel between rooms, and the alphabet of shapes.

Shapes are written in names: `q_BTNH` is `[batch, query place, query head, head width]`. The letters:

    B batch   T query place   S key place   D model width   N query heads   K key heads   G = N / K
    H head width   F feed-forward width   E expert   V vocabulary   L layer   R repeat of the layer period

Capitals are logical sizes; inside `shard_map` a function says once "shapes below are per device".
Only structs without mathematics live here; what a mask or a rotation does with them belongs to their rooms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray

PAD_SEGMENT = 0
"""Segment id of padding: it sees nothing and nothing sees it."""


@flax.struct.dataclass
class TokenInfo:
    """Where each token is: its position, its document and its place in the packed row.

    Masks and rotations are functions of these coordinates and of nothing else, so packing, padding, zigzag order, halo
    exchange and cache slots are other arrays in the same struct, never a special case in attention. Keys carry their
    own `TokenInfo` wherever they travel.

    Attributes:
      positions: int32 `[B, T]`, the index of the token in its document, counted from 0.
      segments: int32 `[B, T]`, which document of the row; 0 (`PAD_SEGMENT`) is padding.
      rows: int32 `[B, T]`, the index in the packed row. Causality compares rows: a query sees a key only if the key's
        row is not greater. Any permutation of the sequence keeps each token's row, so it changes nothing.
      offsets: float32 `[B, T]` or None: a fraction of a position by which the token stands after `positions`, where the
        centre of an entry lies between two (32 tokens from 0 on have theirs at 15.5). Only rotations read it.
      spreads: float32 `[B, T]` or None: standard deviation, in positions, of where an entry that stands for several
        tokens is; 0 is a token. Only rotations read it.
      first_row: static promise. An integer `r` says that place `t` of the struct is row `r + t` in every batch row
        (tokens stand in row order), so that blocks which no query can see are known while tracing. `None` promises
        nothing: a permutation, cache slots, or a piece whose offset is known only on its device.
      document_multiple: static promise. Every document of every row starts at a row index divisible by this number,
        and within a document positions and rows count up together. 1 promises nothing; 0 says that documents start at
        row 0 only (one document per row, padding after it). Chunks counted by document then have borders at known rows.
      unbroken: static promise. Every batch row is of one document without padding, in which positions and rows differ
        by a constant: coordinates can be computed anywhere and need not travel.
      zigzag: static promise. The places are rows `0 … T-1` in the zigzag order of `context.layout` over this many
        pieces; `first_row` is then `None`.
    """

    positions: Array
    segments: Array
    rows: Array
    offsets: Array | None = None
    spreads: Array | None = None
    first_row: int | None = flax.struct.field(pytree_node=False, default=None)
    document_multiple: int = flax.struct.field(pytree_node=False, default=1)
    unbroken: bool = flax.struct.field(pytree_node=False, default=False)
    zigzag: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.positions.shape

    @classmethod
    def single(cls, batch: int, length: int, *, start: int = 0) -> TokenInfo:
        """One document per row, unpadded: positions `start … start + length - 1` at rows of the same number."""
        rows = jnp.broadcast_to(jnp.arange(start, start + length, dtype=jnp.int32), (batch, length))
        return cls(rows, jnp.ones_like(rows), rows, first_row=start, document_multiple=0, unbroken=True)

    @classmethod
    def spans(cls, starts: Array, widths: Array) -> TokenInfo:
        """One document per row whose entries stand for runs of tokens: `starts … starts + widths - 1`, int32 `[B, T]`.

        An entry is centred at `start + (width - 1) / 2` with the spread of equal weights, `sqrt((width^2 - 1) / 12)`.
        """
        starts, twice = jnp.asarray(starts, jnp.int32), jnp.asarray(widths, jnp.int32) - 1
        rows = jnp.broadcast_to(jnp.arange(starts.shape[1], dtype=jnp.int32), starts.shape)
        spreads = jnp.sqrt((twice * (twice + 2)).astype(jnp.float32) / 12)
        offsets = (twice % 2).astype(jnp.float32) / 2
        return cls(starts + twice // 2, jnp.ones_like(rows), rows, offsets, spreads, first_row=0)

    def take(self, index, axis: int = 1) -> TokenInfo:
        """The coordinates of a selection of places (any order). Promises about the order of places are dropped."""
        return self.map(lambda x: jnp.take(x, index, axis=axis)).replace(first_row=None, zigzag=None)

    def tied_to(self, x: Array) -> TokenInfo:
        """The same coordinates, to be had only together with `x`.

        In a loop over layers coordinates are constants, and when jax differentiates the loop it takes what depends on
        constants alone out of it: of attention, the masks of all tiles, stored all at the same time. Tied to
        something that changes from layer to layer they stay where they are used.
        """
        return jax.lax.optimization_barrier((self, x.reshape(-1)[0]))[0]

    def map(self, function) -> TokenInfo:
        """The same promises with `function` applied to each of the arrays."""
        return jax.tree.map(function, self)


@flax.struct.dataclass
class Batch:
    """What one training or scoring step reads.

    Attributes:
      tokens: int32 `[B, T]`, inputs.
      targets: int32 `[B, T]`, the token that follows each input within the same document.
      weights: float32 `[B, T]`, weight of each target's loss; 0 at padding, at the last token of a document and
        wherever a task asks for no loss.
      info: coordinates of `tokens`.
    """

    tokens: Array
    targets: Array
    weights: Array
    info: TokenInfo


DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Precision:
    """Number formats of a model: `params` are stored, `compute` is what matrix products and activations use.

    Softmax, norms, rotations, temperatures, losses and the accumulators of attention are float32 whatever is said here.
    """

    params: DType = "float32"
    compute: DType = "float32"
