"""Attention over a mesh gives what one device gives: outputs and gradients, in every layout and packing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.attention.api import attend
from irope_jax.attention.mask import Chunked, Global, Sliding
from irope_jax.context.api import attend_sharded
from irope_jax.context.layout import ContextLayout
from irope_jax.context.strategy import ContextConfig
from irope_jax.core.config import ConfigError
from irope_jax.core.numerics import assert_close
from irope_jax.core.types import TokenInfo
from irope_jax.plan.hlo import analyse
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from tests.quickly import keep

B, T, N, K, H = 2, 64, 4, 2, 8
MESHES = {
    "context 8": MeshConfig(data=1, context=8),
    "data 2 context 4": MeshConfig(data=2, context=4),
    "fsdp 2 context 2 tensor 2": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
}
MASKS = {
    "global": Global(),
    "chunked by document": Chunked(16),
    "chunked by row": Chunked(12, by="row", shift=3),
    "sliding": Sliding(11),
}
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)


def packed_and_padded() -> TokenInfo:
    """Documents that cross every border between devices; one row ends in padding."""
    cuts = [[13, 6, 29, 11], [1, 30, 33]]
    positions, segments = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for row, lengths in enumerate(cuts):
        begin = 0
        for number, length in enumerate(lengths, start=1):
            positions[row, begin : begin + length] = np.arange(length)
            segments[row, begin : begin + length] = number
            begin += length
    rows = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    return TokenInfo(positions, segments, rows, first_row=0)


DOCUMENTS = {"one document": lambda: TokenInfo.single(B, T), "packed and padded": packed_and_padded}


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda heads: rng.normal(size=(B, T, heads, H)).astype(np.float32)
    return draw(N), draw(K), draw(K), draw(N)


def with_gradients(attention):
    """`(q, k, v, cotangent, info) -> (out, (dq, dk, dv))`; where nothing is seen the output counts for nothing."""

    def run(q_BTNH, k_BSKH, v_BSKH, cotangent_BTNH, info):
        real = (info.segments > 0)[..., None, None]
        call = lambda q, k, v: jnp.where(real, attention(q, k, v, info, info), 0.0)
        out_BTNH, back = jax.vjp(call, q_BTNH, k_BSKH, v_BSKH)
        return out_BTNH, back(cotangent_BTNH)

    return jax.jit(run)


SINGLE = {}


def on_one_device(arrays, mask, documents):
    """One device, the reference implementation, and the slopes of ALiBi."""
    if (mask, documents) not in SINGLE:
        attention = lambda *a: attend(*a, MASKS[mask], slopes=SLOPES, impl="reference")
        SINGLE[mask, documents] = with_gradients(attention)(*arrays, DOCUMENTS[documents]())
    return SINGLE[mask, documents]


def on_a_mesh(arrays, mesh, mask, documents, context):
    """The same in the layout of `context`, back in row order."""
    layout = ContextLayout(context.layout, MESHES[mesh].context)
    attention = lambda *a: attend_sharded(*a, MASKS[mask], slopes=SLOPES, context=context)
    with jax.set_mesh(make_mesh(MESHES[mesh])):
        found = with_gradients(attention)(*layout.place(arrays), layout.place(DOCUMENTS[documents]()))
        assert len(found[0].sharding.device_set) == 8
    return layout.unplace(jax.device_get(found))


def check(found, wanted):
    assert_close(found[0], jax.device_get(wanted[0]), rtol=0, atol=2e-6, what="output")
    assert_close(found[1], jax.device_get(wanted[1]), rtol=0, atol=2e-5, what="gradients")


EVERY = list(itertools.product(MASKS, DOCUMENTS, ("contiguous", "zigzag"), MESHES))
PAIRED = [case for i, case in enumerate(EVERY) if (i // 12 + i // 6 + 2 * (i // 3) + i) % 3 == 0]
"""A third of them, in which every two values still meet."""


def test_every_two_values_meet():
    for a, b in itertools.combinations(range(4), 2):
        assert {(case[a], case[b]) for case in PAIRED} == {(case[a], case[b]) for case in EVERY}


@pytest.mark.parametrize(("mask", "documents", "layout", "mesh"), keep(*PAIRED, of=EVERY), ids="-".join)
def test_equals_one_device(arrays, mesh, mask, documents, layout):
    context = ContextConfig(layout=layout, far="ring")
    check(on_a_mesh(arrays, mesh, mask, documents, context), on_one_device(arrays, mask, documents))


WAYS = {
    "auto": ContextConfig(),
    "gather": ContextConfig(far="gather", near="gather"),
    "all_to_all": ContextConfig(far="all_to_all", near="all_to_all"),
    "ring, also for what is near": ContextConfig(near="ring", far="ring"),
    "direct": ContextConfig(near="ring", far="direct"),
    "direct, contiguous": ContextConfig(layout="contiguous", near="halo", far="direct"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mask", ["global", "sliding"])
def test_every_way_that_can_be_forced(arrays, way, mask):
    found = on_a_mesh(arrays, "data 2 context 4", mask, "packed and padded", WAYS[way])
    check(found, on_one_device(arrays, mask, "packed and padded"))


@pytest.mark.parametrize(("layout", "share"), [("zigzag", 0.75), ("contiguous", 0.5)])
def test_direct_sends_only_what_is_needed(layout, share):
    """Bytes of a ring times the share of keys that some query of the receiver sees."""
    x = jax.ShapeDtypeStruct((1, 128, K, H), jnp.float32)
    info = ContextLayout(layout, 8).place(TokenInfo.single(1, 128))
    context = ContextConfig(layout=layout, far="direct")
    attention = lambda q, k, v: attend_sharded(q, k, v, info, info, Global(), context=context)
    ring = 7 * 16 * 2 * K * H * 4
    with jax.set_mesh(make_mesh(MESHES["context 8"])):
        forward = jax.jit(attention).lower(x, x, x).compile().as_text()
        both = jax.jit(lambda *a: jax.vjp(attention, *a[:3])[1](a[3])).lower(x, x, x, x).compile().as_text()
    assert analyse(forward).total_bytes == share * ring
    # within one program the keys that came for the sums serve for the gradients too
    assert analyse(both).total_bytes == share * 2 * ring


def test_tokens_in_an_order_nobody_promised(arrays):
    """Any permutation of the places; no row order, no zigzag."""
    order = np.random.default_rng(1).permutation(T)
    info = jax.tree.map(lambda x: x[:, order], packed_and_padded()).replace(first_row=None)
    attention = lambda *a: attend_sharded(*a, Global(), slopes=SLOPES)
    with jax.set_mesh(make_mesh(MESHES["context 8"])):
        found = jax.device_get(with_gradients(attention)(*(x[:, order] for x in arrays), info))
    back = np.argsort(order)
    found = jax.tree.map(lambda x: x[:, back], found)
    check(found, on_one_device(arrays, "global", "packed and padded"))


@pytest.mark.parametrize("mask", [Global(), Sliding(300), Chunked(256)], ids=["global", "sliding", "chunked"])
def test_pieces_long_enough_for_blocks_to_be_skipped(mask):
    """A device's piece does not start at the row the whole sequence promised; believing so would skip what it sees."""
    length = 4096
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, 1, H)).astype(np.float32)) for _ in range(3))
    info = TokenInfo.single(2, length)
    wanted = jax.jit(lambda q, k, v: attend(q, k, v, info, info, mask))(q, k, v)
    layout = ContextLayout("zigzag", 4)
    placed = layout.place(info)
    with jax.set_mesh(make_mesh(MESHES["data 2 context 4"])):
        found = jax.jit(lambda q, k, v: attend_sharded(q, k, v, placed, placed, mask))(*layout.place((q, k, v)))
    assert_close(jax.device_get(layout.unplace(found)), jax.device_get(wanted), rtol=0, atol=2e-6, what="output")


