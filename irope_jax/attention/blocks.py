"""The block plan: into which tiles attention is cut, and which of them are visited in which order.

A tile is a block of queries times a block of keys, for some batch rows and key heads at once. What is known while
tracing (row order promised by `TokenInfo`) bounds the blocks of keys each block of queries visits; what only the
coordinates tell (packing, padding, permutations) is summarised per block (`Summary`) and decides at run time whether a
visited tile is computed. Everything here is O(blocks); no mathematics of attention lives here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.struct
import jax.numpy as jnp
import numpy as np

from irope_jax.attention.mask import Chunked, Global, MaskSpec, Sliding, block_range, row_bounds
from irope_jax.attention.panels import Panel
from irope_jax.core.types import PAD_SEGMENT, Array, TokenInfo

TILE = 2**18
"""Greatest number of scores in a tile: 1 MiB of float32, half of a usual level-2 cache."""

ROWS = 8
"""Batch rows that share a tile at least, if there are as many: a batch sharded over up to 8 devices by `jit` alone then
stays where it is. Over more devices wrap the call in `shard_map`."""

STEP = 2**13
"""What a visit costs beside its tile, in scores: the loop's bookkeeping."""

EDGE = 16
"""What a token on the edge of a tile costs, in scores: reading it, writing its sums."""

CACHE_MISS = 0.1
"""Share of a tile's cost that is added each time it is twice too large for `TILE`."""

BLOCKS = (32, 64, 128, 256, 512)
"""Block lengths to choose from."""


@dataclass(frozen=True)
class Pass:
    """Tiles of one size.

    Attributes:
      block_q, block_k: tokens per block of queries and of keys; at most the length of the axis. The last block of an
        axis reaches back over its neighbour instead of being padded; the overlap is ignored.
      low, high: for each block of queries the first and last block of keys to visit; none if low > high.
    """

    block_q: int
    block_k: int
    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def visits(self) -> int:
        """Tiles visited for one batch row and key head."""
        return sum(max(h - l + 1, 0) for l, h in zip(self.low, self.high))

    @property
    def rows_of_tiles(self) -> int:
        """Blocks of queries; each walks over the keys once."""
        return len(self.low)

    @property
    def entries(self) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
        """int32 arrays of equal length: a block of queries, and the first and last block of keys it visits."""
        blocks = [(i, l, h) for i, (l, h) in enumerate(zip(self.low, self.high)) if l <= h]
        return tuple(jnp.array(x, jnp.int32) for x in zip(*blocks))


@dataclass(frozen=True, eq=False)
class Route:
    """A `Pass` whose way is known only on its device: how many tiles is static, which ones is not.

    Attributes:
      block_q, block_k: tokens per block; they divide the axes.
      entries: as in `Pass`; every entry visits `width` blocks of keys. A block of queries may have several entries.
      width: blocks of keys per entry.
    """

    block_q: int
    block_k: int
    entries: tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]
    width: int

    @property
    def visits(self) -> int:
        return len(self.entries[0]) * self.width

    @property
    def rows_of_tiles(self) -> int:
        return len(self.entries[0])


@dataclass(frozen=True)
class BlockPlan:
    """Which tiles are visited: every visible pair of tokens in exactly one of them.

    Attributes:
      rows: batch rows per tile; divides the batch.
      heads: key heads (each with its group of query heads) per tile; divides the number of key heads.
      passes: walked one after the other, for instance large tiles inside and small ones along the diagonal.
      sure: every tile visited holds a visible pair, so that nothing is left to be skipped at run time.
    """

    rows: int
    heads: int
    passes: tuple[Pass | Route, ...]
    sure: bool = False

    def cost(self, batch: int, key_heads: int, group: int) -> float:
        """Scores computed, plus what reading, writing, looping and missing the cache cost in scores."""
        pairs = self.rows * self.heads * group
        tiles = batch * key_heads // (self.rows * self.heads)

        def visit(p: Pass) -> float:
            spill = 1 + CACHE_MISS * max(math.log2(pairs * p.block_q * p.block_k / TILE), 0)
            return pairs * (p.block_q * p.block_k * spill + EDGE * (p.block_q + p.block_k)) + STEP

        return tiles * sum(p.visits * visit(p) for p in self.passes)


def fold_length(mask: MaskSpec, q_info: TokenInfo, k_info: TokenInfo) -> int | None:
    """Chunk length if the sequence can be cut into chunks that see nothing of each other, all at the same places."""
    if not isinstance(mask, Chunked) or q_info.shape != k_info.shape or q_info.first_row is None:
        return None
    promised = all(mask.borders_known(info.document_multiple) for info in (q_info, k_info))
    starts = (q_info.first_row + mask.shift) % mask.size == 0 and q_info.first_row == k_info.first_row
    whole = q_info.shape[1] % mask.size == 0 and q_info.shape[1] >= mask.size
    return mask.size if promised and starts and whole else None


