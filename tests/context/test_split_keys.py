"""A cache cut over devices: the same answer as one whole cache, and traffic that does not grow with it."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from irope_jax.attention.mask import Chunked, Global, Sliding
from irope_jax.context.split_keys import attend_split_keys
from irope_jax.core.config import ConfigError
from irope_jax.core.types import TokenInfo
from irope_jax.plan.hlo import analyse
from tests.context.across import SLOPES, on_devices
from tests.oracles.attention import attention as oracle

B, N, K, H, Q = 3, 4, 2, 4, 2


def cache(slots):
    """Keys in shuffled slots, some of them empty: only the last device holds anything of the third row."""
    rng = np.random.default_rng(1)
    rows = np.stack([rng.permutation(slots), rng.permutation(slots), np.arange(slots)]).astype(np.int32)
    segments = np.ones_like(rows)
    segments[1, rows[1] > slots // 2] = 0
    segments[2, : -slots // 8] = 0
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    rows_q = np.array([[slots - 1, slots]] * B, np.int32)
    q_info = TokenInfo(rows_q, np.ones_like(rows_q), rows_q)
    return draw(B, Q, N, H), draw(B, slots, K, H), draw(B, slots, K, H), q_info, TokenInfo(rows, segments, rows)


def split(mask, slopes=None, impl=None):
    cut, whole = P(None, "context"), P()

    def run(q, k, v, q_info, k_info):
        specs = (whole, cut, cut, whole, cut)
        attend = lambda *a: attend_split_keys(*a, mask, scale=0.5, slopes=slopes, impl=impl)
        return jax.shard_map(attend, in_specs=specs, out_specs=whole, check_vma=False)(q, k, v, q_info, k_info)

    return jax.jit(run)


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (Global(), {"kind": "global"}),
        (Sliding(5), {"kind": "sliding", "size": 5}),
        (Chunked(6), {"kind": "chunked", "size": 6}),
    ],
    ids=str,
)
def test_equals_the_oracle(mask, rule):
    q, k, v, q_info, k_info = cache(16)
    places = lambda info: np.stack([info.positions, info.segments, info.rows], axis=-1)
    wanted, _ = oracle(q, k, v, places(q_info), places(k_info), rule, scale=0.5, slopes=SLOPES)
    with on_devices(8):
        found = split(mask, slopes=SLOPES)(q, k, v, q_info, k_info)
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=2e-6)


def test_a_query_that_sees_nothing_anywhere_gets_zero():
    q, k, v, q_info, k_info = cache(16)
    with on_devices(8):
        found = split(Global())(q, k, v, q_info.replace(segments=q_info.segments + 1), k_info)
    np.testing.assert_array_equal(np.asarray(found), 0.0)


def test_traffic_is_the_partial_results_whatever_the_length():
    def sent(slots):
        with on_devices(8):
            return analyse(split(Global(), impl="reference").lower(*cache(slots)).compile().as_text()).collective_bytes

    assert sent(32) == sent(256) == {"all-reduce": 2 * 7 / 8 * B * Q * N * (H + 2) * 4}


def test_an_implementation_without_partial_results_is_refused():
    q, k, v, q_info, k_info = cache(8)
    with pytest.raises(ConfigError, match="one of: blockwise, reference"):
        attend_split_keys(q, k, v, q_info, k_info, Global(), impl="cudnn")
