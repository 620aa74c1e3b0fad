"""What the tests of this room share: rows of tokens to attend, and a function of one device's shapes run on several."""

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from irope_jax.core.numerics import assert_close
from irope_jax.core.types import TokenInfo
from tests.oracles.attention import attention as oracle

B, T, N, K, H = 2, 32, 4, 2, 4
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)


def documents(*cuts, length=T, multiple=1) -> TokenInfo:
    """Coordinates of rows that hold documents of these lengths, one tuple per row; the rest is padding."""
    positions, segments = np.zeros((2, len(cuts), length), np.int32)
    for row, lengths in enumerate(cuts):
        begin = 0
        for number, count in enumerate(lengths, start=1):
            positions[row, begin : begin + count] = np.arange(count)
            segments[row, begin : begin + count] = number
            begin += -(-count // multiple) * multiple
    rows = np.broadcast_to(np.arange(length, dtype=np.int32), segments.shape).copy()
    return TokenInfo(positions, segments, rows, first_row=0, document_multiple=multiple)


def arrays(length=T, batch=B, heads=N, key_heads=K, width=H):
    """Queries, keys, values and the gradient of the output."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(batch, length, n, width)).astype(np.float32) for n in (heads, key_heads, key_heads, heads)]


def on_devices(parts):
    """A mesh with nothing but a `context` axis."""
    types = (jax.sharding.AxisType.Auto,)
    return jax.set_mesh(jax.make_mesh((parts,), ("context",), axis_types=types, devices=jax.devices()[:parts]))


PIECE = P(None, "context")


def cut(function, out_specs=PIECE):
    """`function` of a device's pieces as a function of whole arrays `[B, T, ...]`; inside `on_devices`."""

    def run(*whole):
        specs = jax.tree.map(lambda x: PIECE, whole)
        return jax.shard_map(function, in_specs=specs, out_specs=out_specs, check_vma=False)(*whole)

    return run


def assert_equals_oracle(attention, layout, info, mask, *, slopes=None):
    """Attention of a device's pieces `attention(q, k, v, info, mask, slopes)`, and its gradients, against float64."""
    q, k, v, dout = arrays(length=info.shape[1], batch=info.shape[0])
    places = np.stack([info.positions, info.segments, info.rows], axis=-1)
    rule = {"kind": mask.kind} | {name: getattr(mask, name) for name in ("size", "by", "shift") if hasattr(mask, name)}
    wanted, _, gradients = oracle(q, k, v, places, places, rule, scale=q.shape[-1] ** -0.5, slopes=slopes, dout=dout)

    def run(q, k, v, dout, info):
        out, back = jax.vjp(lambda q, k, v: attention(q, k, v, info, mask, slopes), q, k, v)
        return out, *back(dout)

    with on_devices(layout.parts):
        found = jax.jit(cut(run))(*layout.place((q, k, v, dout)), layout.place(info))
        found = layout.unplace(jax.device_get(found))
    assert_close(found[0], wanted, rtol=0, atol=2e-6, what="output")
    assert_close(list(found[1:]), list(gradients), rtol=0, atol=2e-5, what="gradients")
