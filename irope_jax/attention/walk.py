"""The walk over tiles: how arrays are seen, sliced and written at a visit.

Which tiles there are is decided in `blocks`; what is computed at a visit, in `blockwise`.
"""

from __future__ import annotations

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

    def _split_rows(self, tree):
        return jax.tree.map(lambda x: x.reshape(self.plan.rows, self.row_tiles, *x.shape[1:]), tree)

    def queries(self, x_BNTH):
        """`[rows, row tiles, heads, head tiles, g, T, h]`: head-major, so that a tile is read in long runs."""
        p = self.plan
        return x_BNTH.reshape(p.rows, self.row_tiles, p.heads, self.head_tiles, self.g, self.t, self.h)

    def keys(self, x_BKSH):
        """`[rows, row tiles, heads, head tiles, S, h]`."""
        p = self.plan
        return x_BKSH.reshape(p.rows, self.row_tiles, p.heads, self.head_tiles, self.s, self.h)

    def split_queries(self, x_BTNH):
        p = self.plan
        return x_BTNH.reshape(p.rows, self.row_tiles, self.t, p.heads, self.head_tiles, self.g, self.h)

    def split_keys(self, x_BSKH):
        p = self.plan
        return x_BSKH.reshape(p.rows, self.row_tiles, self.s, p.heads, self.head_tiles, self.h)

    def line(self, x_BTN):
        """Per-query numbers with places last: `[rows, row tiles, heads, head tiles, g, T]`."""
        p = self.plan
        shape = (p.rows, self.row_tiles, self.t, p.heads, self.head_tiles, self.g)
        return jnp.moveaxis(jnp.broadcast_to(x_BTN, (self.batch, self.t, self.kv * self.g)).reshape(shape), 2, -1)

    def unline(self, x):
        return jnp.moveaxis(x, -1, 2).reshape(self.batch, self.t, self.kv * self.g)

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
        """`[b, k, m, h]` of an array in the layout of `queries`."""
        r, n, i, _ = at
        p = self.plan
        size = (p.rows, 1, p.heads, 1, self.g, self.part.block_q, self.h)
        x = lax.dynamic_slice(x, (0, r, 0, n, 0, self.q_start(i), 0), size).astype(jnp.float32)
        return x.reshape(p.rows, p.heads, self.g * self.part.block_q, self.h)

    def get_q(self, x, at):
        """`[b, k, m, h]` of an array in the caller's layout (`split_queries`)."""
        r, n, i, _ = at
        p = self.plan
        size = (p.rows, 1, self.part.block_q, p.heads, 1, self.g, self.h)
        x = lax.dynamic_slice(x, (0, r, self.q_start(i), 0, n, 0, 0), size)
        x = x.reshape(p.rows, self.part.block_q, p.heads, self.g, self.h).transpose(0, 2, 3, 1, 4)
        return x.reshape(p.rows, p.heads, self.g * self.part.block_q, self.h)

    def put_q(self, x, tile, at):
        r, n, i, _ = at
        p = self.plan
        tile = tile.reshape(p.rows, p.heads, self.g, self.part.block_q, self.h).transpose(0, 3, 1, 2, 4)
        return lax.dynamic_update_slice(x, tile[:, None, :, :, None], (0, r, self.q_start(i), 0, n, 0, 0))

    def add_upright(self, x, tile, at):
        """Adds `[b, k, h, m]` to sums kept as `[rows, row tiles, heads, head tiles, g, h, T]`."""
        r, n, i, _ = at
        p = self.plan
        start = (0, r, 0, n, 0, 0, self.q_start(i))
        old = lax.dynamic_slice(x, start, (p.rows, 1, p.heads, 1, self.g, self.h, self.part.block_q))
        tile = tile.reshape(p.rows, p.heads, self.h, self.g, self.part.block_q).transpose(0, 1, 3, 2, 4)
        return lax.dynamic_update_slice(x, old + tile[:, None, :, None], start)

    def k_upright_tile(self, x, at):
        """Keys `[b, k, h, s]` of an array kept as `[rows, row tiles, heads, head tiles, h, S]`."""
        r, n, _, j = at
        p = self.plan
        size = (p.rows, 1, p.heads, 1, self.h, self.part.block_k)
        x = lax.dynamic_slice(x, (0, r, 0, n, 0, self.k_start(j)), size).astype(jnp.float32)
        return x.reshape(p.rows, p.heads, self.h, self.part.block_k)

    def k_tile(self, x, at):
        """`[b, k, s, h]` of an array in the layout of `keys`."""
        r, n, _, j = at
        p = self.plan
        size = (p.rows, 1, p.heads, 1, self.part.block_k, self.h)
        x = lax.dynamic_slice(x, (0, r, 0, n, self.k_start(j), 0), size).astype(jnp.float32)
        return x.reshape(p.rows, p.heads, self.part.block_k, self.h)

    def get_k(self, x, at):
        """`[b, k, s, h]` of an array in the caller's layout (`split_keys`)."""
        r, n, _, j = at
        p = self.plan
        size = (p.rows, 1, self.part.block_k, p.heads, 1, self.h)
        x = lax.dynamic_slice(x, (0, r, self.k_start(j), 0, n, 0), size).astype(jnp.float32)
        return x.reshape(p.rows, self.part.block_k, p.heads, self.h).transpose(0, 2, 1, 3)

    def add_k_tile(self, x, tile, at):
        """Adds `[b, k, s, h]` to sums in the layout of `keys`."""
        r, n, _, j = at
        p = self.plan
        start = (0, r, 0, n, self.k_start(j), 0)
        old = lax.dynamic_slice(x, start, (p.rows, 1, p.heads, 1, self.part.block_k, self.h))
        return lax.dynamic_update_slice(x, old + tile[:, None, :, None], start)

    def add_k(self, x, tile, at):
        """Adds `[b, k, s, h]` to sums in the caller's layout (`split_keys`)."""
        r, n, _, j = at
        p = self.plan
        start = (0, r, self.k_start(j), 0, n, 0)
        old = lax.dynamic_slice(x, start, (p.rows, 1, self.part.block_k, p.heads, 1, self.h))
        return lax.dynamic_update_slice(x, old + tile.transpose(0, 2, 1, 3)[:, None, :, :, None], start)

    def q_line(self, x, at):
        r, n, i, _ = at
        p = self.plan
        size = (p.rows, 1, p.heads, 1, self.g, self.part.block_q)
        x = lax.dynamic_slice(x, (0, r, 0, n, 0, self.q_start(i)), size)
        return x.reshape(p.rows, p.heads, self.g * self.part.block_q)

    def put_line(self, x, line, at):
        r, n, i, _ = at
        p = self.plan
        line = line.reshape(p.rows, 1, p.heads, 1, self.g, self.part.block_q)
        return lax.dynamic_update_slice(x, line, (0, r, 0, n, 0, self.q_start(i)))

    def decide(self, at, nothing, plain, masked, *operands):
        """What `nothing`, `plain` or `masked` makes of the operands, by what is visible in the tile.

        A tile that repeats places of its neighbour is never taken as wholly visible.
        """
        r, _, i, j = at

        def pick(tree, block):
            return jax.tree.map(lambda x: x[:, r, block], tree)

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
