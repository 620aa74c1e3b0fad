"""Coordinates of keys that lie on another device: computed where promises allow it, sent along where not.

Rows follow from the layout; positions and segments too if rows are one unbroken document. What is left travels beside
the keys. Everything here runs inside `shard_map`; shapes are per device.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from irope_jax.attention.mask import Chunked, MaskSpec
from irope_jax.context.layout import ContextLayout
from irope_jax.core.types import Array, TokenInfo


@dataclass(frozen=True)
class Coordinates:
    """How the coordinates of any piece are had on any device.

    Attributes:
      layout: where rows lie; `None` if that is not known.
      length: places per piece.
      positions: whether the mask looks at positions.
      unbroken: promise of `TokenInfo`.
    """

    layout: ContextLayout | None
    length: int
    positions: bool
    unbroken: bool

    @classmethod
    def of(cls, info: TokenInfo, layout: ContextLayout | None, mask: MaskSpec) -> Coordinates:
        counted = isinstance(mask, Chunked) and mask.by == "document"
        return cls(layout, info.shape[1], counted, info.unbroken and layout is not None)

    def cargo(self, info: TokenInfo) -> dict[str, Array]:
        """What must travel with the keys."""
        if self.unbroken:
            return {}
        names = ["segments"] + ["positions"] * self.positions + ["rows"] * (self.layout is None)
        return {name: getattr(info, name) for name in names}

    def rows(self, piece) -> Array:
        """int32 `[length]`: rows at the places of a piece, which may be traced."""
        runs = self.layout.runs(piece)
        n = self.length // len(runs)
        return jnp.concatenate([a * n + jnp.arange(n, dtype=jnp.int32) for a in runs])

    def unload(self, cargo: dict[str, Array], piece, like: TokenInfo) -> TokenInfo:
        """Coordinates `[B, length]` of a piece from its cargo; `like` are those of a piece in the same batch rows."""
        rows = cargo.get("rows")
        if rows is None:
            rows = jnp.broadcast_to(self.rows(piece), (like.shape[0], self.length))
        if self.unbroken:
            positions = rows + (like.positions[:, :1] - like.rows[:, :1])
            segments = jnp.broadcast_to(like.segments[:, :1], rows.shape)
        else:
            positions, segments = cargo.get("positions", rows), cargo["segments"]
        return TokenInfo(positions, segments, rows, document_multiple=like.document_multiple, unbroken=self.unbroken)
