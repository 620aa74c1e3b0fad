"""Splash attention on TPUs: whole attention (`attend_splash`) and folds over pieces of keys (`PIECES`).

Our coordinates become two things the kernel knows. Which blocks to visit, causality and a sliding window come from
promised rows (`TokenInfo.first_row`). Documents, padding and chunks become one number per token; a query sees keys of
its own number only. What the kernel cannot do, `refuses` says. The calls themselves are in `splash_calls`.

Queries enter in float32, multiplied by the scale, so that outputs and gradients of queries come back in float32.
Pieces hand over keys and values in float32 too where their gradients are asked for, so nothing a ring adds up has been
rounded. That costs memory, not passes: as everywhere on a TPU at default precision, matrix units round their operands
to bfloat16 and sum in float32. Weights and gradients of scores are rounded to the type of what they are multiplied
with, as flash kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial as bind

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from irope_jax.attention.blocks import bounds
from irope_jax.attention.kernels.chunks import run_length, unchunk
from irope_jax.attention.kernels.splash_calls import (
    HIDDEN_KEY,
    HIDDEN_QUERY,
    LANES,
    TABLE,
    UNAVAILABLE,
    UNSEEN,
    Blocks,
    backward_kv,
    backward_q,
    forward,
)
from irope_jax.attention.mask import Chunked, MaskSpec
from irope_jax.attention.panels import Panel, Pieces
from irope_jax.attention.partial import Partial, merge
from irope_jax.core.types import PAD_SEGMENT, Array, TokenInfo

BLOCKS = (1024, 512, 256, 128)
"""Places per block, greatest first. A block of queries reads all its keys anew: one FLOP per byte and query of the
block, so 1024 keeps the matrix units of every TPU up to v6e (560 bf16 FLOPs per byte of memory traffic) busy, and its
tiles fit the 16 MiB of VMEM a kernel gets by default. Heads wider than 128 take half as many keys per block."""

COMPUTE = 512
"""Keys per matrix product: a tile of scores is then 2 MiB of float32."""

WASTE = 8
"""A block length is taken if it lengthens the sequence by at most 1 / WASTE."""

WIDEST = 256
"""Widest head that fits VMEM with these blocks."""


def refuses(
    *,
    platform: str,
    width: int,
    mask: MaskSpec,
    slopes: bool,
    shared: bool,
    offset: int | None,
    lengths: tuple[int, int],
    relations: Iterable[str],
) -> str | None:
    """Why a case cannot be done, or `None`.

    Args:
      platform: `tpu`; `cpu` interprets.
      shared: some mesh axis of more than one device is not manual: the compiler would have to cut the kernel up.
      offset: row of the first query minus row of the first key, or `None` if not promised. Not asked with relations.
      lengths: queries, keys.
      relations: of the panels, if pieces are asked for.
    """
    if UNAVAILABLE:
        return UNAVAILABLE
    if platform not in ("tpu", "cpu"):
        return f"splash attention is written for TPUs, not for {platform}"
    if platform == "tpu" and shared:
        return "kernels are not cut up by the compiler: call inside shard_map over all axes of the mesh"
    if slopes:
        return "splash attention adds nothing to the scores, so no ALiBi"
    if width > WIDEST:
        return f"heads wider than {WIDEST} do not fit its blocks"
    if relations:
        if "any" in relations:
            return "the order of rows in some panel is not known while tracing"
        if mask.width is not None:
            return "a sliding window over panels needs rows that are known while tracing"
        causal = "same" in relations
    elif offset is None:
        return "rows in order, with `first_row` known while tracing, are what it needs; these are not promised"
    else:
        causal = mask.reach is None
    entries = math.prod(-(-length // block) for length, block in zip(lengths, block_lengths(*lengths, width)))
    if causal and entries > TABLE:
        return f"its table of blocks would have {entries} entries and scalar memory holds {TABLE}; use shorter pieces"
    return None


def attend_splash(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    *,
    scale: float,
    slopes: Array | None = None,
) -> Array:
    """Attention output `[B, T, N, H]` in the type of the queries; arguments as for `attention.attend`.

    Both infos promise `first_row`; T and S may differ (keys may begin before the queries). Any lengths: they are padded
    to blocks. Chunks of whole blocks fold into the batch where they can.
    """
    assert slopes is None
    shape, unbroken = q_BTNH.shape, q_info.unbroken and k_info.unbroken
    length = run_length(mask, q_info, k_info)
    if length is not None and (length % LANES == 0 or length == shape[1]):
        q_BTNH, k_BSKH, v_BSKH, q_info, k_info, mask = unchunk(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, length)
    block_q, block_k = block_lengths(q_BTNH.shape[1], k_BSKH.shape[1], shape[-1])
    low, high = bounds(mask, q_info, k_info, block_q, block_k)
    offset = q_info.first_row - k_info.first_row
    blocks = _blocks(block_q, block_k, low=low, high=high, offset=offset, width=mask.width)
    ids = _ids(mask, q_info, k_info, block_k, unbroken)
    out = _attend(q_BTNH, k_BSKH, v_BSKH, ids, scale, blocks)
    return out.reshape(shape)


@bind(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, ids, scale, blocks):
    return _attend_forward(q, k, v, ids, scale, blocks)[0]


def _attend_forward(q, k, v, ids, scale, blocks):
    out, lse = _forward(_heads_first(q), _heads_first(k), _heads_first(v), ids, scale, blocks)
    out = checkpoint_name(_heads_first(out).astype(q.dtype), "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, ids, out, lse)


def _attend_backward(scale, blocks, saved, dout):
    q, k, v, ids, out, lse = saved
    delta = jnp.einsum("btnh,btnh->bnt", out, dout, preferred_element_type=jnp.float32)
    arguments = (_heads_first(q), _heads_first(k), _heads_first(v), ids, lse, _heads_first(dout), delta, scale, blocks)
    dq, dk, dv = (_heads_first(d).astype(x.dtype) for d, x in zip(_backward(*arguments), (q, k, v)))
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def fold_splash(
    acc: Partial, q_BNTH, k_BKSH, v_BKSH, q_info, k_info, mask, panels: tuple[Panel, ...], *, scale, slopes=None
) -> Partial:
    """`Pieces.fold`. Panels are `past` or `same`, masks without a window."""
    assert slopes is None
    for panel in panels:
        q, q_here = _cut(q_BNTH, q_info, panel.q_start, panel.q_length)
        (k, k_here), (v, _) = (_cut(x, k_info, panel.k_start, panel.k_length) for x in (k_BKSH, v_BKSH))
        blocks = _panel_blocks(panel, q.shape[-1])
        out, lse = _forward(
            q, k, v, _ids(mask, q_here, k_here, blocks.block_k, q_info.unbroken and k_info.unbroken), scale, blocks
        )
        lse = jnp.swapaxes(lse, 1, 2)
        fresh = Partial(_heads_first(out), lse, (lse > -jnp.inf).astype(jnp.float32))
        acc = _merge_at(panel.q_start, acc, fresh)
    return acc


def contribute_splash(
    dq, q_BNTH, k_BKSH, v_BKSH, dout_BNTH, lse_BTN, delta_BTN, q_info, k_info, mask, panels: tuple[Panel, ...], *,
    scale, slopes=None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """`Pieces.contribute`. Panels are `past` or `same`, masks without a window."""
    assert slopes is None
    grads = dq, *(jnp.zeros(x.shape, jnp.float32) for x in (k_BKSH, v_BKSH))
    unbroken = q_info.unbroken and k_info.unbroken
    lse_BNT, delta_BNT = jnp.swapaxes(lse_BTN, 1, 2), jnp.swapaxes(delta_BTN, 1, 2)
    for panel in panels:
        q, q_here = _cut(q_BNTH, q_info, panel.q_start, panel.q_length)
        (k, k_here), (v, _) = (
            _cut(x.astype(jnp.float32), k_info, panel.k_start, panel.k_length) for x in (k_BKSH, v_BKSH)
        )
        dout, lse, delta = (
            lax.dynamic_slice_in_dim(x, panel.q_start, panel.q_length, 2) for x in (dout_BNTH, lse_BNT, delta_BNT)
        )
        blocks = _panel_blocks(panel, q.shape[-1])
        ids = _ids(mask, q_here, k_here, blocks.block_k, unbroken)
        fresh = _backward(q, k, v, ids, lse, dout, delta, scale, blocks)
        starts = (panel.q_start, panel.k_start, panel.k_start)
        grads = tuple(_add(total, part, start) for total, part, start in zip(grads, fresh, starts))
    return grads


PIECES = Pieces(fold_splash, contribute_splash)


def segment_ids(mask: MaskSpec, info: TokenInfo) -> Array:
    """A number per token, int32 `[B, T]`: equal for two tokens exactly if the documents and labels of both are.

    For chunks, the row at which the part of the document that lies in the chunk begins. In a document positions and
    rows count up together; the numbers of queries and keys agree wherever they are computed.
    """
    if not isinstance(mask, Chunked):
        return info.segments
    return info.rows - jnp.minimum((mask.counted(info) + mask.shift) % mask.size, info.positions)


def block_lengths(q_length: int, k_length: int, width: int) -> tuple[int, int]:
    """Places per block of queries and of keys; the axes are then padded to multiples of them."""

    def most(length, limit):
        return next((b for b in BLOCKS if b <= limit and WASTE * (-length % b) <= length), LANES)

    return most(q_length, BLOCKS[0]), most(k_length, BLOCKS[0] if width <= LANES else BLOCKS[1])


def _blocks(block_q, block_k, **rest) -> Blocks:
    return Blocks(block_q, block_k, min(block_k, COMPUTE), interpret=platform() == "cpu", **rest)


def platform() -> str:
    """What is being traced for: the platform of the mesh in force, else the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _panel_blocks(panel: Panel, width: int) -> Blocks:
    block_q, block_k = block_lengths(panel.q_length, panel.k_length, width)
    if panel.relation == "past":
        return _blocks(block_q, block_k, low=None, high=None, offset=None, width=None)
    count = -(-panel.q_length // block_q)
    last = tuple(((i + 1) * block_q - 1) // block_k for i in range(count))
    return _blocks(block_q, block_k, low=(0,) * count, high=last, offset=0, width=None)


def _ids(mask, q_info, k_info, block_k, unbroken):
    """Numbers of queries and keys, or `None` where rows alone decide."""
    if unbroken and not isinstance(mask, Chunked) and k_info.shape[1] % block_k == 0:
        return None
    pairs = ((q_info, HIDDEN_QUERY), (k_info, HIDDEN_KEY))
    return tuple(jnp.where(i.segments == PAD_SEGMENT, hidden, segment_ids(mask, i)) for i, hidden in pairs)


def _forward(q_BNTH, k_BKSH, v_BKSH, ids, scale, blocks: Blocks):
    """Float32 output `[B, N, T, H]`, 0 where nothing was seen, and log-sum-exp `[B, N, T]`, `-inf` there."""
    (q, k, v), ids = _pad((q_BNTH.astype(jnp.float32) * scale,), (k_BKSH, v_BKSH), ids, blocks)
    out, lse = _per_row(forward, blocks, (q, k, v, ids))
    length = q_BNTH.shape[2]
    out, lse = out[:, :, :length], lse[:, :, :length]
    seen = lse > UNSEEN
    return jnp.where(seen[..., None], out, 0.0), jnp.where(seen, lse, -jnp.inf)


def _backward(q_BNTH, k_BKSH, v_BKSH, ids, lse_BNT, dout_BNTH, delta_BNT, scale, blocks: Blocks):
    """`dq` in float32, `dk` and `dv` in the types of `k` and `v`."""
    lse = jnp.where(lse_BNT == -jnp.inf, 0.0, lse_BNT)
    queries = (q_BNTH.astype(jnp.float32) * scale, lse, dout_BNTH, delta_BNT)
    (q, lse, dout, delta, k, v), ids = _pad(queries, (k_BKSH, v_BKSH), ids, blocks)
    arguments = (q, k, v, ids, lse, dout, delta)
    dq = _per_row(backward_q, blocks, arguments)
    dk, dv = _per_row(backward_kv, blocks, arguments)
    t, s = q_BNTH.shape[2], k_BKSH.shape[2]
    return dq[:, :, :t] * scale, dk[:, :, :s], dv[:, :, :s]


def _per_row(function, blocks, arguments):
    return jax.vmap(lambda *a: function(*a, blocks=blocks))(*arguments)


def _pad(queries, keys, ids, blocks: Blocks):
    """All arrays with places on axis 2, and the numbers with them on axis 1, lengthened to whole blocks."""

    def longer(x, block, axis, value=0):
        widths = [(0, -x.shape[axis] % block if a == axis else 0) for a in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=value)

    arrays = [longer(x, blocks.block_q, 2) for x in queries] + [longer(x, blocks.block_k, 2) for x in keys]
    if ids is not None:
        ids = longer(ids[0], blocks.block_q, 1, HIDDEN_QUERY), longer(ids[1], blocks.block_k, 1, HIDDEN_KEY)
    return arrays, ids


def _merge_at(start, acc: Partial, fresh: Partial) -> Partial:
    length = fresh.max.shape[1]
    here = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, length, 1), acc)
    put = lambda x, part: lax.dynamic_update_slice_in_dim(x, part, start, 1)
    return jax.tree.map(put, acc, merge(here, fresh))


def _heads_first(x):
    return jnp.swapaxes(x, 1, 2)


def _cut(x_BNTH, info: TokenInfo, start, length):
    x = lax.dynamic_slice_in_dim(x_BNTH, start, length, 2)
    return x, info.map(lambda a: lax.dynamic_slice_in_dim(a, start, length, 1))


def _add(total, part, start):
    old = lax.dynamic_slice_in_dim(total, start, part.shape[2], 2)
    return lax.dynamic_update_slice_in_dim(total, old + part, start, 2)
