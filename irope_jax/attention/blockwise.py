"""Blockwise attention in plain JAX: runs anywhere, skips what nobody sees, memory linear in length.

One flat loop visits tiles (`blocks.BlockPlan`) with a static number of rounds; each visit slices its queries, keys and
coordinates, and folds the tile into running sums that live in the output's own layout (Dao et al. 2022; Rabe & Staats
2021). The backward pass walks the same tiles and recomputes the scores. `attend_blockwise` is differentiable;
`partial_blockwise` and `backward_blockwise` are its two halves for those who fold over pieces of keys themselves.
Arithmetic is float32 whatever the inputs are. Which tiles are visited is decided in `blocks`.
"""

from __future__ import annotations

from functools import partial as bind
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from irope_jax.attention.blocks import (
    PLAIN,
    BlockPlan,
    Pass,
    fold,
    fold_length,
    plan_blocks,
    summarise,
    verdict,
)
from irope_jax.attention.mask import Global, MaskSpec, allowed
from irope_jax.attention.partial import Partial, finish
from irope_jax.core.types import PAD_SEGMENT, Array, TokenInfo

FLOOR = -1e20
"""Running maxima start here instead of at -inf, so that differences are never undefined."""

HIDDEN = -1e30
"""Score of a pair that must not see each other: so far below `FLOOR` that its weight is exactly 0."""


