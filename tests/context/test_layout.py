"""Which token lies where: drawn, undone, promised."""

import jax
import numpy as np
import pytest

from irope_jax.attention.mask import Chunked, Global, allowed
from irope_jax.context.layout import ContextLayout, layout_of, picture
from irope_jax.core.config import ConfigError
from irope_jax.core.types import Batch, TokenInfo


def test_picture_of_contiguous():
    assert picture(ContextLayout("contiguous", 4), 8) == "\n".join(
        ["device 0: 0 1", "device 1: 2 3", "device 2: 4 5", "device 3: 6 7"]
    )


def test_picture_of_zigzag():
    assert picture(ContextLayout("zigzag", 4), 16) == "\n".join(
        ["device 0: 0 1 14 15", "device 1: 2 3 12 13", "device 2: 4 5 10 11", "device 3: 6 7 8 9"]
    )


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_zigzag_shares_out_the_causal_work_evenly(parts):
    pieces = np.split(ContextLayout("zigzag", parts).order(64), parts)
    assert {int((piece + 1).sum()) for piece in pieces} == {64 * 65 // 2 // parts}


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_runs_and_holders_are_two_views_of_the_order(kind):
    layout = ContextLayout(kind, 4)
    order = layout.order(4 * layout.multiple).reshape(4, layout.runs_per_piece, 4)
    for piece in range(4):
        for index, run in enumerate(layout.runs(piece)):
            np.testing.assert_array_equal(order[piece, index], 4 * run + np.arange(4))
            assert layout.holder(run) == (piece, index)


def batch(length=16):
    numbers = np.arange(2 * length, dtype=np.int32).reshape(2, length)
    info = jax.tree.map(np.asarray, TokenInfo.single(2, length))
    return Batch(tokens=numbers, targets=numbers + 1, weights=numbers.astype(np.float32), info=info)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_unplace_undoes_place(kind, parts):
    layout, here = ContextLayout(kind, parts), batch()
    there = layout.place(here)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(there))
    np.testing.assert_array_equal(there.tokens[0], layout.order(16))
    np.testing.assert_array_equal(there.info.rows[0], layout.order(16))
    np.testing.assert_array_equal(there.targets, there.tokens + 1)
    back = layout.unplace(there)
    assert jax.tree.structure(back) == jax.tree.structure(here)
    jax.tree.map(np.testing.assert_array_equal, back, here)


def test_rows_travel_with_tokens_so_that_the_mask_is_only_permuted():
    layout, info = ContextLayout("zigzag", 2), TokenInfo.single(1, 8)
    order, placed = layout.order(8), layout.place(info)
    for mask in (Global(), Chunked(3)):
        whole = np.asarray(allowed(mask, info, info))[0]
        np.testing.assert_array_equal(np.asarray(allowed(mask, placed, placed))[0], whole[order][:, order])


def test_what_is_promised():
    info = TokenInfo.single(1, 8)
    zigzag = ContextLayout("zigzag", 2).place(info)
    assert (zigzag.first_row, zigzag.zigzag, zigzag.unbroken) == (None, 2, True)
    contiguous = ContextLayout("contiguous", 2).place(info)
    assert (contiguous.first_row, contiguous.zigzag) == (0, None)
    assert layout_of(zigzag, 2) == ContextLayout("zigzag", 2)
    assert layout_of(contiguous, 2) == ContextLayout("contiguous", 2)
    assert layout_of(zigzag, 4) is None, "placed for other devices"
    assert layout_of(info.take(np.arange(8)[::-1]), 2) is None


def test_arrays_along_another_axis():
    layout = ContextLayout("zigzag", 2)
    x = np.arange(8)
    np.testing.assert_array_equal(layout.place(x, axis=0), [0, 1, 6, 7, 2, 3, 4, 5])
    np.testing.assert_array_equal(layout.unplace(layout.place(x, axis=0), axis=0), x)


def test_what_cannot_be_placed_is_refused():
    layout = ContextLayout("zigzag", 4)
    with pytest.raises(ConfigError, match="zigzag layout over context=4 needs a multiple of 8"):
        layout.place(batch(12))
    with pytest.raises(ConfigError, match="contiguous layout over context=5 needs a multiple of 5"):
        ContextLayout("contiguous", 5).place(batch(12))
    with pytest.raises(ConfigError, match="placed before"):
        layout.place(layout.place(batch()))
    with pytest.raises(ConfigError, match="choose one of"):
        ContextLayout("zig", 4)
    with pytest.raises(ConfigError, match="at least 1 piece"):
        ContextLayout("zigzag", 0)
