"""Heads exchanged for sequence: what lies where, and that nothing else changes."""

from functools import partial as bind

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from irope_jax.attention.api import attend
from irope_jax.attention.mask import Chunked, Global
from irope_jax.context.all_to_all import (
    attend_all_to_all,
    group_info,
    group_layout,
    heads_for_sequence,
    sequence_for_heads,
)
from irope_jax.context.layout import ContextLayout
from irope_jax.core.config import ConfigError
from irope_jax.core.types import TokenInfo
from irope_jax.plan.hlo import analyse
from tests.context.across import SLOPES, B, H, K, N, T, arrays, assert_equals_oracle, cut, documents, on_devices

PACKED = documents((5, 27), (13, 6, 9))


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("group", [2, 4])
def test_a_group_holds_a_piece_of_the_smaller_layout(kind, group):
    """Tokens are numbered `100 * head + row`; member i of each group ends up with its heads of the group's rows."""
    layout, heads = ContextLayout(kind, 4), 4
    smaller = group_layout(layout, group)
    numbers = (100 * np.arange(heads) + np.arange(T)[:, None]).astype(np.int32)[None, :, :, None]

    def exchange(x):
        there = heads_for_sequence(x, layout, group)
        return there, sequence_for_heads(there, layout, group)

    with on_devices(4):
        run = jax.jit(cut(exchange, (P("context"), P(None, "context"))))
        there, back = jax.device_get(run(layout.place(numbers)))
    np.testing.assert_array_equal(layout.unplace(back), numbers)
    for device in range(4):
        rows = np.split(smaller.order(T), 4 // group)[device // group]
        mine = np.arange(heads)[device % group * (heads // group) :][: heads // group]
        np.testing.assert_array_equal(there[device, ..., 0], 100 * mine + rows[:, None])


@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("info", [TokenInfo.single(B, T), PACKED], ids=["one document", "packed"])
def test_coordinates_follow(info, group):
    layout = ContextLayout("zigzag", 4)
    with on_devices(4):
        run = jax.jit(cut(lambda info: group_info(info, Chunked(4), layout, group), P("context")))
        found = run(layout.place(jax.tree.map(np.asarray, info)))
    assert found.first_row == (0 if group == 4 else None) and found.zigzag is None
    smaller = group_layout(layout, group)
    for name in ("positions", "segments", "rows"):
        held = np.asarray(getattr(found, name)).reshape(4, B, -1)
        pieces = np.split(np.asarray(getattr(info, name))[:, smaller.order(T)], 4 // group, axis=1)
        for device in range(4):
            np.testing.assert_array_equal(held[device], pieces[device // group], err_msg=name)


@pytest.mark.parametrize(
    ("kind", "mask", "info"),
    [("zigzag", Global(), TokenInfo.single(B, T)), ("contiguous", Chunked(6), PACKED)],
    ids=["zigzag", "contiguous"],
)
def test_equals_the_oracle(kind, mask, info):
    layout = ContextLayout(kind, 2)

    def attention(q, k, v, info, mask, slopes):
        return attend_all_to_all(q, k, v, info, info, mask, slopes=slopes, layout=layout, group=2)

    assert_equals_oracle(attention, layout, info, mask, slopes=SLOPES)


def test_product_with_another_way_over_the_groups():
    """Two groups of two. What follows the exchange here gathers the keys of the other group; a ring may do as well."""
    layout = ContextLayout("zigzag", 4)

    def over_groups(q, k, v, q_info, k_info, mask, *, slopes):
        def gather(x):
            return jax.lax.all_gather(x, "context", axis=1, tiled=True, axis_index_groups=[[0, 2], [1, 3]])

        k_info = k_info.map(gather)
        return attend(q, gather(k), gather(v), q_info, k_info, mask, slopes=slopes, impl="reference")

    def attention(q, k, v, info, mask, slopes):
        return attend_all_to_all(q, k, v, info, info, mask, slopes=slopes, layout=layout, group=2, inner=over_groups)

    assert_equals_oracle(attention, layout, PACKED, Chunked(12), slopes=SLOPES)


def test_bytes_are_the_exchange_of_queries_keys_values_and_outputs():
    layout, info = ContextLayout("zigzag", 2), TokenInfo.single(B, T)
    q, k, v, _ = arrays()
    with on_devices(2):
        way = bind(attend_all_to_all, mask=Global(), layout=layout, group=2, impl="reference")
        there = cut(lambda q, k, v, info: way(q, k, v, info, info))
        cost = analyse(jax.jit(there).lower(q, k, v, info).compile().as_text())
    assert cost.collective_bytes == {"all-to-all": (2 * N + 2 * K) * H * 4 * B * (T // 2) * 1 / 2}


def test_what_cannot_be_exchanged_is_refused():
    with pytest.raises(ConfigError, match="group=3: must divide the 4 devices"):
        group_layout(ContextLayout("zigzag", 4), 3)
    with pytest.raises(ConfigError, match="divisor of the number of key heads"):
        heads_for_sequence(np.zeros((1, 8, 2, 4)), ContextLayout("zigzag", 4), 4)
