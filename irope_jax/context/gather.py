"""Every device gathers all keys: the simplest way, the oracle of the others, and the cheaper one where keys are few.

Memory is that of the whole sequence's keys on every device, in every layer. Runs inside `shard_map`.
"""

from __future__ import annotations

import jax
from jax import lax

from irope_jax.attention.api import attend
from irope_jax.attention.mask import MaskSpec
from irope_jax.core.types import Array, TokenInfo


def gather_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    *,
    scale: float,
    slopes: Array | None,
    impl: str | None,
    axis: str = "context",
) -> Array:
    """Attention output `[B, T, N, H]` of this device's queries to the keys of all devices of the axis.

    Gradients of keys and values are summed on their way home in the format of the keys.
    """
    gathered = jax.tree.map(lambda x: lax.all_gather(x, axis, axis=1, tiled=True), (k_BSKH, v_BSKH, k_info))
    q_info = q_info.replace(first_row=None, zigzag=None)
    k_all, v_all, k_info_all = gathered
    k_info_all = k_info_all.replace(first_row=None, zigzag=None)
    return attend(q_BTNH, k_all, v_all, q_info, k_info_all, mask, scale=scale, slopes=slopes, impl=impl)
