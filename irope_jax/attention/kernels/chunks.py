"""Where chunks need no mask: runs of places that see nothing of each other become rows of the batch."""

from __future__ import annotations

from irope_jax.attention.blocks import fold, fold_length
from irope_jax.attention.mask import Chunked, Global, MaskSpec
from irope_jax.core.types import TokenInfo


def run_length(mask: MaskSpec, q_info: TokenInfo, k_info: TokenInfo) -> int | None:
    """Length of the chunks if the sequence consists of whole ones, its own length if it lies within one.

    `None` if that is not promised, if queries and keys are different places, or if there are no chunks.
    """
    if not isinstance(mask, Chunked) or q_info.shape != k_info.shape:
        return None
    if q_info.first_row is None or q_info.first_row != k_info.first_row:
        return None
    if not all(mask.borders_known(info.document_multiple) for info in (q_info, k_info)):
        return None
    length = q_info.shape[1]
    within = (q_info.first_row + mask.shift) % mask.size + length <= mask.size
    return length if within else fold_length(mask, q_info, k_info)


def unchunk(q_BTNH, k_BSKH, v_BSKH, q_info: TokenInfo, k_info: TokenInfo, length: int):
    """The same attention with every `length` places a row of the batch: arrays, coordinates, the mask that is left."""
    arrays = (x.reshape(-1, length, *x.shape[2:]) for x in (q_BTNH, k_BSKH, v_BSKH))
    return *arrays, fold(q_info, length), fold(k_info, length), Global()
