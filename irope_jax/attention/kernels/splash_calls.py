"""Splash attention of jax (Pallas, TPU), one batch row at a time: its three passes with our own block tables.

The public door of that kernel builds its block tables by evaluating the mask at every pair of places, and it keeps to
itself the two backward passes, which a fold over pieces of keys needs with a log-sum-exp from elsewhere. So this file
calls the three passes directly. They are not public: everything about them is said here and nowhere else, and
`UNAVAILABLE` says why when a version of jax has them differently.

Number formats, read from the kernel and tested: each result has the type of one operand (out and dq that of q, dk and
dv that of k and v), sums inside are float32. Operands may differ in type, so float32 results cost a float32 copy of
that operand and nothing else.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import partial as bind

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from irope_jax.attention.mask import block_range
from irope_jax.core.types import Array

EXPECTED = {
    "_splash_attention_forward": "fwd_mask_info q k v segment_ids sinks mask_value is_mqa block_sizes "
    "residual_checkpoint_name save_residuals mask_function attn_logits_soft_cap interpret",
    "_splash_attention_bwd_dq": "q k v segment_ids sinks logsumexp do di bq bkv is_mqa mask_info mask_value "
    "attn_logits_soft_cap q_layout k_layout v_layout mask_function interpret",
    "_splash_attention_bwd_dkv": "q k v segment_ids sinks logsumexp do di bq bkv bkv_compute is_mqa mask_info "
    "mask_value attn_logits_soft_cap use_fused_bwd_kernel q_layout k_layout v_layout mask_function interpret",
}
"""Parameters of the passes this file was written against (jax 0.10.2)."""

MASK_INFO = ("data_next", "mask_next", "block_mask", "partial_mask_blocks", "q_sequence", "is_dynamic_mask")


def _load():
    """The kernel's two modules, and why they cannot be used (or `None`)."""
    version = f"this version of jax ({jax.__version__})"
    try:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info
    except ImportError as error:
        return None, None, f"{version} has no splash attention: {error}"
    for name, parameters in EXPECTED.items():
        found = tuple(inspect.signature(getattr(kernel, name, lambda: None)).parameters)
        if found != tuple(parameters.split()):
            return None, None, f"{version} has a different {name}{found}; 0.10.2 is known to work"
    if getattr(info.MaskInfo, "_fields", None) != MASK_INFO:
        return None, None, f"{version} describes masks of splash attention differently; 0.10.2 is known to work"
    return kernel, info, None


_kernel, _info, UNAVAILABLE = _load()

LANES = 128
"""Blocks of places are multiples of the width of a vector register."""

TABLE = 2**18
"""Entries of a block table that fit scalar memory (1 MiB; two tables of up to three bytes an entry)."""

HIDDEN_QUERY, HIDDEN_KEY = -(2**31), -(2**31) + 1
"""Numbers of padding: no token has them, and a padding query does not see padding keys."""


@dataclass(frozen=True)
class Blocks:
    """What the kernel visits and what it asks of each pair of places. Static and hashable.

    Attributes:
      block_q, block_k: places per block; they divide the lengths.
      compute: keys per matrix product; divides `block_k`.
      low, high: first and last block of keys each block of queries visits; `None` visits all. Of these, blocks whose
        ranges of numbers do not meet are skipped at run time.
      offset: row of the first query minus row of the first key; a key at a later row than the query is hidden. `None`
        hides none.
      width: with an `offset`, keys this many rows back or more are hidden too.
      interpret: run by the interpreter (any platform, slow) instead of being compiled for a TPU.
    """

    block_q: int
    block_k: int
    compute: int
    low: tuple[int, ...] | None
    high: tuple[int, ...] | None
    offset: int | None
    width: int | None
    interpret: bool

    def visible(self, q_blocks: int, k_blocks: int) -> np.ndarray:
        """Which block of queries visits which block of keys, as far as is known while tracing."""
        if self.low is None:
            return np.ones((q_blocks, k_blocks), bool)
        columns = np.arange(k_blocks)
        return (columns >= np.array(self.low)[:, None]) & (columns <= np.array(self.high)[:, None])


def forward(q_NTH, k_KSH, v_KSH, ids, blocks: Blocks) -> tuple[Array, Array]:
    """Output `[N, T, H]` in the type of q, and log-sum-exp float32 `[N, T]`.

    A query that sees no key gets the mean of some values and a log-sum-exp below `UNSEEN`, or nan and `-inf`.

    Args:
      q_NTH: scaled queries.
      ids: int32 `([T], [S])` or `None`: a query sees keys of its own number only.
    """
    table = _table(blocks, ids, q_NTH.shape[1], k_KSH.shape[1])
    sizes = _kernel.BlockSizes(blocks.block_q, blocks.block_k, blocks.compute)
    out, (lse,) = _kernel._splash_attention_forward(
        table, q_NTH, k_KSH, v_KSH, _segments(ids), None, is_mqa=False, block_sizes=sizes,
        residual_checkpoint_name=None, save_residuals=True, **_rule(blocks),
    )  # fmt: skip
    return out, lse


