"""Blockwise attention in plain JAX: runs anywhere, skips what nobody sees, memory linear in length.

One flat loop visits tiles (`blocks.BlockPlan`) with a static number of rounds; each visit slices its queries, keys and
coordinates, and folds the tile into running sums that live in the output's own layout (Dao et al. 2022; Rabe & Staats
2021). The backward pass walks the same tiles and recomputes the scores. `attend_blockwise` is differentiable;
`partial_blockwise` and `backward_blockwise` are its two halves, and `PIECES` the same two for those who fold over
pieces of keys (`panels`). Arithmetic is float32 whatever the inputs are.
"""

from __future__ import annotations

from functools import partial as bind
from functools import reduce

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from irope_jax.attention.blocks import BlockPlan, fold, fold_length, plan_blocks, plan_panels
from irope_jax.attention.mask import Global, MaskSpec
from irope_jax.attention.panels import Panel, Pieces
from irope_jax.attention.partial import Partial, finish
from irope_jax.attention.walk import Sizes, Walk
from irope_jax.core.types import Array, TokenInfo

FLOOR = -1e20
"""Running maxima start here instead of at -inf, so that differences are never undefined."""


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
    q_info, k_info = q_info.tied_to(q), k_info.tied_to(q)
    partial = _partial(q, k, v, q_info, k_info, mask, scale=scale, slopes=slopes, plan=plan)
    out = checkpoint_name(finish(partial, q.dtype), "attention_out")
    lse = checkpoint_name(partial.log_sum_exp, "attention_lse")
    return out, (q, k, v, q_info, k_info, slopes, out, lse)


def _attend_backward(mask, scale, plan, saved, dout):
    q, k, v, q_info, k_info, slopes, out, lse = saved
    grads = _backward(q, k, v, q_info, k_info, mask, lse=lse, out=out, dout=dout, scale=scale, slopes=slopes, plan=plan)
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
    return _fold(walks, Partial.empty(*q_BTNH.shape), q_BTNH, k_BSKH, v_BSKH, scale)


def fold_panels(
    acc: Partial,
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    panels: tuple[Panel, ...],
    *,
    scale: float,
    slopes: Array | None = None,
) -> Partial:
    """`panels.Pieces.fold`."""
    walks = _panel_walks(q_BTNH, k_BSKH, q_info, k_info, mask, slopes, panels)
    return _fold(walks, acc, q_BTNH, k_BSKH, v_BSKH, scale)