def attend_blockwise(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    *,
    scale: float,
    slopes: Array | None = None,
    plan: BlockPlan | None = None,
) -> Array:
    """Attention output `[B, T, N, H]` in the type of the queries. No gradient flows to `slopes`."""
    b, t, n, h = q_BTNH.shape
    kv = k_BSKH.shape[2]
    if plan is None and (length := fold_length(mask, q_info, k_info)) is not None:

        def cut(x):
            return x.reshape(-1, length, *x.shape[2:])

        q_BTNH, k_BSKH, v_BSKH = cut(q_BTNH), cut(k_BSKH), cut(v_BSKH)
        q_info, k_info, mask = fold(q_info, length), fold(k_info, length), Global()
    plan = plan or plan_blocks(mask, q_info, k_info, kv, n // kv)
    out = _attend(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, slopes, mask, scale, plan)
    return out.reshape(b, t, n, h)


@bind(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attend(q, k, v, q_info, k_info, slopes, mask, scale, plan):
    return _attend_forward(q, k, v, q_info, k_info, slopes, mask, scale, plan)[0]


def _attend_forward(q, k, v, q_info, k_info, slopes, mask, scale, plan):
    partial = partial_blockwise(q, k, v, q_info, k_info, mask, scale=scale, slopes=slopes, plan=plan)
    out = checkpoint_name(finish(partial, q.dtype), "attention_out")
    lse = checkpoint_name(partial.log_sum_exp, "attention_lse")
    return out, (q, k, v, q_info, k_info, slopes, out, lse)


def _attend_backward(mask, scale, plan, saved, dout):
    q, k, v, q_info, k_info, slopes, out, lse = saved
    grads = backward_blockwise(
        q, k, v, q_info, k_info, mask, lse=lse, out=out, dout=dout, scale=scale, slopes=slopes, plan=plan
    )
    dq, dk, dv = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v)))
    return dq, dk, dv, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def partial_blockwise(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    *,
    scale: float,
    slopes: Array | None = None,
    plan: BlockPlan | None = None,
) -> Partial:
    """Unfinished attention of the queries to this piece of the keys. Not differentiable: see `backward_blockwise`.

    Args:
      q_BTNH, k_BSKH, v_BSKH: any float type; N is a multiple of K, query head `n` reads key head `n // (N / K)`.
      q_info, k_info: coordinates `[B, T]` and `[B, S]`.
      scale: factor on the scores.
      slopes: float32 `[N]`; adds `-slope * (row_q - row_k)` to the scores (ALiBi, Press et al. 2021).
      plan: tiles to visit; by default the cheapest plan for these shapes and promises.
    """
    walks = _walks(q_BTNH, k_BSKH, q_info, k_info, mask, slopes, plan)
    walk = walks[0]
    q = walk.queries(q_BTNH)
    # keys that are read once (decoding) are read where they stand; otherwise a head-major copy pays
    keys, read = (walk.split_keys, _Walk.get_k) if len(walk.part.low) == 1 else (walk.keys, _Walk.k_tile)
    k, v = keys(k_BSKH), keys(v_BSKH)

    def visit(walk, at, sums):
        out, top, total = sums
        k_tile, v_tile = read(walk, k, at), read(walk, v, at)

        def fold_in(masked, q_tile, k_tile, v_tile, out, top, total):
            score = walk.scores(at, q_tile, k_tile, masked)
            new_top = jnp.maximum(top, jnp.max(score, axis=-1))
            weight = jnp.exp(score - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            fresh = jnp.einsum("bkms,bksh->bkmh", weight, v_tile, preferred_element_type=jnp.float32)
            return out * shrink[..., None] + fresh, new_top, total * shrink + jnp.sum(weight, axis=-1)

        old = (walk.get_q(out, at), walk.q_line(top, at), walk.q_line(total, at))
        new = lax.switch(
            walk.verdict(at),
            (lambda *a: a[3:], bind(fold_in, False), bind(fold_in, True)),
            walk.q_tile(q, at) * scale, k_tile, v_tile, *old,
        )  # fmt: skip
        return walk.put_q(out, new[0], at), walk.put_line(top, new[1], at), walk.put_line(total, new[2], at)

    zeros = jnp.zeros(walk.split_queries(q_BTNH).shape)
    start = walk.like_inputs((zeros, walk.line(FLOOR), walk.line(0.0)), v_BSKH)
    out, top, total = reduce(lambda sums, walk: walk.loop(visit, sums), walks, start)
    total = walk.unline(total)
    top = jnp.where(total > 0, walk.unline(top), -jnp.inf)
    return Partial(out.reshape(q_BTNH.shape), top, total)


def backward_blockwise(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    *,
    lse: Array,
    out: Array,
    dout: Array,
    scale: float,
    slopes: Array | None = None,
    plan: BlockPlan | None = None,
) -> tuple[Array, Array, Array]:
    """What this piece of the keys contributes to the gradients: float32 `dq [B,T,N,H]`, `dk` and `dv [B,S,K,H]`.

    Args:
      lse: float32 `[B, T, N]`, `log_sum_exp` over all keys, not only this piece.
      out, dout: finished output `[B, T, N, H]` and its cotangent.
      others: as for `partial_blockwise`. `dq` of all pieces add up; `dk` and `dv` are complete for this piece.
    """
    walks = _walks(q_BTNH, k_BSKH, q_info, k_info, mask, slopes, plan)
    walk = walks[0]
    q, k, v, do = walk.queries(q_BTNH), walk.keys(k_BSKH), walk.keys(v_BSKH), walk.queries(dout)
    k_upright = jnp.moveaxis(k, 4, 5)
    delta = walk.line(jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1))
    lse = walk.line(jnp.where(lse == -jnp.inf, 0.0, lse))

    def contribute(walk, masked, at, q_tile, k_tile, v_tile, do_tile, k_upright, lse, delta):
        dot = bind(jnp.einsum, preferred_element_type=jnp.float32)
        weight = jnp.exp(walk.scores(at, q_tile, k_tile, masked, keys_first=True) - lse[:, :, None, :])
        d_score = weight * (dot("bksh,bkmh->bksm", v_tile, do_tile) - delta[:, :, None, :])
        return (
            dot("bkhs,bksm->bkhm", k_upright, d_score),
            dot("bksm,bkmh->bksh", d_score, q_tile),
            dot("bksm,bkmh->bksh", weight, do_tile),
        )

    def nothing(q_tile, k_tile, v_tile, *_):
        shapes = jnp.swapaxes(q_tile, 2, 3).shape, k_tile.shape, v_tile.shape
        return walk.like_inputs(tuple(map(jnp.zeros, shapes)), v, do)

    def visit(walk, at, sums):
        dq, dk, dv = sums
        tiles = (
            walk.q_tile(q, at) * scale, walk.k_tile(k, at), walk.k_tile(v, at), walk.q_tile(do, at),
            walk.k_upright_tile(k_upright, at), walk.q_line(lse, at), walk.q_line(delta, at),
        )  # fmt: skip
        fresh = lax.switch(
            walk.verdict(at), (nothing, bind(contribute, walk, False, at), bind(contribute, walk, True, at)), *tiles
        )
        return walk.add_upright(dq, fresh[0], at), walk.add_k(dk, fresh[1], at), walk.add_k(dv, fresh[2], at)

    shapes = jnp.moveaxis(q, 5, 6).shape, walk.split_keys(k_BSKH).shape, walk.split_keys(v_BSKH).shape
    zeros = tuple(map(jnp.zeros, shapes))
    start = walk.like_inputs(zeros, v_BSKH, dout)
    dq, dk, dv = reduce(lambda sums, walk: walk.loop(visit, sums), walks, start)
    return (jnp.moveaxis(dq, -1, 2) * scale).reshape(q_BTNH.shape), dk.reshape(k_BSKH.shape), dv.reshape(v_BSKH.shape)


