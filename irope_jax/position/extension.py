"""Attention of a trained RoPE model beyond its length without training: distances it never saw are never asked for.

Each method says of a layer's attention that it is several attentions over disjoint sets of keys, in each of which
queries and keys are rotated by other positions; their unfinished softmaxes are merged. A set of keys is said by
coordinates and the masks there are: a query that pretends to stand at an earlier row sees what is visible from there.

Only positions and coordinates belong here. Which mask a `Part` means and how parts are merged is said in `model`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import jax.numpy as jnp

from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array, TokenInfo
from irope_jax.position.rotary import RoPE


@dataclass(frozen=True)
class Part:
    """Attention to some of the keys.

    Attributes:
      q_positions, k_positions: int32 `[B, T]`, what queries and keys are rotated by.
      q_info, k_info: coordinates that decide who sees whom.
      window: a query sees at most this many rows back.
      chunk: a query sees its own chunk of this many positions.
    """

    q_positions: Array
    k_positions: Array
    q_info: TokenInfo
    k_info: TokenInfo
    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class SelfExtend:
    """Near keys at their exact distance, far ones in groups (arXiv 2401.01325).

    Distance d of positions i and j is `d` where `d < window`, else
    `i // group - j // group + window - window // group`.
    The longest text is about `(L - window) * group` for a model trained at L.

    Attributes:
      window: exact distances.
      group: positions that share a number far away.
      rope: the rotation the model was trained with.
    """

    window: int
    group: int
    rope: RoPE = field(default_factory=RoPE)
    kind: ClassVar[str] = "self_extend"

    def __post_init__(self):
        _check_positive(self, "window", "group")

    def parts(self, info: TokenInfo) -> tuple[Part, ...]:
        at = info.positions
        grouped = at // self.group
        far = _from_earlier(info, self.window)
        return (
            Part(at, at, info, info, window=self.window),
            Part(grouped + (self.window - self.window // self.group), grouped, far, info),
        )


@dataclass(frozen=True)
class ReRoPE:
    """Distances up to the window, and the window's for everything farther (Su 2023).

    Attributes:
      window: the greatest distance.
      rope: the rotation the model was trained with.
    """

    window: int
    rope: RoPE = field(default_factory=RoPE)
    kind: ClassVar[str] = "rerope"

    def __post_init__(self):
        _check_positive(self, "window")

    def parts(self, info: TokenInfo) -> tuple[Part, ...]:
        at, start = info.positions, jnp.zeros_like(info.positions)
        far = _from_earlier(info, self.window)
        return (Part(at, at, info, info, window=self.window), Part(start + self.window, start, far, info))


@dataclass(frozen=True)
class DualChunk:
    """Dual chunk attention (arXiv 2402.17463): exact within a chunk, nearly so into the one before, constant beyond.

    Keys stand at `j % chunk`. A query stands at `i % chunk` for its own chunk, at `min(i % chunk + chunk, farthest)`
    for the chunk before, and at `farthest` for all older ones.

    Attributes:
      chunk: positions of a chunk; the authors take 3/4 of the trained length less the local window.
      farthest: the greatest position a query takes, below the trained length. `farthest - chunk` is how far into the
        chunk before distances are exact.
      rope: the rotation the model was trained with.
    """

    chunk: int
    farthest: int
    rope: RoPE = field(default_factory=RoPE)
    kind: ClassVar[str] = "dual_chunk"

    def __post_init__(self):
        _check_positive(self, "chunk")
        if self.farthest < self.chunk:
            raise ConfigError("farthest", self.farthest, f"use chunk={self.chunk} or more, past the chunk before")

    def parts(self, info: TokenInfo) -> tuple[Part, ...]:
        at = info.positions % self.chunk
        before = jnp.minimum(at + self.chunk, self.farthest)
        own = at + 1  # back to the last token of the chunk before
        return (
            Part(at, at, info, info, chunk=self.chunk),
            Part(before, at, _from_earlier(info, own, positions_too=True), info, chunk=self.chunk),
            Part(jnp.full_like(at, self.farthest), at, _from_earlier(info, own + self.chunk), info),
        )


def _from_earlier(info: TokenInfo, back: int | Array, positions_too: bool = False) -> TokenInfo:
    """Coordinates of queries that stand `back` rows before their own."""
    first = info.first_row - back if isinstance(back, int) and info.first_row is not None else None
    moved = info.replace(rows=info.rows - back, first_row=first, document_multiple=1, unbroken=False, zigzag=None)
    return moved.replace(positions=info.positions - back) if positions_too else moved


def _check_positive(spec, *names: str) -> None:
    for name in names:
        if getattr(spec, name) < 1:
            raise ConfigError(name, getattr(spec, name), "must be at least 1")
