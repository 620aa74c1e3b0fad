"""Every device gathers all keys: the simplest way, the oracle of the others, and the cheaper one where keys are few.

Memory is that of the whole sequence's keys on every device, in every layer. Runs inside `shard_map`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from irope_jax.attention.api import attend
from irope_jax.attention.mask import MaskSpec
from irope_jax.context.coordinates import Coordinates
from irope_jax.context.layout import ContextLayout
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
    layout: ContextLayout | None,
    parts: int,
    axis: str = "context",
) -> Array:
    """Attention output `[B, T, N, H]` of this device's queries to the keys of all devices of the axis.

    Gradients of keys and values are summed on their way home in the format of the keys.

    Args:
      q_info, k_info: coordinates of this device's tokens, without promises of their order.
      layout, parts: order of the tokens over so many devices; `None` if unknown.
      others: as for `attention.attend`.
    """
    gather = lambda x: lax.all_gather(x, axis, axis=1, tiled=True)
    coordinates = Coordinates.of(k_info, layout, mask)
    cargo = jax.tree.map(gather, coordinates.cargo(k_info))
    if layout is not None:
        rows = jnp.concatenate([coordinates.rows(piece) for piece in range(parts)])
        cargo["rows"] = jnp.broadcast_to(rows, (k_info.shape[0], len(rows)))
    everywhere = coordinates.unload(cargo, None, k_info)
    k_all, v_all = gather(k_BSKH), gather(v_BSKH)
    return attend(q_BTNH, k_all, v_all, q_info, everywhere, mask, scale=scale, slopes=slopes, impl=impl)
