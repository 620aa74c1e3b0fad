"""Decoding with the cache cut along the context axis: keys stay where they are, what was found of them is merged.

Everything here runs inside `shard_map`: shapes are per device. Queries are few and whole on every device; what is sent
does not depend on the length of the cache. Not differentiable: nothing is trained this way.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from irope_jax.attention.blockwise import partial_blockwise
from irope_jax.attention.mask import MaskSpec
from irope_jax.attention.partial import Partial, finish
from irope_jax.attention.reference import partial_reference
from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array, TokenInfo

KERNELS = {"blockwise": partial_blockwise, "reference": partial_reference}


def attend_split_keys(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    *,
    scale: float | None = None,
    slopes: Array | None = None,
    impl: str | None = None,
    axis_name: str = "context",
) -> Array:
    """Attention of queries that every device holds to keys of which each holds a part.

    Sends `2 (P-1)/P * N (H + 2) * 4` bytes per device and query.

    Args:
      q_BTNH: the same on all devices of the axis.
      k_BSKH, v_BSKH: this device's slots of the cache, in any order; empty slots are padding.
      q_info, k_info: their coordinates. Promises about the order of the keys hold for the whole cache, not for a
        part of it, and are dropped.
      impl: `blockwise` (also `None`) or `reference`.

    Returns:
      `[B, T, N, H]` in the type of the queries, the same on all devices of the axis; 0 where nothing is visible.

    Raises:
      ConfigError: an implementation that cannot give partial results.
    """
    if impl is not None and impl not in KERNELS:
        raise ConfigError("impl", impl, f"decoding over cut keys is done by one of: {', '.join(KERNELS)}")
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else float(scale)
    k_info = k_info.replace(first_row=None, zigzag=None)
    part = KERNELS[impl or "blockwise"](q_BTNH, k_BSKH, v_BSKH, q_info, k_info, mask, scale=scale, slopes=slopes)
    return finish(merge_across(part, axis_name), q_BTNH.dtype)


def merge_across(part: Partial, axis_name: str) -> Partial:
    """`attention.partial.merge` of the partials of all devices along a mesh axis; the same on all of them."""
    top = lax.pmax(part.max, axis_name)
    shrink = jnp.exp(part.max - jnp.where(top == -jnp.inf, 0.0, top))
    out, total = lax.psum((part.out * shrink[..., None], part.sum * shrink), axis_name)
    return Partial(out, top, total)
