"""The definition of attention: dense, float32, one page. Memory `B N T S`: judge others by it, do not train with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from irope_jax.attention.mask import MaskSpec, allowed
from irope_jax.attention.partial import Partial, finish
from irope_jax.core.types import Array, TokenInfo


def partial_reference(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    *,
    scale: float,
    slopes: Array | None = None,
) -> Partial:
    """Unfinished attention of all queries to all keys they may see. Differentiable, also where a query sees nothing."""
    b, t, n, h = q_BTNH.shape
    kv = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.astype(jnp.float32).reshape(b, t, kv, n // kv, h)
    score = scale * jnp.einsum("BTKGH,BSKH->BTKGS", q_BTKGH, k_BSKH.astype(jnp.float32), precision="highest")
    if slopes is not None:
        back = (q_info.rows[:, :, None] - k_info.rows[:, None, :]).astype(jnp.float32)
        score -= slopes.astype(jnp.float32).reshape(kv, n // kv, 1) * back[:, :, None, None, :]
    seen = allowed(mask, q_info, k_info)[:, :, None, None, :]
    top = jax.lax.stop_gradient(jnp.max(jnp.where(seen, score, -jnp.inf), axis=-1))
    base = jnp.where(top == -jnp.inf, 0.0, top)[..., None]
    weight = jnp.where(seen, jnp.exp(jnp.where(seen, score - base, 0.0)), 0.0)
    out = jnp.einsum("BTKGS,BSKH->BTKGH", weight, v_BSKH.astype(jnp.float32), precision="highest")
    return Partial(out.reshape(b, t, n, h), top.reshape(b, t, n), weight.sum(-1).reshape(b, t, n))


def attend_reference(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, mask, *, scale, slopes=None) -> Array:
    """Attention output `[B, T, N, H]` in the type of the queries."""
    partial = partial_reference(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, mask, scale=scale, slopes=slopes)
    return finish(partial, q_BTNH.dtype)
