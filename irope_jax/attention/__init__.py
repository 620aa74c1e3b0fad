"""Attention on one device: queries, keys, values and their coordinates in, output out.

What a query may see (`mask`), the unfinished softmax (`partial`), the definition (`reference`), the version that skips
what nobody sees (`blockwise`, its block plan in `blocks`) and the one door (`api.attend`). What a position does to
queries and keys belongs to `position`; what happens when the sequence spans devices belongs to `context`.
"""

from irope_jax.attention.api import attend
from irope_jax.attention.mask import (
    Chunked,
    Global,
    MaskSpec,
    Sliding,
    allowed,
    phase_positions,
    picture,
    reach,
    visible_pairs,
)
from irope_jax.attention.partial import Partial, finish, merge

__all__ = [
    "Chunked",
    "Global",
    "MaskSpec",
    "Partial",
    "Sliding",
    "allowed",
    "attend",
    "finish",
    "merge",
    "phase_positions",
    "picture",
    "reach",
    "visible_pairs",
]