def fold(info: TokenInfo, length: int) -> TokenInfo:
    """The coordinates with every `length` tokens made a batch row of their own; rows count from 0 in each."""

    def cut(x):
        return x.reshape(-1, length)

    rows = (cut(info.rows) - info.first_row) % length
    return TokenInfo(cut(info.positions), cut(info.segments), rows, first_row=0, unbroken=info.unbroken)


def plan_blocks(mask: MaskSpec, q_info: TokenInfo, k_info: TokenInfo, key_heads: int, group: int) -> BlockPlan:
    """The plan of least `BlockPlan.cost` over the block lengths in `BLOCKS`."""
    batch, q_length = q_info.shape
    k_length = k_info.shape[1]
    ordered = q_info.first_row is not None and k_info.first_row is not None
    sure = ordered and isinstance(mask, Global) and q_info.unbroken and k_info.unbroken
    plans = []
    for block in BLOCKS:
        block_q, block_k = min(block, q_length), min(block, k_length)
        if q_length * 8 <= block:  # a few queries: long blocks of keys keep the number of visits low
            block_k = min(4 * block, k_length)
        size = tile(batch, key_heads, group, block_q * block_k)
        low, high = bounds(mask, q_info, k_info, block_q, block_k)
        plans.append(BlockPlan(*size, (Pass(block_q, block_k, low, high),), sure))
        if (passes := coarse_and_fine(mask, q_info, k_info, block)) is not None:
            plans.append(BlockPlan(*size, passes, sure))
        if block >= max(q_length, k_length):
            break
    return min(plans, key=lambda plan: plan.cost(batch, key_heads, group))


