"""Each run of rows with the rows before it: what a layer with a reach needs of other devices, and nothing more.

Everything here runs inside `shard_map`: shapes are per device. A device holds one run of consecutive rows (contiguous)
or two (zigzag); every run is attended on its own, as a batch row of its own, with its rows counted from its halo. So
the order of rows is known while tracing, whatever the layout, and blocks that nobody sees are left out as on one
device. A halo of 0 is the local case, and sends nothing. Which halo a mask needs is decided in `strategy`.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax

from irope_jax.attention.api import attend
from irope_jax.attention.mask import Chunked, MaskSpec
from irope_jax.context.coordinates import Coordinates
from irope_jax.context.layout import ContextLayout
from irope_jax.core.types import Array, TokenInfo


def fold_runs(x: Array, layout: ContextLayout) -> Array:
    """`[B, s, ...]` to `[B * runs, s / runs, ...]`: every run of the device a batch row of its own."""
    runs = layout.runs_per_piece
    return x.reshape(x.shape[0] * runs, x.shape[1] // runs, *x.shape[2:])


def with_halo(x: Array, layout: ContextLayout, halo: int, axis_name: str = "context") -> Array:
    """Every run of the device after the `halo` rows before it.

    Rows before row 0 are zeros; for `segments` that means padding. A halo may be longer than a run: whole runs come
    from the nearer devices and the exact tail from the farthest. Differentiable: gradients of what was received travel
    back and add up. Sends `halo` rows per run, less where the row begins or a run's predecessor is on the same device.

    Args:
      x: `[B, s, ...]`, the places of this device.
      layout: of the sequence.
      halo: rows before each run, at least 0.
      axis_name: mesh axis that cuts the sequence.

    Returns:
      `[B * runs, halo + s / runs, ...]`; runs of one batch row follow one another.
    """
    batch, length = x.shape[:2]
    runs = jnp.split(x, layout.runs_per_piece, axis=1)
    run = length // len(runs)
    parts = [[own] for own in runs]
    for distance in range(1, -(-halo // run) + 1):
        rows = min(run, halo - (distance - 1) * run)
        for part, received in zip(parts, _receive([own[:, run - rows :] for own in runs], layout, distance, axis_name)):
            part.insert(0, received)
    joined = jnp.stack([jnp.concatenate(part, axis=1) for part in parts], axis=1)
    return joined.reshape(batch * len(runs), halo + run, *x.shape[2:])


def _receive(tails: list[Array], layout: ContextLayout, distance: int, axis_name: str) -> list[Array]:
    """For each run of this device the tail of the run `distance` before it; zeros where there is none."""
    received = [jnp.zeros_like(tail) for tail in tails]
    for (source, target), pairs in _routes(layout, distance).items():
        received[target] += lax.ppermute(tails[source], axis_name, pairs)
    return received


def _routes(layout: ContextLayout, distance: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Who sends to whom: `(index of the sender's run, index of the receiver's) -> [(sender, receiver)]`.

    In zigzag low runs come from the device before, high runs from the device after, and where the row turns the
    predecessor of a high run is the low run of some device, perhaps of the same one.
    """
    routes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for receiver in range(layout.parts):
        for target, run in enumerate(layout.runs(receiver)):
            if run >= distance:
                sender, source = layout.holder(run - distance)
                routes.setdefault((source, target), []).append((sender, receiver))
    return routes


def attend_halo(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    *,
    scale: float | None = None,
    slopes: Array | None = None,
    impl: str | None = None,
    layout: ContextLayout,
    halo: int,
    axis_name: str = "context",
) -> Array:
    """`attention.attend` of a device's queries to the keys of its runs and of the `halo` rows before each.

    Equal to attention over the whole sequence if no query looks further back; nothing here checks that. Coordinates
    travel only where they cannot be computed: segments unless the rows are promised to be unbroken, positions only for
    chunks counted by document.

    Args:
      q_BTNH, k_BTKH, v_BTKH: places of this device, laid out by `layout`.
      q_info, k_info: their coordinates; the same tokens.
      halo: see `strategy.halo_length`.

    Returns:
      `[B, T, N, H]` in the type of the queries.
    """
    q_info, k_info, mask = _relative(q_info, k_info, mask, layout, halo, axis_name)
    out = attend(
        fold_runs(q_BTNH, layout),
        with_halo(k_BTKH, layout, halo, axis_name),
        with_halo(v_BTKH, layout, halo, axis_name),
        q_info,
        k_info,
        mask,
        scale=scale,
        slopes=slopes,
        impl=impl,
    )
    return out.reshape(q_BTNH.shape)


def _relative(q_info, k_info, mask, layout, halo, axis_name) -> tuple[TokenInfo, TokenInfo, MaskSpec]:
    """Coordinates of the folded runs with rows counted from the halo's first, and the mask that reads them.

    The place of a run in the whole row is known only on its device. Chunks counted by row therefore become chunks
    counted by a position that is set to the whole row's.
    """
    batch, length = q_info.shape
    run = length // layout.runs_per_piece
    chunked = isinstance(mask, Chunked)
    if halo == 0 and k_info.unbroken and not (chunked and (mask.shift or run % mask.size)):
        # chunks begin where runs do, so that each run may count from 0 as if it were alone
        info = TokenInfo.single(batch * layout.runs_per_piece, run)
        return info, info, mask

    cargo = Coordinates.of(k_info, layout, mask).cargo(k_info)
    cargo = {name: with_halo(x, layout, halo, axis_name) for name, x in cargo.items()}
    starts = jnp.stack([jnp.asarray(a, jnp.int32) * run for a in layout.runs(lax.axis_index(axis_name))])
    relative = jnp.arange(halo + run, dtype=jnp.int32)
    whole_rows = jnp.tile(starts[:, None] - halo + relative, (batch, 1))
    segments = cargo.get("segments", (whole_rows >= 0).astype(jnp.int32))
    positions = cargo.get("positions", whole_rows)
    if chunked and mask.by == "row":
        mask, multiple = Chunked(mask.size, by="document", shift=mask.shift), 0
    else:
        multiple = math.gcd(q_info.document_multiple, k_info.document_multiple)
    # counted from a run's own start, borders lie at multiples of what divides both a document's start and the run
    multiple = math.gcd(multiple, run) if halo == 0 else 1
    rows = jnp.broadcast_to(relative, whole_rows.shape)
    keys = TokenInfo(positions, segments, rows, first_row=0, document_multiple=multiple)
    return keys.map(lambda x: x[:, halo:]).replace(first_row=halo), keys, mask
