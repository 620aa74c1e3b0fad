"""Splash attention of jax (Pallas, TPU), one batch row at a time: its three passes with our own block tables.

The public door of that kernel builds its block tables by evaluating the mask at every pair of places, and it keeps to
itself the two backward passes, which a fold over pieces of keys needs with a log-sum-exp from elsewhere. So this file
calls the three passes directly. They are not public: everything about them is said here and nowhere else, and
`UNAVAILABLE` says why when a version of jax has them differently.

Number formats, read from the kernel and tested: each result has the type of one operand (out and dq that of q, dk and dv
that of k and v), sums inside are float32. Operands may differ in type, so float32 results cost a float32 copy of that
operand and nothing else.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from functools import partial as bind

import jax
import jax.numpy as jnp
import numpy as np

from irope_jax.core.types import Array

EXPECTED = {
    "_splash_attention_forward": "fwd_mask_info q k v segment_ids sinks mask_value is_mqa block_sizes "
    "residual_checkpoint_name save_residuals mask_function attn_logits_soft_cap interpret",
    "_splash_attention_bwd_dq": "q k v segment_ids sinks logsumexp do di bq bkv is_mqa mask_info mask_value "
    "attn_logits_soft_cap q_layout k_layout v_layout mask_function interpret",
    "_splash_attention_bwd_dkv": "q k v segment_ids sinks logsumexp do di bq bkv bkv_compute is_mqa mask_info mask_value "
    "attn_logits_soft_cap use_fused_bwd_kernel q_layout k_layout v_layout mask_function interpret",
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


@dataclass(frozen=True)
class Blocks:
    """What the kernel visits and what it asks of each pair of places. Static and hashable.

    Attributes:
      block_q, block_k: places per block; they divide the lengths.
      compute: keys per matrix product; divides `block_k`.
      low, high: first and last block of keys each block of queries visits; `None` visits all.
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

    @cached_property
    def visible(self) -> np.ndarray | None:
        """Which block of queries visits which block of keys, as far as the tables go; bool `[blocks, blocks]`."""
        if self.low is None:
            return None
        columns = np.arange(max(*self.high, 0) + 1)
        return (columns >= np.array(self.low)[:, None]) & (columns <= np.array(self.high)[:, None])


def forward(q_NTH, k_KSH, v_KSH, ids, blocks: Blocks) -> tuple[Array, Array]:
    """Output `[N, T, H]` in the type of q, and log-sum-exp float32 `[N, T]`.

    A query that sees no key gets the mean of some values and a log-sum-exp below `UNSEEN`, or nan and `-inf`.

    Args:
      q_NTH: scaled queries.
      ids: int32 `([T], [S])` or `None`: a query sees keys of its own number only.
    """
    sizes = _kernel.BlockSizes(blocks.block_q, blocks.block_k, blocks.compute)
    out, (lse,) = _kernel._splash_attention_forward(
        _table(blocks, q_NTH.shape[1]), q_NTH, k_KSH, v_KSH, _segments(ids), None, is_mqa=False, block_sizes=sizes,
        residual_checkpoint_name=None, save_residuals=True, **_rule(blocks),
    )  # fmt: skip
    return out, lse


def backward_q(q_NTH, k_KSH, v_KSH, ids, lse_NT, dout_NTH, delta_NT, blocks: Blocks) -> Array:
    """Gradient of the scaled queries `[N, T, H]`, in the type of q. `lse` must be finite, 0 for what sees nothing."""
    return _kernel._splash_attention_bwd_dq(
        q_NTH, k_KSH, v_KSH, _segments(ids), None, lse_NT, dout_NTH, delta_NT, bq=blocks.block_q, bkv=blocks.block_k,
        is_mqa=False, mask_info=_table(blocks, q_NTH.shape[1]), **_layouts(), **_rule(blocks),
    )  # fmt: skip


def backward_kv(q_NTH, k_KSH, v_KSH, ids, lse_NT, dout_NTH, delta_NT, blocks: Blocks) -> tuple[Array, Array]:
    """Gradients of keys and values `[K, S, H]`, each in the type of its operand; arguments as for `backward_q`."""
    _, dk, dv = _kernel._splash_attention_bwd_dkv(
        q_NTH, k_KSH, v_KSH, _segments(ids), None, lse_NT, dout_NTH, delta_NT, bq=blocks.block_q, bkv=blocks.block_k,
        bkv_compute=blocks.compute, is_mqa=False, mask_info=_table(blocks, q_NTH.shape[1], k_KSH.shape[1]),
        use_fused_bwd_kernel=False, **_layouts(), **_rule(blocks),
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
        mask_value=_kernel.DEFAULT_MASK_VALUE, mask_function=function, attn_logits_soft_cap=None, interpret=blocks.interpret
    )  # fmt: skip


def _not_after(q_row, k_row):
    return q_row >= k_row


def _within(width, q_row, k_row):
    return (q_row >= k_row) & (q_row - k_row < width)


def _segments(ids):
    return None if ids is None else _kernel.SegmentIds(*ids)


def _table(blocks: Blocks, q_length: int, k_length: int | None = None):
    """What to visit, in the kernel's terms: by blocks of queries, or, with `k_length` given, by blocks of keys."""
    rows = None if blocks.offset is None else np.arange(q_length, dtype=np.int32) + blocks.offset
    if blocks.visible is None:
        return _info.MaskInfo(None, None, None, None, rows)
    visible = blocks.visible
    if k_length is None:
        following, visited = compact(visible)
    else:
        visible = np.pad(visible, [(0, 0), (0, k_length // blocks.block_k - visible.shape[1])])
        following, visited = (x.T for x in compact(visible.T))
    small = np.int8 if following.max() < 2**7 else np.int16 if following.max() < 2**15 else np.int32
    as_table = lambda x, dtype: jnp.asarray(x[None].astype(dtype))
    return _info.MaskInfo(as_table(following, small), None, as_table(visited, np.int8), None, rows)


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
