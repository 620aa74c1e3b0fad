"""Attention that is several attentions over disjoint sets of keys, each with queries and keys of its own; one softmax.

The unfinished softmaxes of the parts are merged, and each part contributes its share to the gradients. What the parts
are (other rotations, other coordinates) is not known here.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import NamedTuple

import jax

from irope_jax.attention.blockwise import backward_blockwise, partial_blockwise
from irope_jax.attention.mask import MaskSpec
from irope_jax.attention.partial import finish, merge
from irope_jax.attention.reference import partial_reference
from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array, TokenInfo


class KeySet(NamedTuple):
    """One part: queries and keys as they are seen in it, their coordinates, and who sees whom.

    No pair may be visible in two parts.
    """

    q_BTNH: Array
    k_BSKH: Array
    q_info: TokenInfo
    k_info: TokenInfo
    mask: MaskSpec


def attend_parts(
    parts: list[KeySet], v_BSKH: Array, *, scale: float | None = None, impl: str | None = None
) -> jax.Array:
    """Attention of each query to the keys it sees in any part, `[B, T, N, H]` in the type of the queries.

    Args:
      parts: at least one.
      v_BSKH: values, the same in all parts.
      scale: factor on the scores; None means `H ** -0.5`.
      impl: `blockwise` (None) or `reference`; other kernels fold no such parts.

    Raises:
      ConfigError: an implementation that cannot do this.
    """
    scale = v_BSKH.shape[-1] ** -0.5 if scale is None else float(scale)
    if impl == "reference":
        found = (partial_reference(q, k, v_BSKH, qi, ki, mask, scale=scale) for q, k, qi, ki, mask in parts)
        return finish(reduce(merge, found), parts[0].q_BTNH.dtype)
    if impl not in (None, "blockwise"):
        fix = "attention in several parts is done by 'blockwise' or 'reference'; leave it None"
        raise ConfigError("attention", impl, fix)
    masks = tuple(part.mask for part in parts)
    return _attend([part[:4] for part in parts], v_BSKH, masks, scale)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(parts, v_BSKH, masks, scale):
    return _forward(parts, v_BSKH, masks, scale)[0]


def _forward(parts, v_BSKH, masks, scale):
    parts = [(q, k, q_info.tied_to(q), k_info.tied_to(q)) for q, k, q_info, k_info in parts]
    found = [
        partial_blockwise(q, k, v_BSKH, q_info, k_info, mask, scale=scale)
        for (q, k, q_info, k_info), mask in zip(parts, masks)
    ]
    whole = reduce(merge, found)
    out = finish(whole, parts[0][0].dtype)
    return out, (parts, v_BSKH, out, whole.log_sum_exp)


def _backward(masks, scale, saved, dout):
    parts, v_BSKH, out, lse = saved
    dv_BSKH, d_parts = 0.0, []
    for (q, k, q_info, k_info), mask in zip(parts, masks):
        dq, dk, dv = backward_blockwise(
            q, k, v_BSKH, q_info, k_info, mask, lse=lse, out=out, dout=dout, scale=scale
        )  # fmt: skip
        d_parts.append((dq.astype(q.dtype), dk.astype(k.dtype), None, None))
        dv_BSKH = dv_BSKH + dv
    return d_parts, dv_BSKH.astype(v_BSKH.dtype)


_attend.defvjp(_forward, _backward)