@pytest.mark.parametrize("queries", [1, T // 4], ids=["one token", "as many as a device has keys"])
@pytest.mark.parametrize("mask", [Global(), Chunked(64)], ids=["cut cache", "a chunk whole on every device"])
def test_decoding(arrays, mask, queries):
    q, k, v, _ = arrays
    q, info = q[:, :queries], packed_and_padded()
    last = info.take(np.arange(40, 40 + queries))
    wanted = jax.jit(lambda: attend(q, k, v, last, info, mask))()
    with jax.set_mesh(make_mesh(MESHES["data 2 context 4"])):
        found = jax.jit(lambda: attend_sharded(q, k, v, last, info, mask))()
    assert_close(jax.device_get(found), jax.device_get(wanted), rtol=0, atol=2e-6, what="output")


def test_a_wrong_piece_is_noticed(arrays):
    """The comparison can fail: a device that believes zigzag tokens to be contiguous sees other keys."""
    layout = ContextLayout("zigzag", 8)
    info = layout.place(TokenInfo.single(B, T))
    lie = info.replace(zigzag=None, first_row=0)
    with jax.set_mesh(make_mesh(MESHES["context 8"])):
        run = with_gradients(lambda *a: attend_sharded(*a, Global(), slopes=SLOPES, context=ContextConfig(far="ring")))
        found = layout.unplace(jax.device_get(run(*layout.place(arrays), lie)))
    with pytest.raises(AssertionError):
        check(found, on_one_device(arrays, "global", "one document"))


def test_without_a_mesh_and_on_one_device_it_is_attend_itself(arrays):
    q, k, v, _ = arrays
    info = packed_and_padded()
    wanted = jax.jit(lambda: attend(q, k, v, info, info, Chunked(8)))()
    np.testing.assert_array_equal(jax.jit(lambda: attend_sharded(q, k, v, info, info, Chunked(8)))(), wanted)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        np.testing.assert_array_equal(jax.jit(lambda: attend_sharded(q, k, v, info, info, Chunked(8)))(), wanted)


def trace(arrays, mask, context, mesh="context 8", length=T):
    q, k, v = (x[:, :length] for x in arrays[:3])
    info = TokenInfo.single(B, length)
    with jax.set_mesh(make_mesh(MESHES[mesh])):
        jax.eval_shape(lambda: attend_sharded(q, k, v, info, info, mask, context=context))


def test_what_cannot_be_done_names_the_field_and_the_fix(arrays):
    with pytest.raises(ConfigError, match=r"length=60.*context=8.*multiple of 8"):
        trace(arrays, Global(), ContextConfig(), length=60)
    with pytest.raises(ConfigError, match=r"context.near.*local.*looks across"):
        trace(arrays, Sliding(11), ContextConfig(near="local"))
    with pytest.raises(ConfigError, match=r"context.far.*all_to_all.*auto or ring"):
        trace(tuple(x[:, :, :1] for x in arrays), Global(), ContextConfig(far="all_to_all"))


def test_falling_back_is_said_once_with_its_cost(arrays, caplog):
    for _ in range(3):
        trace(arrays, Chunked(24), ContextConfig())
    (said,) = [r.getMessage() for r in caplog.records if r.name == "irope_jax.context.api"]
    assert "chunked 24: halo of 16 tokens" in said and "does not divide the run of 8 rows" in said


def test_a_batch_that_the_mesh_does_not_divide_is_refused(arrays):
    q, k, v = (x[:1] for x in arrays[:3])
    info = TokenInfo.single(1, T)
    with jax.set_mesh(make_mesh(MESHES["data 2 context 4"])), pytest.raises(ValueError, match="evenly"):
        jax.jit(lambda: attend_sharded(q, k, v, info, info, Global()))()
