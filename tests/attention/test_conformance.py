"""Every implementation against the float64 oracle: outputs and gradients, over masks and layouts."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.attention import attend
from irope_jax.attention.api import IMPLEMENTATIONS
from irope_jax.attention.blocks import BlockPlan, Pass, bounds, coarse_and_fine
from irope_jax.attention.blockwise import attend_blockwise, backward_blockwise, partial_blockwise
from irope_jax.attention.cases import CASES, LAYOUTS, MASKS, AttentionCase, build
from irope_jax.attention.mask import Chunked, Global, Sliding
from irope_jax.attention.partial import finish, merge
from irope_jax.attention.reference import partial_reference
from irope_jax.core.types import TokenInfo
from tests.oracles import attention as oracle

SCALE = 0.6


def rule(mask):
    fields = {name: getattr(mask, name) for name in ("size", "by", "shift") if hasattr(mask, name)}
    return {"kind": mask.kind, **fields}


def places(info):
    return np.stack([np.asarray(x) for x in (info.positions, info.segments, info.rows)], axis=-1)


@cache
def expected(case, slopes=None):
    x = build(case)
    return oracle.attention(
        x.q_BTNH, x.k_BSKH, x.v_BSKH, places(x.q_info), places(x.k_info), rule(x.mask),
        scale=SCALE, slopes=slopes, dout=np.asarray(x.dout_BTNH, np.float64),
    )  # fmt: skip


SMALL = "blockwise in small tiles"


def in_small_tiles(q, k, v, q_info, k_info, mask, *, scale, slopes):
    """The sizes of the cases fit into one tile; this cuts them into many, of which the last ones overlap."""
    block_q, block_k = min(20, q.shape[1]), min(12, k.shape[1])
    plan = BlockPlan(1, 1, (Pass(block_q, block_k, *bounds(mask, q_info, k_info, block_q, block_k)),))
    return attend_blockwise(q, k, v, q_info, k_info, mask, scale=scale, slopes=slopes, plan=plan)


@partial(jax.jit, static_argnames=("mask", "impl"))
def run(q, k, v, q_info, k_info, dout, mask, impl, slopes=None):
    def call(q, k, v):
        function = in_small_tiles if impl == SMALL else partial(attend, impl=impl)
        return function(q, k, v, q_info, k_info, mask, scale=SCALE, slopes=slopes)

    out, pull = jax.vjp(call, q, k, v)
    return out, pull(dout)


def check(got, want, tolerance=2e-5):
    out, grads = got
    np.testing.assert_allclose(out, want[0], atol=tolerance, rtol=tolerance)
    for name, g, w in zip(("dq", "dk", "dv"), grads, want[2]):
        np.testing.assert_allclose(g, w, atol=5 * tolerance, rtol=5 * tolerance, err_msg=name)


# Compiling is what takes time. In small tiles the main masks see every layout and their variants three; whole
# (one tile, or folded chunks) every mask sees three. Splash attention is interpreted here, which is slow; it needs rows
# in order, and `test_kernels.py` has more of it.
SMALL_MASKS, SMALL_LAYOUTS = ("global", "chunked", "sliding"), ("packed", "permuted", "unaligned")
WHOLE_LAYOUTS = ("plain", "aligned", "one-query")
SPLASH = (
    ("global", "grouped"), ("global", "fully-masked"), ("chunked-shifted", "packed"), ("chunked-by-row", "packed"),
    ("sliding", "aligned"),
)  # fmt: skip
ANYWHERE = [name for name in IMPLEMENTATIONS if name != "cudnn"]
"""What runs on every platform; `test_kernels_cudnn.py` has the one that does not."""
WITH_SLOPES = [name for name in ANYWHERE if name != "splash"]


def worth_running(impl, case):
    mask, layout = case.name.split("/")
    if impl == SMALL:
        return mask in SMALL_MASKS or layout in SMALL_LAYOUTS
    if impl == "splash":
        return (mask, layout) in SPLASH
    return impl != "blockwise" or layout in WHOLE_LAYOUTS


EVERY = [(impl, case) for impl in (*ANYWHERE, SMALL) for case in CASES if worth_running(impl, case)]


@pytest.mark.parametrize("impl, case", EVERY, ids=[f"{impl}/{case.name}" for impl, case in EVERY])
def test_outputs_and_gradients(impl, case):
    x = build(case)
    got = run(x.q_BTNH, x.k_BSKH, x.v_BSKH, x.q_info, x.k_info, x.dout_BTNH, mask=x.mask, impl=impl)
    check(got, expected(case))
    blind = ~np.isfinite(expected(case)[1])
    assert not np.any(np.asarray(got[0])[blind]) and not np.any(np.asarray(got[1][0])[blind])


@pytest.mark.parametrize("impl", [*WITH_SLOPES, SMALL])
def test_slopes(impl):
    case = next(c for c in CASES if c.name == "chunked-by-row/grouped")
    slopes = tuple(0.5**n for n in range(6))
    x = build(case)
    args = (x.q_BTNH, x.k_BSKH, x.v_BSKH, x.q_info, x.k_info, x.dout_BTNH)
    check(run(*args, mask=x.mask, impl=impl, slopes=jnp.array(slopes)), expected(case, slopes))


@pytest.mark.parametrize("impl", [*ANYWHERE, SMALL])
def test_bfloat16_inputs_accumulate_in_float32(impl):
    case = AttentionCase("global/long", Global(), LAYOUTS["plain"])
    x = build(case, dtype=jnp.bfloat16)
    out, grads = run(x.q_BTNH, x.k_BSKH, x.v_BSKH, x.q_info, x.k_info, x.dout_BTNH, mask=x.mask, impl=impl)
    assert out.dtype == jnp.bfloat16 and all(g.dtype == jnp.bfloat16 for g in grads)
    wide = [np.asarray(a, np.float64) for a in (x.q_BTNH, x.k_BSKH, x.v_BSKH)]
    want, _ = oracle.attention(*wide, places(x.q_info), places(x.k_info), rule(x.mask), scale=SCALE)
    # one rounding of the result to bfloat16 and nothing more: half a unit in the last place
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=1e-3, rtol=2.0**-8)


MANY_TILES = {
    "rows and heads apart": BlockPlan(1, 1, (Pass(32, 16, (0, 0, 0), (1, 3, 5)),)),
    "all pairs, unequal": BlockPlan(2, 2, (Pass(40, 24, (0,) * 3, (3,) * 3),)),
}


@pytest.mark.parametrize("name", MANY_TILES)
def test_plans_do_not_change_the_result(name):
    case = next(c for c in CASES if c.name == "global/packed")
    x = build(case)

    def call(q, k, v):
        return attend_blockwise(
            q, k, v, x.q_info, x.k_info, x.mask, scale=SCALE, plan=MANY_TILES[name]
        )  # fmt: skip

    out, pull = jax.vjp(jax.jit(call), x.q_BTNH, x.k_BSKH, x.v_BSKH)
    check((out, pull(x.dout_BTNH)), expected(case))


def test_coarse_and_fine_tiles_cover_each_pair_once():
    info = TokenInfo.single(1, 1024)
    covered = np.zeros((1024, 1024), int)
    for p in coarse_and_fine(Global(), info, info, 256):
        for i, (low, high) in enumerate(zip(p.low, p.high)):
            for j in range(low, high + 1):
                covered[i * p.block_q : (i + 1) * p.block_q, j * p.block_k : (j + 1) * p.block_k] += 1
    assert covered.max() == 1 and covered[np.tril_indices(1024)].min() == 1
    assert covered.sum() / (1024 * 1025 / 2) == pytest.approx(1 + 127 / 1025)


def test_coarse_and_fine_tiles_against_reference():
    random = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(random.normal(size=(1, 1024, 1, 8)), jnp.float32) for _ in range(4))
    info = TokenInfo.single(1, 1024)
    plan = BlockPlan(1, 1, coarse_and_fine(Global(), info, info, 256))

    def call(q, k, v):
        return attend_blockwise(q, k, v, info, info, Global(), scale=SCALE, plan=plan)

    out, pull = jax.vjp(jax.jit(call), q, k, v)
    dense = partial(attend, q_info=info, k_info=info, mask=Global(), scale=SCALE, impl="reference")
    want, pull_want = jax.vjp(dense, q, k, v)
    for a, b in zip((out, *pull(dout)), (want, *pull_want(dout))):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("mask", [Global(), Chunked(32), Chunked(24), Chunked(20, shift=3), Sliding(11)], ids=str)
@pytest.mark.parametrize("start", [0, 16])
def test_static_bounds_hold_every_visible_pair(mask, start):
    """No tile outside the bounds holds a visible pair, and the bounds are tight to one block."""
    q_info, k_info = TokenInfo.single(1, 64, start=64), TokenInfo.single(1, 128 - start, start=start)
    seen = np.zeros((64, 128 - start), bool)
    for t in range(64):
        for s in range(128 - start):
            seen[t, s] = oracle.sees(q=(64 + t, 1, 64 + t), k=(start + s, 1, start + s), **rule(mask))
    low, high = bounds(mask, q_info, k_info, 16, 8)
    for i in range(4):
        blocks = np.flatnonzero(seen[16 * i : 16 * i + 16].reshape(16, -1, 8).any((0, 2)))
        assert (low[i], high[i]) == (blocks[0], blocks[-1])


@pytest.mark.parametrize("layout", ["packed", "permuted"])
def test_pieces_of_keys_fold_to_the_whole(layout):
    """Two pieces of keys, merged forward; backward piece by piece from the whole's log-sum-exp."""
    case = AttentionCase("pieces", MASKS["sliding-wide"], LAYOUTS[layout])
    x = build(case)
    want = expected(case)
    cut = [slice(0, 40), slice(40, None)]

    def piece(part):
        return (
            x.k_BSKH[:, part], x.v_BSKH[:, part], jax.tree.map(lambda a: a[:, part], x.k_info).replace(first_row=None)
        )  # fmt: skip

    for make in (partial_blockwise, partial_reference):
        make = jax.jit(partial(make, mask=x.mask, scale=SCALE))
        parts = [make(x.q_BTNH, k, v, x.q_info, info) for k, v, info in map(piece, cut)]
        whole = merge(*parts)
        np.testing.assert_allclose(finish(whole), want[0], atol=2e-5)
        np.testing.assert_allclose(whole.log_sum_exp, want[1], atol=2e-5)
    dq = 0
    for part, (k, v, info) in zip(cut, map(piece, cut)):
        back = jax.jit(partial(backward_blockwise, mask=x.mask, scale=SCALE))
        dq_part, dk, dv = back(
            x.q_BTNH, k, v, x.q_info, info, lse=whole.log_sum_exp, out=finish(whole), dout=x.dout_BTNH
        )  # fmt: skip
        dq += dq_part
        np.testing.assert_allclose(dk, want[2][1][:, part], atol=1e-4)
        np.testing.assert_allclose(dv, want[2][2][:, part], atol=1e-4)
    np.testing.assert_allclose(dq, want[2][0], atol=1e-4)
