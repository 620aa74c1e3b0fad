"""Heads for sequence: devices that each hold all heads of a piece exchange them for some heads of a longer piece.

Everything here runs inside `shard_map`: shapes are per device (Ulysses, Jacobs et al. 2023, section 3). The exchange is
among groups of `group` neighbouring devices of the context axis. A group's pieces together are a piece of the same
layout over `parts / group` groups, so what follows is attention on one device if there is one group, and a ring over
the groups otherwise. Query heads stay with their key heads: `group` divides the number of key heads.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jax import lax

from irope_jax.attention.api import attend
from irope_jax.attention.mask import MaskSpec
from irope_jax.context.coordinates import Coordinates
from irope_jax.context.layout import ContextLayout
from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array, TokenInfo


def group_layout(layout: ContextLayout, group: int) -> ContextLayout:
    """The layout of what groups of `group` neighbours hold together; row order if one group holds all."""
    if layout.parts % group:
        raise ConfigError("group", group, f"must divide the {layout.parts} devices along the context axis")
    return ContextLayout(layout.kind, layout.parts // group)


def heads_for_sequence(x: Array, layout: ContextLayout, group: int, axis_name: str = "context") -> Array:
    """`[B, s, heads, H]` of this device to `[B, group * s, heads / group, H]` of its group, ordered by `group_layout`.

    Member `i` of a group gets the `i`-th slice of the heads. Sends `(group - 1) / group` of `x`.
    """
    _check(x.shape[2], group)
    groups = _groups(layout, group)
    x = lax.all_to_all(x, axis_name, split_axis=2, concat_axis=1, axis_index_groups=groups, tiled=True)
    return _join(x, layout, group)


def sequence_for_heads(x: Array, layout: ContextLayout, group: int, axis_name: str = "context") -> Array:
    """Undoes `heads_for_sequence`."""
    groups = _groups(layout, group)
    x = _part(x, layout, group)
    return lax.all_to_all(x, axis_name, split_axis=1, concat_axis=2, axis_index_groups=groups, tiled=True)


def group_slopes(slopes: Array | None, group: int, axis_name: str = "context") -> Array | None:
    """The slopes `[N / group]` of the heads that this device gets."""
    if slopes is None:
        return None
    heads = slopes.shape[0] // group
    return lax.dynamic_slice(jnp.asarray(slopes), (lax.axis_index(axis_name) % group * heads,), (heads,))


def group_info(
    info: TokenInfo, mask: MaskSpec, layout: ContextLayout, group: int, axis_name: str = "context"
) -> TokenInfo:
    """Coordinates `[B, group * s]` of the group's piece.

    What can be computed from promises is; the rest is gathered. If one group holds the whole sequence it stands in row
    order and is promised to. Positions are right only if the mask counts by them.
    """
    combined = group_layout(layout, group)
    cargo = Coordinates.of(info, layout, mask).cargo(info)
    gathered = {
        name: lax.all_gather(x, axis_name, axis=1, axis_index_groups=_groups(layout, group), tiled=True)
        for name, x in cargo.items()
    }
    gathered = {name: _join(x, layout, group) for name, x in gathered.items()}
    held = replace(Coordinates.of(info, combined, mask), length=group * info.shape[1])
    whole = held.unload(gathered, lax.axis_index(axis_name) // group, info)
    return whole.replace(first_row=0) if combined.parts == 1 else whole


def attend_all_to_all(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    *,
    layout: ContextLayout,
    group: int,
    slopes: Array | None = None,
    axis_name: str = "context",
    inner=attend,
    **options,
) -> Array:
    """Attention over the whole sequence, each device doing some of the heads.

    Args:
      q_BTNH, k_BTKH, v_BTKH: places of this device, laid out by `layout`; `group` must divide K.
      q_info, k_info: their coordinates; the same tokens.
      slopes: of all N heads.
      inner: attention of a group's piece, called as `inner(q, k, v, q_info, k_info, mask, slopes=slopes, **options)`.
        With one group `attention.attend` itself; with more a ring over the groups, which stand `group` devices apart.
      options: passed to `inner`.

    Returns:
      `[B, T, N, H]` as `inner` gives it, back in this device's places.
    """
    there = [heads_for_sequence(x, layout, group, axis_name) for x in (q_BTNH, k_BTKH, v_BTKH)]
    info = group_info(q_info, mask, layout, group, axis_name)
    k_info = info if k_info is q_info else group_info(k_info, mask, layout, group, axis_name)
    out = inner(*there, info, k_info, mask, slopes=group_slopes(slopes, group, axis_name), **options)
    return sequence_for_heads(out, layout, group, axis_name)


def _check(heads: int, group: int) -> None:
    if heads % group:
        raise ConfigError("group", group, f"does not divide {heads} heads; use a divisor of the number of key heads")


def _groups(layout: ContextLayout, group: int) -> list[list[int]] | None:
    parts = layout.parts
    return None if group == parts else [list(range(first, first + group)) for first in range(0, parts, group)]


def _join(x: Array, layout: ContextLayout, group: int) -> Array:
    """Pieces of the members, one after the other, to the order of `group_layout`: low runs up, high runs down."""
    if layout.runs_per_piece == 1:
        return x
    members = x.reshape(x.shape[0], group, 2, -1, *x.shape[2:])
    return jnp.concatenate([members[:, :, 0], members[:, ::-1, 1]], axis=1).reshape(x.shape)


def _part(x: Array, layout: ContextLayout, group: int) -> Array:
    """Undoes `_join`."""
    if layout.runs_per_piece == 1:
        return x
    runs = x.reshape(x.shape[0], 2, group, -1, *x.shape[2:])
    return jnp.stack([runs[:, 0], runs[:, 1, ::-1]], axis=2).reshape(x.shape)
