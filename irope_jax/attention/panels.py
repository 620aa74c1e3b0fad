"""The contract between folds over pieces of keys and the kernels that compute a piece.

Whoever holds only some of the keys at a time (a ring, a gather) describes what is to be computed as panels: rectangles
of query places times key places, with what is known while tracing about the order of their rows. A kernel that can
fold panels offers two functions, gathered in `Pieces`; which kernels do is said in `attention.api`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax

from irope_jax.core.types import Array

Relation = Literal["past", "same", "any"]
"""What is known of a panel's rows.

past: every key's row comes before every query's row, so causality hides nothing.
same: queries and keys are the same tokens, in row order, perhaps with gaps: nothing at a later place is visible.
any: nothing; the coordinates decide.
"""


@dataclass(frozen=True)
class Panel:
    """A rectangle of places.

    Attributes:
      q_start, k_start: first place of the queries and of the keys; an int, or a traced int32 scalar.
      q_length, k_length: how many places.
      relation: what is known of their rows.
    """

    q_start: int | jax.Array
    q_length: int
    k_start: int | jax.Array
    k_length: int
    relation: Relation


@dataclass(frozen=True)
class Pieces:
    """How a kernel folds panels. Arrays are head-major: what travels between devices is what the kernel reads.

    Attributes:
      fold: `(acc, q_BNTH, k_BKSH, v_BKSH, q_info, k_info, mask, panels, *, scale, slopes) -> Partial`. Folds the panels
        into `acc` (a `Partial` with `out [B,T,N,H]`, `max` and `sum [B,T,N]`, float32). No pair outside the panels
        counts; inside them the mask, the documents and causality by the coordinates decide.
      contribute: `(q_BNTH, k_BKSH, v_BKSH, dout_BNTH, lse_BTN, delta_BTN, q_info, k_info, mask, panels, *, scale,
        slopes) -> (dq_BNTH, dk_BKSH, dv_BKSH)`, float32: what the panels contribute to the gradients. `lse` is the
        log-sum-exp over all keys (`-inf` where a query saw nothing), `delta` is `sum_h(out * dout)`.
    """

    fold: Callable
    contribute: Callable


def whole(q: Array, k: Array, relation: Relation) -> tuple[Panel, ...]:
    """One panel of all places of head-major `q [B, N, T, H]` and `k [B, K, S, H]`."""
    return (Panel(0, q.shape[2], 0, k.shape[2], relation),)