def _fold(walks: list[Walk], acc: Partial, q_BTNH, k_BSKH, v_BSKH, scale) -> Partial:
    walk = walks[0]
    q, k, v = walk.q_view.of(q_BTNH), walk.k_view.of(k_BSKH), walk.k_view.of(v_BSKH)

    def visit(walk, at, sums):
        out, top, total = sums
        k_tile, v_tile = walk.k_tile(k, at), walk.k_tile(v, at)

        def fold_in(masked, q_tile, k_tile, v_tile, out, top, total):
            score = walk.scores(at, q_tile, k_tile, masked)
            new_top = jnp.maximum(top, jnp.max(score, axis=-1))
            weight = jnp.exp(score - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            fresh = jnp.einsum("bkms,bksh->bkmh", weight, v_tile, preferred_element_type=jnp.float32)
            return out * shrink[..., None] + fresh, new_top, total * shrink + jnp.sum(weight, axis=-1)

        old = (walk.q_tile(out, at), walk.q_line(top, at), walk.q_line(total, at))
        new = walk.decide(
            at, lambda *a: a[3:], bind(fold_in, False), bind(fold_in, True),
            walk.q_tile(q, at) * scale, k_tile, v_tile, *old,
        )  # fmt: skip
        return walk.put_q(out, new[0], at), walk.put_line(top, new[1], at), walk.put_line(total, new[2], at)

    start = walk.q_view.of(acc.out), walk.line(jnp.maximum(acc.max, FLOOR)), walk.line(acc.sum)
    start = walk.like_inputs(start, q, k, v)
    out, top, total = reduce(lambda sums, walk: walk.loop(visit, sums), walks, start)
    total = walk.unline(total)
    top = jnp.where(total > 0, walk.unline(top), -jnp.inf)
    return Partial(out.reshape(acc.out.shape), top, total)


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
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    b, t, n, h = q_BTNH.shape
    dq, dk, dv = _contribute(walks, jnp.zeros((b, n, h, t)), q_BTNH, k_BSKH, v_BSKH, dout, lse, delta, scale)
    return jnp.moveaxis(dq, -1, 1), dk, dv


def contribute_panels(
    dq_BNHT: Array,
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    dout_BTNH: Array,
    lse_BTN: Array,
    delta_BTN: Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    panels: tuple[Panel, ...],
    *,
    scale: float,
    slopes: Array | None = None,
) -> tuple[Array, Array, Array]:
    """`panels.Pieces.contribute`."""
    walks = _panel_walks(q_BTNH, k_BSKH, q_info, k_info, mask, slopes, panels)
    return _contribute(walks, dq_BNHT, q_BTNH, k_BSKH, v_BSKH, dout_BTNH, lse_BTN, delta_BTN, scale)


def _contribute(walks: list[Walk], dq_BNHT, q_BTNH, k_BSKH, v_BSKH, dout_BTNH, lse, delta, scale):
    walk = walks[0]
    q, do = walk.q_view.of(q_BTNH), walk.q_view.of(dout_BTNH)
    k, v = walk.k_view.of(k_BSKH), walk.k_view.of(v_BSKH)
    delta, lse = walk.line(delta), walk.line(jnp.where(lse == -jnp.inf, 0.0, lse))

    def contribute(walk, masked, at, q_tile, k_tile, v_tile, do_tile, lse, delta):
        dot = bind(jnp.einsum, preferred_element_type=jnp.float32)
        weight = jnp.exp(walk.scores(at, q_tile, k_tile, masked, keys_first=True) - lse[:, :, None, :])
        d_score = weight * (dot("bksh,bkmh->bksm", v_tile, do_tile) - delta[:, :, None, :])
        return (
            dot("bkhs,bksm->bkhm", jnp.swapaxes(k_tile, 2, 3), d_score) * scale,
            dot("bksm,bkmh->bksh", d_score, q_tile),
            dot("bksm,bkmh->bksh", weight, do_tile),
        )

    def nothing(q_tile, k_tile, v_tile, *_):
        shapes = jnp.swapaxes(q_tile, 2, 3).shape, k_tile.shape, v_tile.shape
        return walk.like_inputs(tuple(map(jnp.zeros, shapes)), q, k, v, do)

    def visit(walk, at, sums):
        dq, dk, dv = sums
        tiles = (
            walk.q_tile(q, at) * scale, walk.k_tile(k, at), walk.k_tile(v, at), walk.q_tile(do, at),
            walk.q_line(lse, at), walk.q_line(delta, at),
        )  # fmt: skip
        fresh = walk.decide(
            at, nothing, bind(contribute, walk, False, at), bind(contribute, walk, True, at), *tiles
        )  # fmt: skip
        return walk.add_upright(dq, fresh[0], at), walk.add_k(dk, fresh[1], at), walk.add_k(dv, fresh[2], at)

    zeros = walk.k_view.of(jnp.zeros(walk.k_view.sizes))
    start = walk.like_inputs((walk.upright_view.of(dq_BNHT), zeros, zeros), q, k, v, do)
    dq, dk, dv = reduce(lambda sums, walk: walk.loop(visit, sums), walks, start)
    return dq.reshape(dq_BNHT.shape), dk.reshape(k_BSKH.shape), dv.reshape(v_BSKH.shape)


def _walks(q_BTNH, k_BSKH, q_info, k_info, mask, slopes, plan) -> list[Walk]:
    (b, t, n, h), (_, s, kv, _) = q_BTNH.shape, k_BSKH.shape
    plan = plan or plan_blocks(mask, q_info, k_info, kv, n // kv)
    sizes = Sizes(b, t, s, kv, n // kv, h)
    parts = [part for part in plan.passes if part.visits] or plan.passes[:1]
    return [Walk(sizes, q_info, k_info, mask, slopes, plan, part) for part in parts]


def _panel_walks(q_BTNH, k_BSKH, q_info, k_info, mask, slopes, panels) -> list[Walk]:
    kv = k_BSKH.shape[2]
    plan = plan_panels(panels, mask, q_info, k_info, kv, q_BTNH.shape[2] // kv)
    return _walks(q_BTNH, k_BSKH, q_info, k_info, mask, slopes, plan)


def _traced_once(function):
    """Layers of one mask and one shape are traced once; what is compiled is as if each were."""
    return jax.jit(function, static_argnames=("mask", "scale", "plan"), inline=True)


_partial, _backward = _traced_once(partial_blockwise), _traced_once(backward_blockwise)

PIECES = Pieces(fold=fold_panels, contribute=contribute_panels, head_major=False, dq_axes="BNHT")
