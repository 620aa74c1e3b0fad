"""The unfinished softmax, and how two of them become one.

Attention over a set of keys is a fold: each piece of keys gives a `Partial`, `merge` joins pieces in any order and
grouping, `finish` divides. Everything stays float32 until `finish`. Where the pieces come from is not known here.
"""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp

from irope_jax.core.types import Array


@flax.struct.dataclass
class Partial:
    """Attention of queries to a part of the keys, before the division (Milakov & Gimelshein 2018, section 3).

    Attributes:
      out: float32 `[B, T, N, H]`, sum over keys of `exp(score - max) * value`.
      max: float32 `[B, T, N]`, greatest score seen; `-inf` if nothing was seen.
      sum: float32 `[B, T, N]`, sum over keys of `exp(score - max)`; 0 if nothing was seen.
    """

    out: Array
    max: Array
    sum: Array

    @classmethod
    def empty(cls, batch: int, length: int, heads: int, width: int) -> Partial:
        """What a query knows before it has seen a key; the neutral element of `merge`."""
        shape = (batch, length, heads)
        return cls(jnp.zeros((*shape, width)), jnp.full(shape, -jnp.inf), jnp.zeros(shape))

    @property
    def log_sum_exp(self) -> Array:
        """float32 `[B, T, N]`: logarithm of the softmax's denominator; `-inf` if nothing was seen."""
        seen = self.sum > 0
        return jnp.where(seen, self.max + jnp.log(jnp.where(seen, self.sum, 1.0)), -jnp.inf)


def merge(a: Partial, b: Partial) -> Partial:
    """The partial of the union of two disjoint sets of keys. Associative and commutative up to rounding."""
    top = jnp.maximum(a.max, b.max)
    base = jnp.where(top == -jnp.inf, 0.0, top)
    scale_a, scale_b = jnp.exp(a.max - base), jnp.exp(b.max - base)
    return Partial(
        out=a.out * scale_a[..., None] + b.out * scale_b[..., None],
        max=top,
        sum=a.sum * scale_a + b.sum * scale_b,
    )


def finish(partial: Partial, dtype=jnp.float32) -> Array:
    """Attention output `[B, T, N, H]` in `dtype`; exactly 0 where a query saw nothing."""
    seen = partial.sum > 0
    return jnp.where(seen[..., None], partial.out / jnp.where(seen, partial.sum, 1.0)[..., None], 0.0).astype(dtype)
