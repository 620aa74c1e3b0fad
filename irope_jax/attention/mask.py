"""What a query may see, described by three small dataclasses and never stored as a square.

A mask is a function of the coordinates of queries and keys (`TokenInfo`). Implied by every mask: a key's row is not
greater than the query's (causal), both belong to the same document, and that document is not padding. What a
kind adds is said in two words every implementation understands, so that none of them knows the kinds by name:

    label    an integer per token; query and key must carry the same one (`Chunked`: the chunk's number)
    width    a query sees at most this many rows back, its own included (`Sliding`)

Bounds per block, counts of visible pairs and pictures live here too; how blocks are walked belongs to `blocks`.
Inside a document positions must grow with rows (packing, padding, zigzag and cache slots all keep that).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.core.types import PAD_SEGMENT, Array, TokenInfo


@dataclass(frozen=True)
class Global:
    """A query sees every earlier token of its document, and itself."""

    kind: ClassVar[str] = "global"

    width: ClassVar[int | None] = None
    reach: ClassVar[int | None] = None

    def label(self, info: TokenInfo) -> Array | None:
        return None

    def borders_known(self, document_multiple: int) -> bool:
        return True

    def lowest_row(self, row, aligned: bool):
        return row * 0

    def visible_pairs(self, length: int) -> int:
        return length * (length + 1) // 2


@dataclass(frozen=True)
class Chunked:
    """A query sees the earlier tokens of its own chunk: chunks are walls, not windows (Llama 4's local layers).

    Attributes:
      size: tokens per chunk.
      by: what is counted. 'document': `positions`, so that a packed document is cut as it would be alone.
        'row': `rows`, Meta's original rule, whatever documents the row holds.
      shift: moves every border this many tokens towards the start: chunk number `(count + shift) // size`.
    """

    kind: ClassVar[str] = "chunked"

    size: int
    by: Literal["document", "row"] = "document"
    shift: int = 0

    width: ClassVar[int | None] = None

    def __post_init__(self):
        if self.size < 1:
            raise ConfigError("size", self.size, "a chunk holds at least 1 token")
        if self.by not in ("document", "row"):
            raise ConfigError("by", self.by, "choose one of: document, row")
        if not 0 <= self.shift < self.size:
            raise ConfigError("shift", self.shift, f"borders move by 0 to size - 1 = {self.size - 1} tokens")

    @property
    def reach(self) -> int:
        return self.size

    def counted(self, info: TokenInfo) -> Array:
        return info.positions if self.by == "document" else info.rows

    def label(self, info: TokenInfo) -> Array:
        return (self.counted(info) + self.shift) // self.size

    def borders_known(self, document_multiple: int) -> bool:
        return self.by == "row" or document_multiple % self.size == 0

    def lowest_row(self, row, aligned: bool):
        return (row + self.shift) // self.size * self.size - self.shift if aligned else row - self.size + 1

    def visible_pairs(self, length: int) -> int:
        first = min(self.size - self.shift, length)
        whole, rest = divmod(length - first, self.size)
        return sum(count * n * (n + 1) // 2 for count, n in ((1, first), (whole, self.size), (1, rest)))


@dataclass(frozen=True)
class Sliding:
    """A query sees the last `size` rows, its own included (Mistral's sliding window)."""

    kind: ClassVar[str] = "sliding"

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ConfigError("size", self.size, "a window holds at least 1 token, the query itself")

    @property
    def width(self) -> int:
        return self.size

    @property
    def reach(self) -> int:
        return self.size

    def label(self, info: TokenInfo) -> Array | None:
        return None

    def borders_known(self, document_multiple: int) -> bool:
        return True

    def lowest_row(self, row, aligned: bool):
        return row - self.size + 1

    def visible_pairs(self, length: int) -> int:
        window = min(self.size, length)
        return length * window - window * (window - 1) // 2


MaskSpec = Global | Chunked | Sliding


def allowed(mask: MaskSpec, q_info: TokenInfo, k_info: TokenInfo) -> Array:
    """Who sees whom, bool `[B, T, S]`. The definition; for small inputs and single tiles only."""

    def column(x):
        return x[..., :, None]

    def line(x):
        return x[..., None, :]

    back = column(q_info.rows) - line(k_info.rows)
    seen = (column(q_info.segments) == line(k_info.segments)) & (column(q_info.segments) != PAD_SEGMENT) & (back >= 0)
    if mask.width is not None:
        seen &= back < mask.width
    if (label := mask.label(q_info)) is not None:
        seen &= column(label) == line(mask.label(k_info))
    return seen


def phase_positions(mask: MaskSpec, info: TokenInfo) -> Array:
    """Positions to rotate by, int32 `[B, T]`.

    On chunked layers the position within the chunk: only differences inside a chunk matter, so this changes nothing in
    exact arithmetic and keeps float32 phases exact at any length. Otherwise the position in the document.
    """
    if isinstance(mask, Chunked):
        return (mask.counted(info) + mask.shift) % mask.size
    return info.positions


def visible_keys(mask: MaskSpec, info: TokenInfo) -> Array:
    """How many keys each query sees in its whole document, itself included: int32 `[B, T]`.

    From its position and its place in chunk or window, whatever is in the cache or on other devices.
    """
    count = info.positions + 1
    if mask.width is not None:
        count = jnp.minimum(count, mask.width)
    if isinstance(mask, Chunked):
        count = jnp.minimum(count, (mask.counted(info) + mask.shift) % mask.size + 1)
    return count


def reach(mask: MaskSpec) -> int | None:
    """How many rows back a query may look, its own included; `None` means all of its document."""
    return mask.reach


def visible_pairs(mask: MaskSpec, length: int) -> int:
    """Number of (query, key) pairs that see each other in one document of `length` tokens, in closed form.

    The least work of a layer in matrix products: `4 N H` FLOPs per pair forward, `14 N H` forward and backward.
    """
    return mask.visible_pairs(length)


def row_bounds(mask: MaskSpec, first_row, last_row, document_multiple: int = 1):
    """Lowest and highest key row that any query of rows `first_row … last_row` may see (both included).

    Works elementwise on ints, numpy and jax arrays. `document_multiple` is the promise of `TokenInfo`: where it says
    that documents start at chunk borders, chunks counted by document begin at known rows; without it a chunk reaches at
    most `size` rows back.
    """
    return mask.lowest_row(first_row, mask.borders_known(document_multiple)), last_row


def key_bounds(mask: MaskSpec, q_info: TokenInfo, block: int) -> tuple[Array, Array]:
    """`row_bounds` of every block of `block` queries, from coordinates: int32 `[B, blocks]` each, in O(T).

    The last block may be shorter. Blocks of padding get an empty range (low > high).
    """
    low, high = block_range(q_info.rows, q_info.segments != PAD_SEGMENT, block)
    empty = low > high
    low, high = row_bounds(mask, low, high, q_info.document_multiple)
    return jnp.where(empty, EMPTY_LOW, low), jnp.where(empty, EMPTY_HIGH, high)


EMPTY_LOW, EMPTY_HIGH = np.int32(2**30), np.int32(-(2**30))
"""Range of a block that holds nothing: far apart enough for int32 arithmetic with any row."""


def block_range(values: Array, present: Array, block: int) -> tuple[Array, Array]:
    """Least and greatest of `values [..., T]` over the present places of each block: int32 `[..., blocks]` each."""
    length = values.shape[-1]
    short = -length % block
    pad = [(0, 0)] * (values.ndim - 1) + [(0, short)]
    split = (*values.shape[:-1], (length + short) // block, block)
    values = jnp.pad(values, pad).reshape(split)
    present = jnp.pad(present, pad).reshape(split)
    low = jnp.min(jnp.where(present, values, EMPTY_LOW), axis=-1)
    return low, jnp.max(jnp.where(present, values, EMPTY_HIGH), axis=-1)


def picture(mask: MaskSpec, q_info: TokenInfo, k_info: TokenInfo) -> str:
    """A drawing of `allowed`: one line per query, `1` where it sees the key; batch rows parted by an empty line."""
    seen = np.asarray(allowed(mask, q_info, k_info)).astype(int)
    return "\n\n".join("\n".join("".join(map(str, line)) for line in row) for row in seen)