def backward_q(q_NTH, k_KSH, v_KSH, ids, lse_NT, dout_NTH, delta_NT, blocks: Blocks) -> Array:
    """Gradient of the scaled queries `[N, T, H]`, in the type of q. `lse` must be finite, 0 for what sees nothing."""
    return _kernel._splash_attention_bwd_dq(
        q_NTH, k_KSH, v_KSH, _segments(ids), None, lse_NT, dout_NTH, delta_NT, bq=blocks.block_q, bkv=blocks.block_k,
        mask_info=_table(blocks, ids, q_NTH.shape[1], k_KSH.shape[1]), is_mqa=False, **_layouts(), **_rule(blocks),
    )  # fmt: skip


def backward_kv(q_NTH, k_KSH, v_KSH, ids, lse_NT, dout_NTH, delta_NT, blocks: Blocks) -> tuple[Array, Array]:
    """Gradients of keys and values `[K, S, H]`, each in the type of its operand; arguments as for `backward_q`."""
    table = _table(blocks, ids, q_NTH.shape[1], k_KSH.shape[1], by_keys=True)
    _, dk, dv = _kernel._splash_attention_bwd_dkv(
        q_NTH, k_KSH, v_KSH, _segments(ids), None, lse_NT, dout_NTH, delta_NT, bq=blocks.block_q, bkv=blocks.block_k,
        bkv_compute=blocks.compute, mask_info=table, use_fused_bwd_kernel=False, is_mqa=False, **_layouts(),
        **_rule(blocks),
    )  # fmt: skip
    return dk, dv


UNSEEN = -1e38
"""Log-sum-exps below this belong to queries that saw nothing: hidden scores count as about -2.4e38."""


def _layouts():
    return dict.fromkeys(("q_layout", "k_layout", "v_layout"), _kernel.QKVLayout.HEAD_DIM_MINOR)


def _rule(blocks: Blocks):
    if blocks.offset is None:
        function = None
    else:
        function = _not_after if blocks.width is None else bind(_within, blocks.width)
    return dict(
        mask_value=_kernel.DEFAULT_MASK_VALUE, mask_function=function, attn_logits_soft_cap=None,
        interpret=blocks.interpret,
    )  # fmt: skip


def _not_after(q_row, k_row):
    return q_row >= k_row


def _within(width, q_row, k_row):
    return (q_row >= k_row) & (q_row - k_row < width)


def _segments(ids):
    return None if ids is None else _kernel.SegmentIds(*ids)


def _table(blocks: Blocks, ids, q_length: int, k_length: int, by_keys: bool = False):
    """What to visit, in the kernel's terms: for each block of queries, or `by_keys` for each block of keys."""
    rows = None if blocks.offset is None else np.arange(q_length, dtype=np.int32) + blocks.offset
    counts = q_length // blocks.block_q, k_length // blocks.block_k
    if blocks.low is None and (ids is None or math.prod(counts) > TABLE):
        return _info.MaskInfo(None, None, None, None, rows)
    visible = blocks.visible(*counts)
    fetch, visited = compact(visible.T if by_keys else visible)
    if ids is not None:
        met = meet(ids, blocks)
        fetch, visited = skip(fetch, visited & jnp.take_along_axis(met.T if by_keys else met, fetch, axis=1))
    most = max(counts)
    small = jnp.int8 if most <= 2**7 else jnp.int16 if most <= 2**15 else jnp.int32

    def as_table(x, dtype):
        return jnp.asarray(x.T if by_keys else x).astype(dtype)[None]

    return _info.MaskInfo(as_table(fetch, small), None, as_table(visited, jnp.int8), None, rows)


def compact(visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The visits of each line without the gaps: int `[lines, most visits]` block to fetch, bool whether to compute.

    Where a line has fewer visits than the longest, the block fetched is the first of the next line: by the time that
    line begins it is there.
    """
    order = np.argsort(~visible, axis=1, kind="stable")
    count = visible.sum(axis=1)
    most = max(count.max(), 1)
    visited = np.arange(most) < count[:, None]
    return np.where(visited, order[:, :most], np.roll(order[:, :1], -1, axis=0)), visited


def meet(ids, blocks: Blocks) -> Array:
    """Whether a block of queries and a block of keys can hold equal numbers: bool `[q blocks, k blocks]`."""
    (q_low, q_high), (k_low, k_high) = (
        block_range(x, x > HIDDEN_KEY, block) for x, block in zip(ids, (blocks.block_q, blocks.block_k))
    )
    return (q_low[:, None] <= k_high) & (k_low <= q_high[:, None])


def skip(fetch, visited: Array) -> tuple[Array, Array]:
    """The same visits where more is left out: there the next block of the line is fetched early, or the last kept."""
    place = jnp.broadcast_to(jnp.arange(visited.shape[1]), visited.shape)
    following = lax.cummin(jnp.where(visited, place, visited.shape[1]), axis=1, reverse=True)
    previous = lax.cummax(jnp.where(visited, place, 0), axis=1)
    chosen = jnp.where(following < visited.shape[1], following, previous)
    return jnp.take_along_axis(jnp.asarray(fetch), chosen, axis=1), visited
