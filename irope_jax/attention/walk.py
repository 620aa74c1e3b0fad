"""The walk over tiles: how arrays are seen, sliced and written at a visit.

Which tiles there are is decided in `blocks`; what is computed at a visit, in `blockwise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from irope_jax.attention.blocks import MASKED, PLAIN, BlockPlan, Pass, Route, summarise, verdict
from irope_jax.attention.mask import allowed
from irope_jax.core.types import PAD_SEGMENT

HIDDEN = -1e30
"""Score of a pair that must not see each other: so far below the running maxima that its weight is exactly 0."""


class Sizes(NamedTuple):
    """Axes of an attention: batch, queries, keys, key heads, query heads per key head, width."""

    batch: int
    t: int
    s: int
    kv: int
    g: int
    h: int


@dataclass(frozen=True)
class View:
    """An array that a loop carries, and the tile of it that a visit reads or writes.

    Attributes:
      sizes: axes of the array as the walk thinks of them.
      tile: axes of a tile.

    Axes of size 1 are left out of the array itself: compilers give them layouts that differ in nothing, and copy the
    whole array from one to the other at the door of each loop.
    """

    sizes: tuple[int, ...]
    tile: tuple[int, ...]

    @property
    def kept(self) -> list[int]:
        return [i for i, size in enumerate(self.sizes) if size > 1] or [0]

    def of(self, x):
        """The array as the loop carries it."""
        return x.reshape([self.sizes[i] for i in self.kept])

    def full(self, x):
        """The array with all its axes again."""
        return x.reshape(self.sizes)

    def _pick(self, values: Sequence) -> list:
        return [values[i] for i in self.kept]

    def read(self, x, start: Sequence):
        """The tile that begins at `start`, with all its axes."""
        return lax.dynamic_slice(x, self._pick(start), self._pick(self.tile)).reshape(self.tile)

    def write(self, x, tile, start: Sequence):
        """The array with a tile put at `start`."""
        return lax.dynamic_update_slice(x, tile.reshape(self._pick(self.tile)), self._pick(start))


class Walk:
    """Geometry of the loop: how the arrays are seen, sliced and written at a visit. Holds no running state.

    Axes are split as `B = (b, row tile)`, `N = (k, head tile, g)`, the tile index minor, so that a batch or head axis
    that is sharded over devices stays sharded as long as a tile holds a multiple of the devices. A tile has the axes
    `b k m h` for queries (`m` = group and place) and `b k s h` for keys. `at` is `(row tile, head tile, i, j)`.
    """

    def __init__(self, sizes: Sizes, q_info, k_info, mask, slopes, plan: BlockPlan, part: Pass | Route):
        self.batch, self.t, self.s, self.kv, self.g, self.h = sizes
        self.mask, self.plan, self.part = mask, plan, part
        self.row_tiles, self.head_tiles = self.batch // plan.rows, self.kv // plan.heads
        self.sources = (q_info.rows, q_info.segments, k_info.rows, k_info.segments)
        self.q_summary = self._split_rows(summarise(mask, q_info, part.block_q))
        self.k_summary = self._split_rows(summarise(mask, k_info, part.block_k))
        self.q_info, self.k_info = self._split_rows(q_info), self._split_rows(k_info)
        self.slopes = None
        if slopes is not None:
            self.slopes = lax.stop_gradient(slopes).astype(jnp.float32).reshape(plan.heads, self.head_tiles, self.g)
        b, bt, k, kt = plan.rows, self.row_tiles, plan.heads, self.head_tiles
        g, t, s, h, bq, bk = self.g, self.t, self.s, self.h, part.block_q, part.block_k
        self.q_view = View((b, bt, t, k, kt, g, h), (b, 1, bq, k, 1, g, h))
        self.k_view = View((b, bt, s, k, kt, h), (b, 1, bk, k, 1, h))
        # width before place: what the product that makes it gives fastest
        self.upright_view = View((b, bt, k, kt, g, h, t), (b, 1, k, 1, g, h, bq))
        # numbers per query, places last
        self.line_view = View((b, bt, k, kt, g, t), (b, 1, k, 1, g, bq))

    def _split_rows(self, tree):
        return jax.tree.map(lambda x: x.reshape(self.plan.rows, self.row_tiles, *x.shape[1:]), tree)

    def line(self, x_BTN):
        """Per-query numbers with places last."""
        p = self.plan
        shape = (p.rows, self.row_tiles, self.t, p.heads, self.head_tiles, self.g)
        x_BTN = jnp.broadcast_to(x_BTN, (self.batch, self.t, self.kv * self.g))
        return self.line_view.of(jnp.moveaxis(x_BTN.reshape(shape), 2, -1))

    def unline(self, x):
        """Back to `[B, T, N]`."""
        return jnp.moveaxis(self.line_view.full(x), -1, 2).reshape(self.batch, self.t, self.kv * self.g)

    def like_inputs(self, tree, *more):
        """The same values, varying over the same mesh axes as the inputs: what a loop inside `shard_map` must carry."""
        nothing = sum(jnp.zeros_like(x.reshape(-1)[0], jnp.float32) for x in (*self.sources, *more))
        return jax.tree.map(lambda x: x + nothing, tree)

    def loop(self, visit, sums):
        """Folds `visit(walk, at, sums)` over the tiles of this pass."""
        rounds = self.part.visits * self.row_tiles * self.head_tiles
        if not rounds:
            return sums
        index, low, high = self.part.entries
        entries = len(index)

        def step(state, _):
            (r, n, c, j), sums = state
            sums = visit(self, (r, n, index[c], j), sums)
            next_c = j == high[c]
            next_n = next_c & (c == entries - 1)
            next_r = next_n & (n == self.head_tiles - 1)
            c = jnp.where(next_n, 0, c + next_c)
            n = jnp.where(next_r, 0, n + next_n)
            return ((r + next_r, n, c, jnp.where(next_c, low[c], j + 1)), sums), None

        zero = jnp.zeros((), jnp.int32)
        if rounds == 1:
            return visit(self, (zero, zero, index[0], low[0]), sums)
        return lax.scan(step, ((zero, zero, zero, low[0]), sums), length=rounds)[0][1]

    def q_start(self, i):
        return jnp.minimum(i * self.part.block_q, self.t - self.part.block_q)

    def k_start(self, j):
        return jnp.minimum(j * self.part.block_k, self.s - self.part.block_k)

    def q_tile(self, x, at):
        """`[b, k, m, h]` of an array in `q_view`."""
        r, n, i, _ = at
        x = self.q_view.read(x, (0, r, self.q_start(i), 0, n, 0, 0)).astype(jnp.float32)
        x = x[:, 0, :, :, 0].transpose(0, 2, 3, 1, 4)
        return x.reshape(self.plan.rows, self.plan.heads, self.g * self.part.block_q, self.h)

    def put_q(self, x, tile, at):
        """Writes `[b, k, m, h]` into an array in `q_view`."""
        r, n, i, _ = at
        tile = tile.reshape(self.plan.rows, self.plan.heads, self.g, self.part.block_q, self.h)
        return self.q_view.write(x, tile.transpose(0, 3, 1, 2, 4), (0, r, self.q_start(i), 0, n, 0, 0))

    def add_upright(self, x, tile, at):
        """Adds `[b, k, h, m]` to sums in `upright_view`."""
        r, n, i, _ = at
        start = (0, r, 0, n, 0, 0, self.q_start(i))
        tile = tile.reshape(self.plan.rows, self.plan.heads, self.h, self.g, self.part.block_q)
        old = self.upright_view.read(x, start)
        return self.upright_view.write(x, old + tile.transpose(0, 1, 3, 2, 4)[:, None, :, None], start)

    def k_tile(self, x, at):
        """`[b, k, s, h]` of an array in `k_view`."""
        r, n, _, j = at
        x = self.k_view.read(x, (0, r, self.k_start(j), 0, n, 0))[:, 0, :, :, 0].astype(jnp.float32)
        return x.transpose(0, 2, 1, 3)

    def add_k(self, x, tile, at):
        """Adds `[b, k, s, h]` to sums in `k_view`."""
        r, n, _, j = at
        start = (0, r, self.k_start(j), 0, n, 0)
        tile = tile.transpose(0, 2, 1, 3)[:, None, :, :, None]
        return self.k_view.write(x, self.k_view.read(x, start) + tile, start)

    def q_line(self, x, at):
        r, n, i, _ = at
        x = self.line_view.read(x, (0, r, 0, n, 0, self.q_start(i)))
        return x.reshape(self.plan.rows, self.plan.heads, self.g * self.part.block_q)

    def put_line(self, x, line, at):
        r, n, i, _ = at
        return self.line_view.write(x, line, (0, r, 0, n, 0, self.q_start(i)))

    def decide(self, at, nothing, plain, masked, *operands):
        """What `nothing`, `plain` or `masked` makes of the operands, by what is visible in the tile.

        A tile that repeats places of its neighbour is never taken as wholly visible.
        """
        r, _, i, j = at

        def pick(tree, block):  # not by indexing, which traces a gather and its bounds for each of a dozen arrays
            slices = lambda x: lax.dynamic_slice(x, (0, r, block, *[0] * (x.ndim - 3)), (len(x), 1, 1, *x.shape[3:]))
            return jax.tree.map(lambda x: slices(x)[:, 0, 0], tree)

        choice = verdict(self.mask, pick(self.q_summary, i), pick(self.k_summary, j))
        repeats = (j * self.part.block_k > self.s - self.part.block_k) | (
            i * self.part.block_q > self.t - self.part.block_q
        )
        if self.plan.sure:  # every device then does the same work at every visit
            return lax.cond(repeats | (choice != PLAIN), masked, plain, *operands)
        choice = jnp.where(repeats & (choice == PLAIN), MASKED, choice)
        return lax.switch(choice, (nothing, plain, masked), *operands)

    def _coordinates(self, info, row_tile, start, nominal, size):
        def cut(x):
            return lax.dynamic_slice(x, (0, row_tile, start), (self.plan.rows, 1, size))[:, 0]

        info = jax.tree.map(cut, info)
        fresh = start + jnp.arange(size, dtype=jnp.int32) >= nominal
        return info.replace(segments=jnp.where(fresh, info.segments, PAD_SEGMENT))

    def scores(self, at, q_tile, k_tile, masked, keys_first=False):
        """Scores `[b, k, m, s]` (or `[b, k, s, m]`) of a tile of scaled queries; `HIDDEN` where masked and not allowed.

        Places that the previous block has had already count as hidden: what they contribute adds up.
        """
        r, n, i, j = at
        p = self.plan
        if keys_first:
            score = jnp.einsum("bksh,bkmh->bksm", k_tile, q_tile, preferred_element_type=jnp.float32)
        else:
            score = jnp.einsum("bkmh,bksh->bkms", q_tile, k_tile, preferred_element_type=jnp.float32)
        if not masked and self.slopes is None:
            return score
        q = self._coordinates(self.q_info, r, self.q_start(i), i * self.part.block_q, self.part.block_q)
        k = self._coordinates(self.k_info, r, self.k_start(j), j * self.part.block_k, self.part.block_k)
        # axes b k g q s, or b k s g q
        place = (lambda x: jnp.swapaxes(x, 1, 2)[:, None, :, None]) if keys_first else (lambda x: x[:, None, None])
        shape = score.shape
        block_q, block_k = self.part.block_q, self.part.block_k
        split = (block_k, self.g, block_q) if keys_first else (self.g, block_q, block_k)
        score = score.reshape(p.rows, p.heads, *split)
        if self.slopes is not None:
            slopes = lax.dynamic_slice(self.slopes, (0, n, 0), (p.heads, 1, self.g))
            slopes = slopes[..., None] if keys_first else slopes[:, 0, :, None, None]
            score -= slopes * place((q.rows[:, :, None] - k.rows[:, None, :]).astype(jnp.float32))
        if masked:
            score = jnp.where(place(allowed(self.mask, q, k)), score, HIDDEN)
        return score.reshape(shape)
