"""Attention to a cache, block by block, against float64; and number formats against what they can hold."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.attention.cached import QUERIES, partial_cached
from irope_jax.attention.mask import Chunked, Global, Sliding
from irope_jax.attention.partial import finish
from irope_jax.attention.stored import Stored
from irope_jax.core.numerics import assert_close
from irope_jax.core.types import TokenInfo
from tests.oracles.attention import attention as oracle

B, N, K, H, S, R = 2, 4, 2, 4, 70, 3
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
RULES = [
    (Global(), {"kind": "global"}),
    (Chunked(9), {"kind": "chunked", "size": 9}),
    (Sliding(11), {"kind": "sliding", "size": 11}),
]


def case(queries):
    """Keys of rows 0 … 49 in shuffled slots, the rest empty, the first row of the batch shorter."""
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(S), rng.permutation(S)]).astype(np.int32)
    k_info = TokenInfo(rows, (rows < np.array([[30], [50]])).astype(np.int32), rows)
    q_rows = np.sort(rng.integers(0, 60, (B, queries)), axis=1).astype(np.int32)
    q_info = TokenInfo(q_rows, np.ones_like(q_rows), q_rows)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return draw(B, queries, N, H), draw(B, S, K, H), draw(B, S, K, H), q_info, k_info


def stored(x_BSKH, repeat, numbers="float32", block=H):
    slots = jnp.broadcast_to(jnp.arange(S), (B, S))
    return Stored.empty((R, B, K, S, H), numbers, block).write(repeat, slots, x_BSKH)


@pytest.mark.parametrize(("mask", "rule"), RULES, ids=lambda x: getattr(x, "kind", ""))
@pytest.mark.parametrize(("queries", "block"), [(1, 16), (5, None), (QUERIES + 3, 32)])
def test_blocks_are_the_whole(mask, rule, queries, block):
    """Blocks that do not divide the slots, more queries than go at a time, one of three layers."""
    q, k, v, q_info, k_info = case(queries)
    places = lambda info: np.stack([info.positions, info.segments, info.rows], axis=-1)
    for slopes in (None, SLOPES):
        want, _ = oracle(q, k, v, places(q_info), places(k_info), rule, scale=0.5, slopes=slopes)
        run = jax.jit(partial(partial_cached, mask=mask, scale=0.5, slopes=slopes, block=block))
        found = finish(run(q, stored(k, 1), stored(v, 1), q_info, k_info, repeat=1))
        assert_close(found, want, rtol=0, atol=2e-6)


def test_an_empty_cache_gives_nothing():
    q, k, v, q_info, k_info = case(2)
    k_info = k_info.replace(segments=np.zeros_like(k_info.segments))
    part = partial_cached(q, stored(k, 0), stored(v, 0), q_info, k_info, Global(), scale=0.5, block=16)
    assert not np.any(part.sum) and np.all(part.max == -np.inf) and not np.any(finish(part))


@pytest.mark.parametrize(("numbers", "steps"), [("int8", 127), ("int4", 7)])
def test_integers_are_wrong_by_half_a_step(numbers, steps):
    """A step of the block's own scale; zeros stay zero, the largest entry is never cut off."""
    _, k, *_ = case(1)
    k[0, 0], k[0, 1, 0] = 0.0, [1e-20, -3e4, 1.0, 2e4]
    read = np.moveaxis(np.asarray(stored(k, 2, numbers, 2).read(2, 0, S)), 1, 2)
    blocks = lambda x: x.reshape(B, S, K, -1, 2)
    step = np.abs(blocks(k)).max(-1, keepdims=True) / steps
    assert (np.abs(blocks(read) - blocks(k)) <= 0.51 * step).all()
    assert not read[0, 0].any()


def test_tokens_without_a_slot_are_left_out():
    x = jnp.ones((B, 3, K, H))
    kept = Stored.empty((R, B, K, 4, H), "bfloat16", H).write(1, jnp.array([[0, 4, 2], [4, 4, 4]]), x)
    held = np.asarray(kept.read(1, 0, 4))[:, :, :, 0]
    assert held[:, 0].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]] and not np.any(kept.read(0, 0, 4))


@pytest.mark.parametrize("width", [8, 12, 5])
def test_spreading_shares_out_large_entries_and_leaves_products(width):
    q, k = np.random.default_rng(0).normal(size=(2, 3, width)).astype(np.float32)
    k[0] = np.eye(width, dtype=np.float32)[-1]
    spread = Stored.empty((1, 1, 1, 1, width), "int8", width).spread
    assert_close(spread(q) @ spread(k).T, q @ k.T)
    assert np.abs(spread(k)[0]).max() == pytest.approx((width & -width) ** -0.5)
    assert Stored.empty((1, 1, 1, 1, width), "bfloat16", width).spread(k) is k
