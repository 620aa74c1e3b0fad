"""Runs with the rows before them: what arrives where, and that attention to it is attention to everything visible."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from irope_jax.attention.api import attend
from irope_jax.attention.mask import Chunked, Sliding
from irope_jax.context.halo import attend_halo, with_halo
from irope_jax.context.layout import ContextLayout
from irope_jax.context.strategy import halo_length
from irope_jax.core.numerics import assert_close
from irope_jax.core.types import TokenInfo
from irope_jax.plan.hlo import analyse
from tests.context.across import SLOPES, B, H, K, T, arrays, assert_equals_oracle, cut, documents, on_devices

PACKED = documents((5, 27), (13, 6, 9))
ALIGNED = documents((6, 20), (25,), multiple=4)


def received(kind, parts, length, halo):
    """What each run ends up with, drawn: rows counted from 1, `.` where the row has not begun."""
    layout = ContextLayout(kind, parts)
    with on_devices(parts):
        run = jax.jit(cut(lambda x: with_halo(x, layout, halo), P("context")))
        found = jax.device_get(run(layout.place(np.arange(1, length + 1, dtype=np.int32)[None])))
    lines = [" ".join(str(x) if x else "." for x in run) for run in found]
    return "\n".join(lines)


def test_picture_of_a_halo_in_contiguous_order():
    assert received("contiguous", 4, 8, 1) == "\n".join([". 1 2", "2 3 4", "4 5 6", "6 7 8"])


def test_picture_of_a_halo_of_more_than_one_run():
    wanted = [". . . 1 2", ". 1 2 3 4", "2 3 4 5 6", "4 5 6 7 8"]
    assert received("contiguous", 4, 8, 3) == "\n".join(wanted)


def test_picture_of_a_halo_in_zigzag_order():
    wanted = [". 1 2", "14 15 16", "2 3 4", "12 13 14", "4 5 6", "10 11 12", "6 7 8", "8 9 10"]
    assert received("zigzag", 4, 16, 1) == "\n".join(wanted)


def test_picture_of_a_zigzag_halo_of_several_runs():
    """Three runs and a bit: some predecessors come from the other half of the row, some from the device itself."""
    wanted = [". . . . 1", "4 5 6 7 8", ". . . 1 2", "3 4 5 6 7", ". . 1 2 3", "2 3 4 5 6", ". 1 2 3 4", "1 2 3 4 5"]
    assert received("zigzag", 4, 8, 4) == "\n".join(wanted)


CASES = [
    ("contiguous", 8, Sliding(5), "packed"),
    ("zigzag", 8, Sliding(5), "packed"),
    ("zigzag", 8, Chunked(8), "packed"),
    ("contiguous", 4, Chunked(12, by="row", shift=3), "packed"),
    ("zigzag", 4, Chunked(6, by="row", shift=5), "one"),
    ("zigzag", 4, Chunked(8), "one"),
    # local: nothing is sent
    ("zigzag", 4, Chunked(4), "aligned"),
    ("zigzag", 4, Chunked(2), "one"),
    ("contiguous", 2, Chunked(24, by="row", shift=8), "packed"),
    ("zigzag", 4, Chunked(4, by="row"), "packed"),
]


@pytest.mark.parametrize(("kind", "parts", "mask", "rows"), CASES, ids=str)
def test_equals_the_oracle(kind, parts, mask, rows):
    layout = ContextLayout(kind, parts)
    info = {"one": TokenInfo.single(B, T), "packed": PACKED, "aligned": ALIGNED}[rows]
    halo = halo_length(mask, T, T // layout.multiple, info.document_multiple)
    impl = "reference" if parts == 4 and rows != "aligned" else None  # compiles faster, and reads every coordinate

    def attention(q, k, v, info, mask, slopes):
        return attend_halo(q, k, v, info, info, mask, slopes=slopes, impl=impl, layout=layout, halo=halo)

    assert_equals_oracle(attention, layout, info, mask, slopes=SLOPES)


LONG = [
    ("contiguous", 4, Sliding(40), 0, 39),
    ("zigzag", 2, Sliding(600), 0, 599),
    ("contiguous", 2, Chunked(256, shift=100), 0, 100),
    ("zigzag", 2, Chunked(128), 128, 0),
    # one border only, and it falls on the border of a run; later borders do not stand where they would from row 0
    ("contiguous", 2, Chunked(384, shift=128), 0, 0),
    ("contiguous", 2, Chunked(384, by="row", shift=128), 1, 0),
]


@pytest.mark.parametrize(("kind", "parts", "mask", "multiple", "halo"), LONG, ids=str)
def test_runs_long_enough_for_blocks_to_be_left_out(kind, parts, mask, multiple, halo):
    """What is promised of the rows of a run must be true, or blocks that are visible are skipped."""
    length, layout = 2048, ContextLayout(kind, parts)
    info = documents((900, 1000), length=length, multiple=multiple) if multiple else TokenInfo.single(1, length)
    assert halo_length(mask, length, length // layout.multiple, info.document_multiple) == halo
    q, k, v, _ = arrays(length=length, batch=1, heads=1, key_heads=1)
    wanted = jax.jit(lambda *a: attend(*a, mask, impl="reference"))(q, k, v, info, info)
    with on_devices(parts):
        there = cut(lambda q, k, v, info: attend_halo(q, k, v, info, info, mask, layout=layout, halo=halo))
        found = layout.unplace(jax.device_get(jax.jit(there)(*layout.place((q, k, v)), layout.place(info))))
    assert_close(found, jax.device_get(wanted), rtol=0, atol=2e-6)


def sent(layout, halo, mask, info, backward):
    """Bytes per device by the compiled program."""
    q, k, v, dout = arrays()

    def attention(q, k, v, info):
        return attend_halo(q, k, v, info, info, mask, layout=layout, halo=halo, impl="reference")

    with on_devices(layout.parts):
        there = cut(attention)
        if backward:  # of a function linear in keys and values that have already come
            pull = lambda q, k, v, info, dout: jax.vjp(lambda k, v: there(q, k, v, info), k, v)[1](dout)
            text = jax.jit(pull).lower(q, k, v, info, dout).compile().as_text()
        else:
            text = jax.jit(there).lower(q, k, v, info).compile().as_text()
    return analyse(text).total_bytes


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_a_halo_is_what_is_sent_and_sent_back(kind):
    layout, info, kappa = ContextLayout(kind, 8), TokenInfo.single(B, T), 2 * K * H * 4
    # runs that have a predecessor on another device, over 8 devices
    runs = 7 if kind == "contiguous" else 14
    mask, halo = (Sliding(3), 2)
    there = runs / 8 * B * halo * kappa
    assert sent(layout, halo, mask, info, backward=False) == there
    assert sent(layout, halo, mask, info, backward=True) == 2 * there


@pytest.mark.parametrize("info", [TokenInfo.single(B, T), ALIGNED], ids=["one document", "packed and aligned"])
def test_chunks_that_divide_a_run_send_nothing(info):
    layout = ContextLayout("zigzag", 4)
    assert halo_length(Chunked(4), T, 4, info.document_multiple) == 0
    assert sent(layout, 0, Chunked(4), info, backward=True) == 0


def test_packed_rows_send_their_segments_too():
    layout, info = ContextLayout("contiguous", 8), PACKED
    kappa = 2 * K * H * 4
    assert sent(layout, 2, Sliding(3), info, backward=False) == 7 / 8 * B * 2 * (kappa + 4)
    assert sent(layout, 3, Chunked(4), info, backward=False) == 7 / 8 * B * 3 * (kappa + 8)


def test_blocks_that_nobody_sees_are_left_out():
    """Rows counted from the run: a window over a long row costs its band on each device, not a square."""
    length, layout = 8192, ContextLayout("contiguous", 8)
    info = TokenInfo.single(1, length)
    q, k, v, _ = arrays(length=length, batch=1)

    def flops(mask, halo):
        with on_devices(8):
            there = cut(lambda q, k, v, info: attend_halo(q, k, v, info, info, mask, layout=layout, halo=halo))
            text = jax.jit(there).lower(q, k, v, info).compile().as_text()
        return analyse(text).matmul_flops_max

    whole_square = 4 * q.shape[2] * H * (length // 8) ** 2
    assert flops(Sliding(65), 64) < 0.3 * whole_square
    assert flops(Chunked(128), 0) < 0.2 * whole_square
    assert flops(Chunked(1024), 0) > 0.5 * whole_square
