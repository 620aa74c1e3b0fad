"""What attention looks at: how far back, how much at the first tokens, how evenly. Exact, a block of queries at a time.

The probabilities of a whole sequence never exist: those of `block` queries do, and what is kept of each query is a few
numbers per head. Means over positions, heads and layers belong to who asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from irope_jax.attention.mask import MaskSpec, allowed, phase_positions
from irope_jax.attention.parts import KeySet
from irope_jax.core.types import Array, TokenInfo


class Attending(NamedTuple):
    """All that the probabilities of one layer are made from.

    Attributes:
      info: coordinates of the tokens, which are queries and keys at once.
      mask: of the layer.
      sets: queries and keys, rotated, normed and scaled by temperature; several where attention has several parts.
      scale: factor on `q·k`.
      slopes: float32 `[N]` of ALiBi, or None.
    """

    info: TokenInfo
    mask: MaskSpec
    sets: tuple[KeySet, ...]
    scale: float
    slopes: Array | None = None


Observer = Callable[[Attending], Any]
"""Makes of the attention of a layer what somebody wants to know about it: a tree of arrays."""


@flax.struct.dataclass
class AttentionStatistics:
    """Of each query, its probabilities `p` over the keys it sees. Padding has zeros everywhere.

    Attributes:
      distance: float32 `[B, T, N]`, `sum p * (row of query - row of key)`, in tokens.
      sink_mass: float32 `[B, T, N]`, `sum p` over the first tokens of the document (on chunked layers, of the chunk).
      recent_mass: float32 `[B, T, N]`, `sum p` over the last tokens, the query's own included.
      entropy: float32 `[B, T, N]`, `- sum p log p` in nats.
      visible: int32 `[B, T]`, how many keys the query sees; even attention has the entropy `log(visible)`.
      even_distance, even_sink_mass, even_recent_mass: float32 `[B, T]`, what attention of `p = 1 / visible` would have.
    """

    distance: Array
    sink_mass: Array
    recent_mass: Array
    entropy: Array
    visible: Array
    even_distance: Array
    even_sink_mass: Array
    even_recent_mass: Array


def attention_statistics(of: Attending, *, sinks: int, recent: int, block: int) -> AttentionStatistics:
    """Statistics of every query; memory `B N block S`, where S is the sequence, or `block` and the reach of the mask.

    Args:
      of: the layer.
      sinks: how many first tokens count as such.
      recent: how many last tokens count as such, the query included.
      block: queries at a time.
    """
    length = of.info.shape[1]
    block = min(block, length)
    reach = of.mask.reach
    # Where rows are in order, all that a block of queries of a local layer sees lies right before it.
    near = of.info.first_row is not None and len(of.sets) == 1 and reach is not None and reach + block - 1 < length
    ahead, width = (reach - 1, reach + block - 1) if near else (0, length)
    behind = -length % block
    after = behind if near else 0
    sets = [
        KeySet(
            _padded(s.q_BTNH, 0, behind), _padded(s.k_BSKH, ahead, after),
            _padded_info(s.q_info, 0, behind), _padded_info(s.k_info, ahead, after), s.mask,
        )
        for s in of.sets
    ]  # fmt: skip
    q_rows, k_rows = _padded(of.info.rows, 0, behind), _padded(of.info.rows, ahead, after)
    first = _padded(phase_positions(of.mask, of.info) < sinks, ahead, after)

    def of_block(start: Array) -> AttentionStatistics:
        def queries(x):
            return jax.lax.dynamic_slice_in_dim(x, start, block, axis=1)

        def keys(x):
            return jax.lax.dynamic_slice_in_dim(x, start, width, axis=1) if near else x

        seen_BTS, score_BKGTS = None, None
        for s in sets:
            q_info, k_info = s.q_info.map(queries), s.k_info.map(keys)
            score = of.scale * _products(queries(s.q_BTNH).astype(jnp.float32), keys(s.k_BSKH).astype(jnp.float32))
            if of.slopes is not None:
                back = (q_info.rows[:, :, None] - k_info.rows[:, None, :]).astype(jnp.float32)
                slopes_KG = jnp.asarray(of.slopes, jnp.float32).reshape(score.shape[1:3])
                score -= slopes_KG[:, :, None, None] * back[:, None, None]
            mine = allowed(s.mask, q_info, k_info)
            before = -jnp.inf if score_BKGTS is None else score_BKGTS
            score_BKGTS = jnp.where(mine[:, None, None], score, before)
            seen_BTS = mine if seen_BTS is None else seen_BTS | mine
        return _of_scores(
            score_BKGTS, seen_BTS, queries(q_rows)[:, :, None] - keys(k_rows)[:, None, :], keys(first), recent
        )

    blocks = jax.lax.map(of_block, jnp.arange(0, length + behind, block))

    def together(x):
        """`[blocks, B, block, ...]` to `[B, T, ...]`."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(together, blocks)


def _products(q_BTNH: Array, k_BSKH: Array) -> Array:
    """`q·k` as `[B, K, G, T, S]`: query head n reads key head `n // G`."""
    b, t, n, h = q_BTNH.shape
    kv = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(b, t, kv, n // kv, h)
    return jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, precision="highest")


def _of_scores(score_BKGTS, seen_BTS, back_BTS, first_BS, recent: int) -> AttentionStatistics:
    seen = seen_BTS[:, None, None]
    top = jnp.max(score_BKGTS, axis=-1, keepdims=True)
    above = jnp.where(seen, score_BKGTS - jnp.where(top == -jnp.inf, 0.0, top), 0.0)
    weight = jnp.where(seen, jnp.exp(above), 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    total = jnp.where(total > 0, total, 1.0)  # a query that sees nothing: all weights are 0
    p_BKGTS = weight / total
    visible_BT = jnp.sum(seen_BTS, axis=-1, dtype=jnp.int32)
    even_BTS = seen_BTS / jnp.maximum(visible_BT, 1)[..., None].astype(jnp.float32)
    far_BTS = back_BTS.astype(jnp.float32)
    last_BTS = back_BTS < recent

    def heads_last(x_BKGT):
        return jnp.moveaxis(x_BKGT.reshape(x_BKGT.shape[0], -1, x_BKGT.shape[-1]), 1, 2)

    def even(value_BTS):
        return jnp.sum(even_BTS * value_BTS, axis=-1)

    return AttentionStatistics(
        distance=heads_last(jnp.sum(p_BKGTS * far_BTS[:, None, None], axis=-1)),
        sink_mass=heads_last(jnp.sum(p_BKGTS * first_BS[:, None, None, None], axis=-1)),
        recent_mass=heads_last(jnp.sum(p_BKGTS * last_BTS[:, None, None], axis=-1)),
        entropy=heads_last(jnp.log(total[..., 0]) - jnp.sum(p_BKGTS * above, axis=-1)),
        visible=visible_BT,
        even_distance=even(far_BTS),
        even_sink_mass=even(first_BS[:, None]),
        even_recent_mass=even(last_BTS),
    )


def _padded(x: Array, ahead: int, behind: int) -> Array:
    return jnp.pad(x, [(0, 0), (ahead, behind)] + [(0, 0)] * (x.ndim - 2))


def _padded_info(info: TokenInfo, ahead: int, behind: int) -> TokenInfo:
    """Padding around the tokens (segment 0), without promises of places."""
    plain = info.replace(first_row=None, document_multiple=1, unbroken=False, zigzag=None)
    return plain.map(lambda x: _padded(x, ahead, behind))
