"""cuDNN's flash attention on NVIDIA GPUs (Ampere or later), through `jax.nn.dot_product_attention`.

That door knows three masks without storing a square of the length: causal, causal with a window, and each of them with
rows of the batch that end early. So one document per row does, padded or not, and chunks that fold into the batch with
one document each; packed documents do not, and `refuses` says so. Results come back in the inputs' 16-bit type.

No pieces (`attention.panels`) are offered. The log-sum-exp that door returns is cast to the inputs' type after the call
(jax 0.10.2): in bfloat16 a value near 10 is off by up to 0.03, and partials merged by it by 3 %. One level below, in
private modules, it is float32, but outputs of pieces still come rounded, causality and ends of rows are all that can be
said of documents, and the backward pass takes the finished output, not `delta`: what a ring needs is not there. On GPUs
rings fold with `blockwise`.

Under remat with `save_only_these_names` the forward kernel runs again in the backward pass: what it saves is named
inside jax, where names cannot be given.
"""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp

from irope_jax.attention.kernels.chunks import run_length, unchunk
from irope_jax.attention.mask import Chunked, MaskSpec
from irope_jax.core.types import PAD_SEGMENT, Array, TokenInfo

WIDEST = 128
"""Widest head on every GPU with flash attention (256 from Hopper on, which cannot be known while tracing)."""


def installed() -> bool:
    """Whether jax's CUDA plugin is here (on AMD GPUs it is not)."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def refuses(
    *,
    platform: str,
    dtype: str,
    width: int,
    mask: MaskSpec,
    slopes: bool,
    offset: int | None,
    lengths: tuple[int, int],
    runs: int | None,
    single: bool,
) -> str | None:
    """Why a case cannot be done, or `None`.

    Args:
      offset: row of the first query minus row of the first key, or `None` if not promised.
      lengths: queries, keys.
      runs: `chunks.run_length`.
      single: `one_document`.
    """
    if platform != "gpu":
        return f"cuDNN is a library for NVIDIA GPUs, and this is traced for {platform}"
    if not installed():
        return "jax's CUDA plugin is not installed; the `cuda` extra brings it"
    if dtype not in ("bfloat16", "float16"):
        return f"its flash attention works on bfloat16 and float16, not on {dtype}"
    if width % 8 or width > WIDEST:
        return f"heads are a multiple of 8 wide and at most {WIDEST}, not {width}"
    if slopes:
        return "its ALiBi knows the usual slopes only"
    if offset != 0 or lengths[0] != lengths[1]:
        return "queries and keys must be the same places in row order, and that is not promised"
    if isinstance(mask, Chunked) and runs is None:
        return "chunks that do not fold into the batch would need a mask of T x T"
    if not single:
        return "packed documents would need a mask of T x T"
    return None


def one_document(mask: MaskSpec, q_info: TokenInfo, k_info: TokenInfo) -> bool:
    """Whether each row, or each chunk where chunks fold, is promised to be one document and padding after it."""
    by_row = all(info.unbroken or info.document_multiple == 0 for info in (q_info, k_info))
    by_chunk = isinstance(mask, Chunked) and mask.by == "document" and run_length(mask, q_info, k_info) is not None
    return by_row or by_chunk


def attend_cudnn(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    *,
    scale: float,
    slopes: Array | None = None,
    implementation: str = "cudnn",
) -> Array:
    """Attention output `[B, T, N, H]` in the type of the queries; arguments as for `attention.attend`.

    Args:
      implementation: that of `jax.nn.dot_product_attention`; `xla` computes the same on any platform, in T x S memory.
    """
    assert slopes is None
    shape, unbroken = q_BTNH.shape, q_info.unbroken and k_info.unbroken
    if (length := run_length(mask, q_info, k_info)) is not None:
        q_BTNH, k_BSKH, v_BSKH, q_info, k_info, mask = unchunk(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, length)
    window = None if mask.width is None else (mask.width - 1, 0)
    ends, present = None, q_info.segments != PAD_SEGMENT
    if not unbroken:
        # a row of padding alone is given one token: its output is hidden below, and no softmax is over nothing
        ends = jnp.maximum(jnp.sum(present, axis=1, dtype=jnp.int32), 1)
    out = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, scale=scale, is_causal=True, query_seq_lengths=ends, key_value_seq_lengths=ends,
        local_window_size=window, implementation=implementation,
    )  # fmt: skip
    if not unbroken:
        out = jnp.where(present[..., None, None], out, 0)
    return out.reshape(shape)