def plan_panels(
    panels: tuple[Panel, ...], mask: MaskSpec, q_info: TokenInfo, k_info: TokenInfo, key_heads: int, group: int
) -> BlockPlan:
    """The tiles that cover `panels`: one panel of all places, or panels of the past that may start anywhere."""
    if len(panels) == 1 and panels[0].relation == "same":
        # Rows may have gaps between places; nothing is visible that places in a row would not show.
        return plan_in_order(mask, q_info, k_info, key_heads, group)
    loose = lambda info: info.replace(first_row=None)
    block = route_block(panels, q_info.shape[0], key_heads, group)
    if block is None:  # visiting more tiles than the panels have is safe: coordinates decide
        return plan_blocks(mask, loose(q_info), loose(k_info), key_heads, group)
    width = panels[0].k_length // block
    index, low = [], []
    for panel in panels:
        steps = jnp.arange(panel.q_length // block, dtype=jnp.int32)
        index.append(panel.q_start // block + steps)
        low.append(jnp.broadcast_to(panel.k_start // block, steps.shape).astype(jnp.int32))
    index, low = jnp.concatenate(index), jnp.concatenate(low)
    sure = isinstance(mask, Global) and q_info.unbroken and k_info.unbroken
    rows, heads = tile(q_info.shape[0], key_heads, group, block * block)
    return BlockPlan(rows, heads, (Route(block, block, (index, low, low + width - 1), width),), sure)


def plan_in_order(mask: MaskSpec, q_info: TokenInfo, k_info: TokenInfo, key_heads: int, group: int) -> BlockPlan:
    """`plan_blocks` where rows rise with places from an unknown start: as of rows from 0 on, with a mask as wide."""
    from_0 = lambda info: info.replace(first_row=0, document_multiple=1)
    mask = Sliding(mask.size) if isinstance(mask, Chunked) else mask
    return plan_blocks(mask, from_0(q_info), from_0(k_info), key_heads, group)


def route_block(panels: tuple[Panel, ...], batch: int, key_heads: int, group: int) -> int | None:
    """Block length of least cost that divides every panel; `None` if none does or rows may stand in any order."""
    lengths = {p.q_length for p in panels} | {p.k_length for p in panels}
    if any(p.relation != "past" for p in panels) or len({p.k_length for p in panels}) != 1:
        return None
    common = math.gcd(*lengths)
    plans = {}
    for block in {*BLOCKS, *(common // n for n in range(1, 9) if common % n == 0)}:
        if common % block == 0 and block <= 2 * BLOCKS[-1]:
            size = tile(batch, key_heads, group, block * block)
            way = Pass(block, block, (0,) * (common // block), (common // block - 1,) * (common // block))
            plans[block] = BlockPlan(*size, (way,)).cost(batch, key_heads, group)
    return min(plans, key=plans.get) if plans else None


def coarse_and_fine(mask: MaskSpec, q_info: TokenInfo, k_info: TokenInfo, block: int) -> tuple[Pass, Pass] | None:
    """Tiles of `block` where everything may be visible, of half that along the diagonal; for `Global` with promises."""
    q_length, k_length, fine = q_info.shape[1], k_info.shape[1], block // 2
    if not isinstance(mask, Global) or q_info.first_row is None or k_info.first_row is None:
        return None
    if block < 256 or q_length % block or k_length % block:
        return None
    first = q_info.first_row - k_info.first_row + np.arange(q_length // block) * block
    inside = np.clip((first + 1) // block, 0, k_length // block)
    low, high = bounds(mask, q_info, k_info, fine, fine)
    low = np.maximum(low, 2 * np.repeat(inside, 2))
    return (
        Pass(block, block, (0,) * len(inside), tuple((inside - 1).tolist())),
        Pass(fine, fine, tuple(low.tolist()), high),
    )


def tile(batch: int, key_heads: int, group: int, scores: int) -> tuple[int, int]:
    """Batch rows and key heads that share a tile of `scores` per head: as many as `TILE` holds, but `ROWS` at least.

    All key heads share one that is at most twice as large: cutting a few from the rest costs more than the cache does.
    """
    room = max(TILE // (scores * group), 1)

    def divisors(n: int) -> list[int]:
        return [d for d in range(1, n + 1) if n % d == 0]

    rows = min(d for d in divisors(batch) if d >= min(batch, ROWS))
    heads = max(d for d in divisors(key_heads) if d <= max(room // rows, 1))
    heads = key_heads if rows * key_heads <= 2 * room else heads
    if heads == key_heads:
        rows = max(d for d in divisors(batch) if d % rows == 0 and d <= max(room // heads, rows))
    return rows, heads


def bounds(mask: MaskSpec, q_info: TokenInfo, k_info: TokenInfo, block_q: int, block_k: int):
    """First and last block of keys per block of queries, as tuples of ints; every block of keys without promises."""
    q_length, k_length = q_info.shape[1], k_info.shape[1]
    blocks_q, blocks_k = -(-q_length // block_q), -(-k_length // block_k)
    if q_info.first_row is None or k_info.first_row is None:
        return (0,) * blocks_q, (blocks_k - 1,) * blocks_q
    first = q_info.first_row + np.arange(blocks_q, dtype=np.int64) * block_q
    last = np.minimum(first + block_q, q_info.first_row + q_length) - 1
    aligned = [m for m in (q_info.document_multiple, k_info.document_multiple) if mask.borders_known(m)]
    low_row, high_row = row_bounds(mask, first, last, aligned[0] if len(aligned) == 2 else 1)
    if mask.reach is None:
        low_row = np.full_like(first, k_info.first_row)
    low = np.maximum((low_row - k_info.first_row) // block_k, 0)
    high = np.minimum((high_row - k_info.first_row) // block_k, blocks_k - 1)
    return tuple(low.tolist()), tuple(high.tolist())


@flax.struct.dataclass
class Summary:
    """What a visit needs to know about each block: int32 `[B, blocks]` each, over its tokens that are not padding.

    `padded` is 1 where some are. A range with low > high holds nothing. `label` is absent if the mask has none.
    """

    rows: tuple[Array, Array]
    segments: tuple[Array, Array]
    label: tuple[Array, Array] | None
    padded: Array


def summarise(mask: MaskSpec, info: TokenInfo, block: int) -> Summary:
    """`Summary` of each block of `block` tokens."""
    present = info.segments != PAD_SEGMENT
    label = mask.label(info)
    return Summary(
        rows=block_range(info.rows, present, block),
        segments=block_range(info.segments, present, block),
        label=None if label is None else block_range(label, present, block),
        padded=block_range((~present).astype(jnp.int32), jnp.ones_like(present), block)[1],
    )


SKIP, PLAIN, MASKED = 0, 1, 2
"""What a visit does: nothing is visible; everything is visible; the mask decides."""


def verdict(mask: MaskSpec, q: Summary, k: Summary) -> Array:
    """`SKIP`, `PLAIN` or `MASKED` for tiles whose blocks have the summaries `q` and `k`: int32 scalar."""
    (q_low, q_high), (k_low, k_high) = q.rows, k.rows
    apart = k_low > q_high
    whole = (q.padded == 0) & (k.padded == 0) & (k_high <= q_low)
    if mask.width is not None:
        apart |= k_high <= q_low - mask.width
        whole &= q_high - k_low < mask.width
    for a, b in ((q.segments, k.segments),) + (() if q.label is None else ((q.label, k.label),)):
        apart |= (a[0] > b[1]) | (b[0] > a[1])
        whole &= (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0])
    return jnp.where(jnp.all(apart), SKIP, jnp.where(jnp.all(whole), PLAIN, MASKED))
