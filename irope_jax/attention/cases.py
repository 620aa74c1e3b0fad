"""Named shapes, coordinates and masks that tests and benchmarks share.

A case is a mask, a layout (how tokens stand in the row) and sizes; `build` makes its arrays from a seed. New
implementations are judged by running through `CASES`; what a right answer is, the tests say.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from irope_jax.attention.mask import Chunked, Global, MaskSpec, Sliding
from irope_jax.core.types import Array, TokenInfo

MASKS: dict[str, MaskSpec] = {
    "global": Global(),
    "chunked": Chunked(16),
    "chunked-shifted": Chunked(16, shift=5),
    "chunked-by-row": Chunked(24, by="row"),
    "sliding": Sliding(9),
    "sliding-wide": Sliding(70),
}


@dataclass(frozen=True)
class Layout:
    """Sizes and the arrangement of tokens.

    Attributes:
      documents: lengths of the documents of a row, in order; -n is n places of padding.
      queries: `None` if queries and keys are the same tokens, else rows of the queries.
      order: seed of a permutation of the places of the row; `None` leaves them in row order.
      multiple: the `document_multiple` promised.
    """

    documents: tuple[int, ...]
    batch: int = 2
    query_heads: int = 2
    key_heads: int = 2
    width: int = 8
    queries: tuple[int, ...] | None = None
    order: int | None = None
    multiple: int = 1


LAYOUTS: dict[str, Layout] = {
    "plain": Layout((96,), multiple=0),
    "packed": Layout((7, 41, 1, 30, 17)),
    "aligned": Layout((48, 16, 20, -12), multiple=16),
    "padded": Layout((70, -26)),
    "permuted": Layout((30, 50, -16), order=3),
    "one-query": Layout((64, -32), queries=(63,), query_heads=4),
    "fully-masked": Layout((-40, 56)),
    "unaligned": Layout((77,), multiple=0, batch=1),
    "grouped": Layout((50, 50), query_heads=6, key_heads=2, batch=1),
}


@dataclass(frozen=True)
class AttentionCase:
    name: str
    mask: MaskSpec
    layout: Layout


CASES: tuple[AttentionCase, ...] = tuple(
    AttentionCase(f"{m}/{l}", mask, layout) for m, mask in MASKS.items() for l, layout in LAYOUTS.items()
)


def token_info(layout: Layout) -> TokenInfo:
    """Coordinates of the keys, int32 `[B, S]`. Batch row `b` is the layout with its documents rotated by `b` when
    nothing is promised of where they start, so that the rows of a batch differ."""
    rows = []
    for b in range(layout.batch):
        shift = b % len(layout.documents) if layout.multiple == 1 else 0
        parts, segment = [], 0
        for n in layout.documents[shift:] + layout.documents[:shift]:
            segment += n > 0
            parts.append(np.stack([np.arange(abs(n)), np.full(abs(n), segment if n > 0 else 0)]))
        rows.append(np.concatenate(parts, axis=1))
    positions, segments = np.stack(rows, axis=1).astype(np.int32)
    places = np.broadcast_to(np.arange(positions.shape[1], dtype=np.int32), positions.shape)
    arrays = (jnp.asarray(x) for x in (positions, segments, places))
    info = TokenInfo(*arrays, first_row=0, document_multiple=layout.multiple)
    if layout.order is not None:
        info = info.take(np.random.default_rng(layout.order).permutation(positions.shape[1]))
    return info


@dataclass(frozen=True)
class Inputs:
    """Arrays of a case: arguments of `attend` in order, then the cotangent of its output."""

    q_BTNH: Array
    k_BSKH: Array
    v_BSKH: Array
    q_info: TokenInfo
    k_info: TokenInfo
    mask: MaskSpec
    dout_BTNH: Array


def build(case: AttentionCase, seed: int = 0, dtype=jnp.float32) -> Inputs:
    """Normal random numbers in `dtype` and the coordinates of the case."""
    layout, random = case.layout, np.random.default_rng(seed)
    k_info = token_info(layout)
    q_info = k_info
    if layout.queries is not None:
        q_info = k_info.take(np.array(layout.queries)).replace(first_row=None)
    (b, t), s = q_info.shape, k_info.shape[1]

    def array(*shape):
        return jnp.asarray(random.normal(size=shape), dtype)

    q, dout = array(b, t, layout.query_heads, layout.width), array(b, t, layout.query_heads, layout.width)
    k, v = array(b, s, layout.key_heads, layout.width), array(b, s, layout.key_heads, layout.width)
    return Inputs(q, k, v, q_info, k_info, case.mask, dout)