def _walks(q_BTNH, k_BSKH, q_info, k_info, mask, slopes, plan):
    plan = plan or plan_blocks(mask, q_info, k_info, k_BSKH.shape[2], q_BTNH.shape[2] // k_BSKH.shape[2])
    walks = [_Walk(q_BTNH, k_BSKH, q_info, k_info, mask, slopes, plan, part) for part in plan.passes if part.visits]
    return walks or [_Walk(q_BTNH, k_BSKH, q_info, k_info, mask, slopes, plan, plan.passes[0])]


class _Walk:
    """Geometry of the loop: how the arrays are seen, sliced and written at a visit. Holds no running state.

    Axes are split as `B = (b, row tile)`, `N = (k, head tile, g)`, the tile index minor, so that a batch or head axis
    that is sharded over devices stays sharded as long as a tile holds a multiple of the devices. A tile has the axes
    `b k m h` for queries (`m` = group and place) and `b k s h` for keys. `at` is `(row tile, head tile, i, j)`.
    """

    def __init__(self, q_BTNH, k_BSKH, q_info, k_info, mask, slopes, plan: BlockPlan, part: Pass):
        self.batch, self.t, n, self.h = q_BTNH.shape
        _, self.s, self.kv, _ = k_BSKH.shape
        self.g = n // self.kv
        self.mask, self.plan, self.part = mask, plan, part
        self.row_tiles, self.head_tiles = self.batch // plan.rows, self.kv // plan.heads
        self.sources = (q_BTNH, k_BSKH, q_info.rows, q_info.segments, k_info.rows, k_info.segments)
        self.q_summary = self._split_rows(summarise(mask, q_info, part.block_q))
        self.k_summary = self._split_rows(summarise(mask, k_info, part.block_k))
        self.q_info, self.k_info = self._split_rows(q_info), self._split_rows(k_info)
        self.slopes = None
        if slopes is not None:
            self.slopes = lax.stop_gradient(slopes).astype(jnp.float32).reshape(plan.heads, self.head_tiles, self.g)

    def _split_rows(self, tree):
        return jax.tree.map(lambda x: x.reshape(self.plan.rows, self.row_tiles, *x.shape[1:]), tree)

    def queries(self, x_BTNH):
        """`[rows, row tiles, heads, head tiles, g, T, h]`: head-major, so that a tile is read in long runs."""
        return jnp.moveaxis(self.split_queries(x_BTNH), 2, 5)

    def keys(self, x_BSKH):
        """`[rows, row tiles, heads, head tiles, S, h]`."""
        return jnp.moveaxis(self.split_keys(x_BSKH), 2, 4)

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
        p = self.part
        rounds = p.visits * self.row_tiles * self.head_tiles
        if not rounds:
            return sums
        blocks = [(i, l, h) for i, (l, h) in enumerate(zip(p.low, p.high)) if l <= h]
        index, low, high = (jnp.array(x, jnp.int32) for x in zip(*blocks))

        def step(state, _):
            (r, n, c, j), sums = state
            sums = visit(self, (r, n, index[c], j), sums)
            next_c = j == high[c]
            next_n = next_c & (c == len(blocks) - 1)
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

    def verdict(self, at):
        """What to do with the tile; one that repeats places of its neighbour is never taken as wholly visible."""
        r, _, i, j = at

        def pick(tree, block):
            return jax.tree.map(lambda x: x[:, r, block], tree)

        choice = verdict(self.mask, pick(self.q_summary, i), pick(self.k_summary, j))
        repeats = (j * self.part.block_k > self.s - self.part.block_k) | (
            i * self.part.block_q > self.t - self.part.block_q
        )
        return jnp.where(repeats & (choice == PLAIN), PLAIN + 1, choice)

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
