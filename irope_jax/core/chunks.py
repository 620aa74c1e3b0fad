"""Work on a batch of tokens a chunk at a time, so that what a chunk needs in between never exists for all tokens.

Belongs here: how `[B, T, ...]` is cut into chunks and put together again. What is done with a chunk belongs elsewhere
(the loss head, the feed-forward part): anything that treats tokens one by one.

A chunk is not a stretch of the sequence but every n-th token of it: a sequence that is split over devices stays split,
each device working on tokens of its own in every chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array

_PLACES, _CHUNKS = 3, 4


@dataclass(frozen=True)
class TokenChunks:
    """`[B, T, ...]` seen as `[u, b, s, t, n, ...]`: u x s pieces, and n chunks that take b x t tokens of every piece.

    Attributes:
      batch, length: B and T.
      shards: (u, s), into how many equal pieces devices split the batch and the sequence. Only a hint to keep sums per
        piece until the end; any divisors give the same results.
      count: n, the number of chunks.
    """

    batch: int
    length: int
    shards: tuple[int, int]
    count: int

    @classmethod
    def of(cls, batch: int, length: int, chunk: int, shards: tuple[int, int] = (1, 1)) -> TokenChunks:
        """Chunks of at most `chunk` tokens of each piece (at least one place of each batch row).

        Raises:
          ConfigError: a chunk below 1, or shards that do not divide batch and length.
        """
        if chunk < 1:
            raise ConfigError("chunk", chunk, "tokens of a device that are worked on at a time; use 1 or more, or None")
        if batch % shards[0] or length % shards[1]:
            raise ConfigError("shards", shards, f"must divide batch and length, {batch} and {length}")
        piece = length // shards[1]
        fewest = max(1, min(piece, math.ceil(batch // shards[0] * piece / chunk)))
        # A divisor of the length needs no padding: look for one before padding to a multiple.
        exact = (n for n in range(fewest, min(2 * fewest, piece) + 1) if piece % n == 0)
        return cls(batch, length, tuple(shards), next(exact, fewest))

    def split(self, x: Array) -> jax.Array:
        """`[B, T, ...]` to `[u, b, s, t, n, ...]`; a length that n does not divide is padded with zeros."""
        u, s = self.shards
        x = jnp.reshape(x, (u, self.batch // u, s, self.length // s, *x.shape[2:]))
        missing = -x.shape[_PLACES] % self.count
        if missing:
            x = jnp.pad(x, [(0, missing if axis == _PLACES else 0) for axis in range(x.ndim)])
        return x.reshape(*x.shape[:_PLACES], x.shape[_PLACES] // self.count, self.count, *x.shape[_PLACES + 1 :])

    def join(self, x: jax.Array) -> jax.Array:
        """`[u, b, s, t, n, ...]` back to `[B, T, ...]`."""
        x = x.reshape(*x.shape[:_PLACES], x.shape[_PLACES] * self.count, *x.shape[_CHUNKS + 1 :])
        x = x[:, :, :, : self.length // self.shards[1]]
        return x.reshape(self.batch, self.length, *x.shape[_PLACES + 1 :])

    def take(self, x: jax.Array, i: Any) -> jax.Array:
        """Chunk i of a split array: `[u, b, s, t, ...]`."""
        return lax.dynamic_index_in_dim(x, i, _CHUNKS, keepdims=False)

    def put(self, x: jax.Array, value: jax.Array, i: Any) -> jax.Array:
        """A split array with chunk i replaced."""
        return lax.dynamic_update_index_in_dim(x, value.astype(x.dtype), i, _CHUNKS)

    def fold(self, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """`carry = body(carry, i)` for every chunk i; a single chunk needs no loop."""
        if self.count == 1:
            return body(carry, 0)
        return lax.scan(lambda c, i: (body(c, i), None), carry, jnp.arange(self.count))[0]
