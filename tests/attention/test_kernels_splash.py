"""Splash attention: numbers in interpret mode against the float64 oracle, and compiled for TPUs that are described."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from irope_jax.attention import Chunked, Global, Sliding, allowed, attend
from irope_jax.attention.api import choose_pieces
from irope_jax.attention.kernels import splash, splash_calls
from irope_jax.attention.kernels.splash_calls import Blocks, compact, meet, skip
from irope_jax.attention.panels import Panel
from irope_jax.attention.partial import Partial, finish
from irope_jax.core.config import ConfigError
from irope_jax.core.types import TokenInfo
from tests.oracles import attention as oracle
from tests.topologies import described, targeting, tpu_mesh

SCALE = 0.6

pytestmark = pytest.mark.skipif(splash.UNAVAILABLE is not None, reason=str(splash.UNAVAILABLE))


def packed(*documents, batch=1, start=0, multiple=1):
    """Coordinates of one row (repeated): documents of these lengths, -n for n places of padding."""
    positions = np.concatenate([np.arange(abs(n)) for n in documents])
    segments = np.concatenate([np.full(abs(n), i + 1 if n > 0 else 0) for i, n in enumerate(documents)])
    rows = np.arange(len(positions)) + start
    arrays = (jnp.asarray(np.broadcast_to(x, (batch, len(x))), jnp.int32) for x in (positions, segments, rows))
    return TokenInfo(*arrays, first_row=start, document_multiple=multiple)


def arrays(q_info, k_info, heads=2, key_heads=1, width=8, dtype=jnp.float32, seed=0):
    random = np.random.default_rng(seed)
    (b, t), s = q_info.shape, k_info.shape[1]
    shapes = (b, t, heads, width), (b, s, key_heads, width), (b, s, key_heads, width), (b, t, heads, width)
    return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)


def judge(q, k, v, dout, q_info, k_info, mask):
    rule = {name: getattr(mask, name) for name in ("kind", "size", "by", "shift") if hasattr(mask, name)}
    places = lambda info: np.stack([np.asarray(x) for x in (info.positions, info.segments, info.rows)], axis=-1)
    wide = (np.asarray(x, np.float64) for x in (q, k, v))
    dout = np.asarray(dout, np.float64)
    return oracle.attention(*wide, places(q_info), places(k_info), rule, scale=SCALE, dout=dout)


def tail(info, length):
    return info.map(lambda x: x[:, -length:]).replace(first_row=info.first_row + info.shape[1] - length)


LONG = packed(150, 70, 100, -64)
HALO = packed(-30, 100, 170, start=-40)
CASES = {
    "three blocks of packed documents": (LONG, LONG, Global()),
    "chunks across blocks": (LONG, LONG, Chunked(96, shift=10)),
    "a window across blocks": (LONG, LONG, Sliding(140)),
    "keys begin before the queries": (tail(HALO, 150), HALO, Sliding(60)),
    "chunks begin before the queries": (tail(HALO, 150), HALO, Chunked(64)),
    "chunks fold": (*[packed(256, 100, -28, batch=2, multiple=128)] * 2, Chunked(128)),
    "unbroken, grouped": (*[TokenInfo.single(1, 256)] * 2, Global()),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name):
    q_info, k_info, mask = CASES[name]
    *qkv, dout = arrays(q_info, k_info)

    @jax.jit
    def run(*qkv):
        call = lambda q, k, v: attend(q, k, v, q_info, k_info, mask, scale=SCALE, impl="splash")
        out, pull = jax.vjp(call, *qkv)
        return out, *pull(dout)

    out, lse, grads = judge(*qkv, dout, q_info, k_info, mask)
    got = run(*qkv)
    for part, a, b in zip(("out", "dq", "dk", "dv"), got, (out, *grads)):
        np.testing.assert_allclose(a, b, atol=3e-5, err_msg=part)
    blind = ~np.isfinite(lse)
    assert not np.any(np.asarray(got[0])[blind]) and not np.any(np.asarray(got[1])[blind])


def thirds(at):
    """The triangle of 384 places as panels of a ring: own thirds, and earlier ones; the places may be traced."""
    return (
        Panel(at(0), 128, at(0), 128, "same"),
        Panel(at(128), 256, at(128), 256, "same"),
        Panel(at(128), 256, at(0), 128, "past"),
    )


@pytest.mark.parametrize("mask", [Global(), Chunked(160, shift=7)], ids=str)
def test_panels_fold_to_the_whole_and_contribute_its_gradient(mask):
    info = LONG.replace(first_row=None)
    q, k, v, dout = arrays(info, info)
    out, lse, grads = judge(q, k, v, dout, info, info, mask)
    name, pieces = choose_pieces(q, k, mask, ("past", "same"), impl="splash")
    options = {"scale": SCALE, "slopes": None}
    assert name == "splash"

    @jax.jit
    def forward(q, k, v, zero):
        acc = Partial.empty(1, 384, 2, 8)
        panels = thirds(lambda place: zero + place)
        return pieces.fold(acc, heads_first(q), heads_first(k), heads_first(v), info, info, mask, panels, **options)

    acc = forward(q, k, v, jnp.int32(0))
    np.testing.assert_allclose(finish(acc), out, atol=3e-6)
    np.testing.assert_allclose(acc.log_sum_exp, lse, atol=3e-6)

    @jax.jit
    def backward(q, k, v, dout, lse):
        delta = jnp.sum(finish(acc) * dout, -1)
        first = map(heads_first, (q, k, v, dout))
        panels = thirds(lambda place: place)
        start = jnp.ones((1, 2, 384, 8))
        dq, dk, dv = pieces.contribute(start, *first, lse, delta, info, info, mask, panels, **options)
        return heads_first(dq - start), heads_first(dk), heads_first(dv)

    for part, a, b in zip(("dq", "dk", "dv"), backward(q, k, v, dout, acc.log_sum_exp), grads):
        np.testing.assert_allclose(a, b, atol=3e-5, err_msg=part)


def heads_first(x):
    return jnp.swapaxes(x, 1, 2)


def test_bfloat16_panels_round_nothing_on_the_way():
    """More pieces, no more error: what a fold returns is float32 and differs from the oracle like one piece does."""
    info = TokenInfo.single(1, 256)
    q, k, v, dout = arrays(info, info, width=16, dtype=jnp.bfloat16)
    want, _, grads = judge(q, k, v, dout, info, info, Global())
    errors = []
    for parts in (1, 2):
        size = 256 // parts
        panels = [Panel(i * size, size, i * size, size, "same") for i in range(parts)]
        panels += [Panel(i * size, size, j * size, size, "past") for i in range(parts) for j in range(i)]

        @jax.jit
        def both(q, k, v, dout, panels=tuple(panels)):
            acc = Partial.empty(1, 256, 2, 16)
            q, k, v, dout = map(heads_first, (q, k, v, dout))
            acc = splash.fold_splash(acc, q, k, v, info, info, Global(), panels, scale=SCALE)
            out = finish(acc)
            delta = jnp.sum(out * heads_first(dout), -1)
            return out, splash.contribute_splash(
                jnp.zeros(q.shape), q, k, v, dout, acc.log_sum_exp, delta, info, info, Global(), panels, scale=SCALE
            )

        out, (dq, dk, dv) = both(q, k, v, dout)
        assert {x.dtype.name for x in (out, dq, dk, dv)} == {"float32"}
        # What the same numbers give as float32, however exact this machine is; a bfloat16 output is off by 4e-3.
        exact, _ = both(*(x.astype(jnp.float32) for x in (q, k, v, dout)))
        np.testing.assert_allclose(out, exact, rtol=0, atol=5e-7)
        pairs = zip((out, *map(heads_first, (dq, dk, dv))), (want, *grads))
        errors.append([np.abs(np.asarray(a, np.float64) - b).max() for a, b in pairs])
    one, two = np.array(errors)
    np.testing.assert_array_less(two, 1.2 * one + 2e-6)


def test_numbers_of_tokens_are_equal_where_document_and_chunk_are():
    info = packed(37, 12, 40, 3, start=5)
    for mask in (Chunked(16), Chunked(16, shift=5), Chunked(16, by="row"), Chunked(24, by="row", shift=3)):
        number = np.asarray(splash.segment_ids(mask, info))[0]
        seen = np.asarray(allowed(mask, info, info))[0]
        np.testing.assert_array_equal(np.tril(number[:, None] == number), seen)


def test_tables_visit_every_visible_block_and_few_others():
    """The drawing: 8 blocks of queries and keys in rows of a hand-made rule, compacted, then thinned by documents."""
    visible = np.tril(np.ones((4, 4), bool))
    fetch, visited = compact(visible)
    assert fetch.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 2, 0], [0, 1, 2, 3]]
    assert visited.astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    narrow = visible & ~np.tril(np.ones((4, 4), bool), -2)
    assert compact(narrow)[0].tolist() == [[0, 0], [0, 1], [1, 2], [2, 3]]
    ids = tuple(jnp.array([7] * 128 + [7] * 100 + [9] * 28 + [9] * 128 + [hidden] * 128) for hidden in (
        splash_calls.HIDDEN_QUERY, splash_calls.HIDDEN_KEY))  # fmt: skip
    blocks = Blocks(128, 128, 128, low=None, high=None, offset=0, width=None, interpret=True)
    met = np.asarray(meet(ids, blocks))
    assert met.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    fetch, visited = skip(fetch, visited & np.take_along_axis(met, fetch, axis=1))
    assert np.asarray(visited).astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert np.asarray(fetch)[2].tolist() == [1, 1, 2, 2]


BASE = dict(
    platform="tpu", width=128, mask=Global(), slopes=False, shared=False, offset=0, lengths=(8192, 8192), relations=()
)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"relations": ("past", "same"), "offset": None}, None),
        ({"mask": Sliding(4096), "lengths": (2**20, 2**20)}, None),
        ({"platform": "gpu"}, "written for TPUs"),
        ({"slopes": True}, "ALiBi"),
        ({"shared": True}, "shard_map"),
        ({"width": 512}, "wider than 256"),
        ({"offset": None}, "first_row"),
        ({"lengths": (2**20, 2**20)}, "1048576 entries"),
        ({"relations": ("any",)}, "not known while tracing"),
        ({"relations": ("past",), "mask": Sliding(9)}, "sliding window over panels"),
    ],
)  # fmt: skip
def test_refusals(change, reason):
    said = splash.refuses(**BASE | change)
    assert said is None if reason is None else reason in said


def test_another_version_of_the_kernel_is_refused_not_called(monkeypatch):
    monkeypatch.setitem(splash_calls.EXPECTED, "_splash_attention_bwd_dq", "q k v")
    assert "has a different _splash_attention_bwd_dq" in splash_calls._load()[2]
    monkeypatch.setattr(splash, "UNAVAILABLE", "this version of jax has it differently")
    assert splash.refuses(**BASE) == splash.UNAVAILABLE


def test_pieces_that_cannot_be_done_are_an_error_and_otherwise_somebody_elses():
    q, k = jax.ShapeDtypeStruct((1, 128, 2, 8), jnp.float32), jax.ShapeDtypeStruct((1, 128, 1, 8), jnp.float32)
    with pytest.raises(ConfigError, match="order of rows"):
        choose_pieces(q, k, Global(), ("any",), impl="splash")
    with pytest.raises(ConfigError, match="does not fold"):
        choose_pieces(q, k, Global(), ("same",), impl="reference")
    mesh = tpu_mesh("v5e:2x2", context=4)
    chosen = partial(choose_pieces, q, k, Global())
    with targeting(mesh):
        inside = []
        look = lambda x: inside.extend((chosen(("same",))[0], chosen(("any",))[0])) or x
        jax.eval_shape(
            jax.shard_map(look, in_specs=P("context"), out_specs=P("context")), described(mesh, (4,), jnp.float32)
        )
        assert inside == ["splash", "blockwise"] and chosen(("same",))[0] == "blockwise"
    assert chosen(("same",))[0] == "blockwise"


def compiled(mesh, function, *arguments):
    """Compiled with the first axis of every argument over `data`, in a `shard_map` as attention always is."""
    cut = jax.shard_map(function, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    with targeting(mesh):
        return jax.jit(cut).lower(*arguments).compile().as_text()


@pytest.mark.parametrize("mask, unit", [(Global(), 1024), (Chunked(512), 256)], ids=str)
def test_attend_compiles_for_a_tpu(mask, unit):
    mesh = tpu_mesh("v5e:2x2", data=4)
    shape = partial(described, mesh, dtype=jnp.bfloat16, spec=P("data"))

    def gradient(q, k, v, segments):
        rows = jnp.broadcast_to(jnp.arange(3 * unit, dtype=jnp.int32), segments.shape)
        k_info = TokenInfo(rows, segments, rows, first_row=-unit)
        call = lambda q, k, v: attend(q, k, v, tail(k_info, 2 * unit), k_info, mask).astype(jnp.float32).sum()
        return jax.grad(call, argnums=(0, 1, 2))(q, k, v)

    q, k = shape((4, 2 * unit, 4, 64)), shape((4, 3 * unit, 2, 64))
    segments = described(mesh, (4, 3 * unit), jnp.int32, P("data"))
    assert compiled(mesh, gradient, q, k, k, segments).count('custom_call_target="tpu_custom_call"') == 3


def test_pieces_compile_for_a_tpu():
    mesh = tpu_mesh("v5e:2x2", data=4)
    shape = partial(described, mesh, dtype=jnp.bfloat16, spec=P("data"))

    def step(q, k, v, dout, segments, starts):
        start = starts[0]
        info = TokenInfo(segments, segments, segments)
        panels = (Panel(0, 512, 0, 512, "same"), Panel(start, 256, 0, 512, "past"))
        _, pieces = choose_pieces(q, k, Global(), {panel.relation for panel in panels})
        where = (info, info, Global(), panels)
        acc = pieces.fold(Partial.empty(1, 512, 4, 128), q, k, v, *where, scale=0.1, slopes=None)
        delta = jnp.einsum("btnh,bnth->btn", finish(acc), dout.astype(jnp.float32))
        return pieces.contribute(
            jnp.zeros(q.shape), q, k, v, dout, acc.log_sum_exp, delta, *where, scale=0.1, slopes=None
        )

    q, k = shape((4, 4, 512, 128)), shape((4, 2, 512, 128))
    whole = partial(described, mesh, dtype=jnp.int32, spec=P("data"))
    text = compiled(mesh, step, q, k, k, q, whole((4, 512)), whole((4,)))
    assert text.count('custom_call_target="tpu_custom_call"') == 6  # two panels: forward, dq, dk and dv


def test_long_pieces_are_described_in_little_time_and_memory():
    """Tables come from bounds: a million rows need two lines of integers per block, not the mask of any pair."""
    info = TokenInfo.single(1, 8)
    far = jax.ShapeDtypeStruct((1, 2**20), jnp.int32)
    info = info.replace(positions=far, segments=far, rows=far)
    low, high = splash.bounds(Sliding(8192), info, info, 1024, 1024)
    blocks = Blocks(1024, 1024, 512, low, high, 0, 8192, False)
    table = splash_calls._table(blocks, None, 2**20, 2**20)
    assert table.block_mask.shape == table.data_next.shape == (1, 1024, 9)
