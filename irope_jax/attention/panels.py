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
    """How a kernel folds panels.

    Queries, keys, values and cotangents come with axes `[B, N, T, H]` and `[B, K, S, H]` where `head_major`, else
    `[B, T, N, H]` and `[B, S, K, H]`: what travels between devices is what the kernel reads. Gradients come back alike.

    Attributes:
      fold: `(acc, q, k, v, q_info, k_info, mask, panels, *, scale, slopes) -> Partial`. Folds the panels into `acc` (a
        `Partial` with `out [B,T,N,H]`, `max` and `sum [B,T,N]`, float32). No visible pair lies outside the panels;
        inside them the mask, the documents and causality by the coordinates decide.
      contribute: `(dq, q, k, v, dout, lse_BTN, delta_BTN, q_info, k_info, mask, panels, *, scale, slopes) -> (dq, dk,
        dv)`, float32: adds to `dq` what the panels contribute to it, and gives what they contribute to the gradients of
        keys and values. `lse` is the log-sum-exp over all keys (`-inf` where a query saw nothing), `delta` is
        `sum_h(out * dout)`.
      head_major: order of axes.
      dq_axes: order of axes in which `dq` is collected.
    """

    fold: Callable
    contribute: Callable
    head_major: bool = True
    dq_axes: Literal["BTNH", "BNTH", "BNHT"] = "BNTH"


def whole(q_length: int, k_length: int, relation: Relation) -> tuple[Panel, ...]:
    """One panel of all places."""
    return (Panel(0, q_length, 0, k_length, relation),)
