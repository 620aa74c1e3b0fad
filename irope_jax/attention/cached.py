"""Attention of a few queries to the slots of a cache: a fold over blocks of slots, read where they lie.

Slots are in any order and some are empty; coordinates decide who sees whom. Blocks that no query sees are not read, and
none beyond the last slot in use. Nothing is differentiable: nothing is trained this way.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from irope_jax.attention.mask import MaskSpec, allowed
from irope_jax.attention.partial import Partial
from irope_jax.attention.stored import Stored
from irope_jax.core.types import PAD_SEGMENT, Array, TokenInfo

SCORES = 2**20
"""Scores of a block, over all rows and heads: 4 MiB of float32."""

FEWEST, MOST = 256, 4096
"""Slots of a block."""

QUERIES = 128
"""Queries of a row that are folded at a time."""

FLOOR, HIDDEN = -1e20, -1e30
"""Running maxima start at the one, scores of pairs that must not see each other are the other: weight exactly 0."""


def partial_cached(
    q_BTNH: Array,
    keys: Stored,
    values: Stored,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    *,
    scale: float,
    slopes: Array | None = None,
    repeat: int | Array = 0,
    block: int | None = None,
) -> Partial:
    """Unfinished attention of all queries to the slots of one layer.

    Args:
      q_BTNH: queries, already rotated.
      keys, values: of R layers, `[R, B, K, S, H]`.
      q_info, k_info: coordinates `[B, T]` and `[B, S]`.
      scale: factor on the scores.
      slopes: float32 `[N]`, ALiBi: adds `-slope * (row_q - row_k)`.
      repeat: which layer.
      block: slots read at a time; None chooses.
    """
    b, t = q_BTNH.shape[:2]
    if t <= QUERIES:
        return _few(q_BTNH, keys, values, q_info, k_info, mask, scale, slopes, repeat, block)
    short = -t % QUERIES
    pad = lambda x: jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
    split = lambda x: jnp.moveaxis(pad(x).reshape(b, -1, QUERIES, *x.shape[2:]), 1, 0)
    info = TokenInfo(*(split(x) for x in (q_info.positions, q_info.segments, q_info.rows)))  # padding is segment 0
    few = lambda it: _few(it[0], keys, values, it[1], k_info, mask, scale, slopes, repeat, block)
    found = lax.map(few, (split(q_BTNH), info))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, t + short, *x.shape[3:])[:, :t], found)


def _few(q_BTNH, keys, values, q_info, k_info, mask, scale, slopes, repeat, block) -> Partial:
    (b, t, n, h), kv, s = q_BTNH.shape, keys.heads, keys.slots
    g = n // kv
    block = min(s, block or max(FEWEST, min(MOST, 2 ** ((SCORES // (b * n * t)) or 1).bit_length() // 2)))
    q_BKMH = q_BTNH.reshape(b, t, kv, g, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, g * t, h)
    slope = None if slopes is None else slopes.astype(jnp.float32).reshape(kv, g, 1, 1)

    def fold(start, info, seen_BTS, sums):
        out, top, total = sums
        k = keys.read(repeat, start, block)
        score = scale * jnp.einsum("bkmh,bksh->bkms", q_BKMH.astype(k.dtype), k, preferred_element_type=jnp.float32)
        score = score.reshape(b, kv, g, t, block)
        if slope is not None:
            back = (q_info.rows[:, :, None] - info.rows[:, None, :]).astype(jnp.float32)
            score -= slope * back[:, None, None]
        score = jnp.where(seen_BTS[:, None, None], score, HIDDEN).reshape(b, kv, g * t, block)
        new_top = jnp.maximum(top, jnp.max(score, axis=-1))
        weight, shrink = jnp.exp(score - new_top[..., None]), jnp.exp(top - new_top)
        v = values.read(repeat, start, block)
        fresh = jnp.einsum("bkms,bksh->bkmh", weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out * shrink[..., None] + fresh, new_top, total * shrink + jnp.sum(weight, axis=-1)

    sums = (
        jnp.zeros((b, kv, g * t, h), jnp.float32),
        jnp.full((b, kv, g * t), FLOOR, jnp.float32),
        jnp.zeros((b, kv, g * t), jnp.float32),
    )
    if block == s:
        seen = allowed(mask, q_info, k_info)
        sums = lax.cond(jnp.any(seen), lambda sums: fold(0, k_info, seen, sums), lambda sums: sums, sums)
    else:

        def visit(j, sums):
            start = jnp.minimum(j * block, s - block)  # the last block reaches back over its neighbour
            cut = lambda x: lax.dynamic_slice_in_dim(x, start, block, 1)
            info = TokenInfo(cut(k_info.positions), cut(k_info.segments), cut(k_info.rows))
            seen = allowed(mask, q_info, info) & (start + jnp.arange(block) >= j * block)
            return lax.cond(jnp.any(seen), lambda sums: fold(start, info, seen, sums), lambda sums: sums, sums)

        used = jnp.max(jnp.where(k_info.segments != PAD_SEGMENT, jnp.arange(1, s + 1, dtype=jnp.int32), 0))
        used = jnp.where(jnp.any(q_info.segments != PAD_SEGMENT), used, 0)
        sums = lax.fori_loop(0, -(-used // block), visit, sums)
    out, top, total = sums
    # back to query order: `[b, k, (g, t), …]` is `[b, t, (k, g), …]`
    order = lambda x: jnp.moveaxis(x.reshape(b, kv, g, t, *x.shape[3:]), 3, 1).reshape(b, t, n, *x.shape[3:])
    return Partial(order(out), jnp.where(order(total) > 0, order(top), -jnp.inf), order(total))
