"""Attention over a mesh gives what one device gives: outputs and gradients, whatever is packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.attention.api import attend
from irope_jax.attention.mask import Chunked, Global, Sliding
from irope_jax.context.api import attend_sharded
from irope_jax.core.numerics import assert_close
from irope_jax.core.types import TokenInfo
from irope_jax.sharding.mesh import MeshConfig, make_mesh

B, T, N, K, H = 8, 32, 4, 2, 8
MESHES = {
    "data 8": MeshConfig(data=8),
    "data 2 context 4": MeshConfig(data=2, context=4),
    "fsdp 2 context 2 tensor 2": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
}
MASKS = {
    "global": Global(),
    "chunked by document": Chunked(8),
    "chunked by row": Chunked(8, by="row", shift=3),
    "sliding": Sliding(5),
}
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)


def packed_and_padded() -> TokenInfo:
    """Each row another cut: documents that cross every border between devices, one row whole, one mostly padding."""
    cuts = [[T], [5, 27], [8, 8, 16], [13, 6, 9], [3, 3], [1, 30, 1], [20, 4], [16, 16]]
    positions, segments = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for row, lengths in enumerate(cuts):
        begin = 0
        for number, length in enumerate(lengths, start=1):
            positions[row, begin : begin + length] = np.arange(length)
            segments[row, begin : begin + length] = number
            begin += length
    rows = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    return TokenInfo(positions, segments, rows, first_row=0)


def one_document() -> TokenInfo:
    return TokenInfo.single(B, T)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda heads: rng.normal(size=(B, T, heads, H)).astype(np.float32)
    return draw(N), draw(K), draw(K), draw(N)


def with_gradients(attention, mask, slopes):
    """`(q, k, v, cotangent, info) -> (out, (dq, dk, dv))`; where nothing is seen the output counts for nothing."""

    def run(q_BTNH, k_BSKH, v_BSKH, cotangent_BTNH, info):
        real = (info.segments > 0)[..., None, None]
        call = lambda q, k, v: jnp.where(real, attention(q, k, v, info, info, mask, slopes=slopes), 0.0)
        out_BTNH, back = jax.vjp(call, q_BTNH, k_BSKH, v_BSKH)
        return out_BTNH, back(cotangent_BTNH)

    return jax.jit(run)


SINGLE = {}


def on_one_device(arrays, mask, layout, slopes):
    key = (mask, layout, slopes is not None)
    if key not in SINGLE:
        SINGLE[key] = with_gradients(attend, MASKS[mask], slopes)(*arrays, LAYOUTS[layout]())
    return SINGLE[key]


LAYOUTS = {"one document": one_document, "packed and padded": packed_and_padded}


EACH = ("global", "chunked by document", "sliding")
CASES = [(mesh, mask, "packed and padded", SLOPES) for mesh in MESHES for mask in EACH]
CASES += [("data 2 context 4", mask, "one document", None) for mask in ("global", "chunked by document")]
CASES += [("data 2 context 4", "chunked by row", "packed and padded", SLOPES)]


@pytest.mark.parametrize(("mesh", "mask", "layout", "slopes"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_equals_one_device(arrays, mesh, mask, layout, slopes):
    wanted, wanted_grads = on_one_device(arrays, mask, layout, slopes)
    with jax.set_mesh(make_mesh(MESHES[mesh])):
        found, found_grads = with_gradients(attend_sharded, MASKS[mask], slopes)(*arrays, LAYOUTS[layout]())
        assert len(found.sharding.device_set) == 8
    assert_close(jax.device_get(found), jax.device_get(wanted), rtol=0, atol=2e-6, what="output")
    assert_close(jax.device_get(found_grads), jax.device_get(wanted_grads), rtol=0, atol=2e-5, what="gradients")


@pytest.mark.parametrize("mask", [Global(), Sliding(300), Chunked(256)], ids=["global", "sliding", "chunked"])
def test_pieces_long_enough_for_blocks_to_be_skipped(mask):
    """A device's piece does not start at the row the whole sequence promised; believing so would skip what it sees."""
    length = 4096
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, 1, H)).astype(np.float32)) for _ in range(3))
    info = TokenInfo.single(2, length)
    wanted = jax.jit(lambda q, k, v: attend(q, k, v, info, info, mask))(q, k, v)
    with jax.set_mesh(make_mesh(MESHES["data 2 context 4"])):
        found = jax.jit(lambda q, k, v: attend_sharded(q, k, v, info, info, mask))(q, k, v)
    assert_close(jax.device_get(found), jax.device_get(wanted), rtol=0, atol=2e-6, what="output")


def test_without_a_mesh_and_on_one_device_it_is_attend_itself(arrays):
    q, k, v, _ = arrays
    info = packed_and_padded()
    wanted = jax.jit(lambda: attend(q, k, v, info, info, Chunked(8)))()
    np.testing.assert_array_equal(jax.jit(lambda: attend_sharded(q, k, v, info, info, Chunked(8)))(), wanted)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        np.testing.assert_array_equal(jax.jit(lambda: attend_sharded(q, k, v, info, info, Chunked(8)))(), wanted)


def test_a_batch_that_the_mesh_does_not_divide_is_refused(arrays):
    q, k, v, _ = (x[:3] for x in arrays)
    info = TokenInfo.single(3, T)
    with jax.set_mesh(make_mesh(MESHES["data 8"])), pytest.raises(ValueError, match="evenly"):
        jax.jit(lambda: attend_sharded(q, k, v, info, info, Global()))()
