"""cuDNN's attention: what it is asked to compute, on any platform; compiled for GPUs that are described."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from irope_jax.attention import Chunked, Global, Sliding, attend
from irope_jax.attention.kernels import cudnn
from irope_jax.attention.kernels.chunks import run_length
from irope_jax.core.config import ConfigError
from irope_jax.core.types import TokenInfo
from tests.attention.test_kernels_splash import SCALE, arrays, judge, packed
from tests.topologies import described, gpu_mesh, targeting

PADDED = packed(50, -14, batch=2, multiple=0)
ALIGNED = packed(32, 20, -12, -32, multiple=32)
CASES = {
    "whole": (TokenInfo.single(2, 64), Global()),
    "padded": (PADDED, Global()),
    "padded, a window": (PADDED, Sliding(11)),
    "chunks of documents fold": (ALIGNED, Chunked(32)),
    "chunks of rows fold": (PADDED, Chunked(16, by="row")),
    "within one chunk": (PADDED, Chunked(100)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_asked_for_is_the_attention_meant(name):
    """The same call with jax's own implementation behind the door: windows, ends of rows and folds are right."""
    info, mask = CASES[name]
    *qkv, dout = arrays(info, info)
    assert cudnn.one_document(mask, info, info)

    @jax.jit
    def run(*qkv):
        call = partial(cudnn.attend_cudnn, scale=SCALE, implementation="xla")
        out, pull = jax.vjp(lambda q, k, v: call(q, k, v, info, info, mask), *qkv)
        return out, *pull(dout)

    out, lse, grads = judge(*qkv, dout, info, info, mask)
    got = run(*qkv)
    for part, a, b in zip(("out", "dq", "dk", "dv"), got, (out, *grads)):
        np.testing.assert_allclose(a, b, atol=3e-5, err_msg=part)
    assert not np.any(np.asarray(got[0])[~np.isfinite(lse)])


def test_runs_are_chunks_that_see_nothing_of_each_other():
    info = TokenInfo.single(1, 64)
    assert run_length(Chunked(16), info, info) == 16
    assert run_length(Chunked(64), info, info) == run_length(Chunked(100), info, info) == 64
    assert run_length(Chunked(16, shift=3), info, info) is None
    assert run_length(Chunked(100, shift=50), info, info) is None
    unknown = packed(40, 24)
    assert run_length(Chunked(100), unknown, unknown) is None
    assert run_length(Chunked(100, by="row"), unknown, unknown) == 64
    later = TokenInfo.single(1, 64, start=64)
    assert run_length(Chunked(128), later, later) == 64 and run_length(Chunked(128), later, info) is None


BASE = dict(
    platform="gpu", dtype="bfloat16", width=128, mask=Global(), slopes=False, offset=0, lengths=(64, 64), runs=None,
    single=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"mask": Sliding(9)}, None),
        ({"mask": Chunked(16), "runs": 16}, None),
        ({"platform": "tpu"}, "traced for tpu"),
        ({"dtype": "float32"}, "not on float32"),
        ({"width": 20}, "multiple of 8"),
        ({"width": 256}, "at most 128"),
        ({"slopes": True}, "ALiBi"),
        ({"offset": None}, "row order"),
        ({"offset": 8}, "row order"),
        ({"lengths": (32, 64)}, "row order"),
        ({"mask": Chunked(16)}, "do not fold"),
        ({"single": False}, "packed documents"),
    ],
)
def test_refusals(change, reason, monkeypatch):
    monkeypatch.setattr(cudnn, "installed", lambda: True)
    said = cudnn.refuses(**BASE | change)
    assert said is None if reason is None else reason in said


def test_promises_of_one_document():
    unknown, single = packed(40, 24), TokenInfo.single(1, 64)
    one = lambda mask, info: cudnn.one_document(mask, info, info)
    assert one(Global(), single) and one(Global(), PADDED) and not one(Global(), unknown)
    assert one(Chunked(32), ALIGNED) and not one(Global(), ALIGNED) and not one(Chunked(16, by="row"), ALIGNED)


def test_without_a_gpu_it_is_refused():
    info = TokenInfo.single(1, 8)
    q = jnp.zeros((1, 8, 1, 8), jnp.bfloat16)
    with pytest.raises(ConfigError, match="NVIDIA"):
        attend(q, q, q, info, info, Global(), impl="cudnn")


@pytest.mark.parametrize("mask, calls", [(Global(), 2), (Chunked(512), 2), (Sliding(300), 2)], ids=str)
def test_attend_compiles_for_eight_h100(mask, calls):
    mesh = gpu_mesh(data=8)
    shape = partial(described, mesh, dtype=jnp.bfloat16, spec=P("data"))

    def gradient(q, k, v):
        info = TokenInfo.single(1, 1024)
        call = lambda q, k, v: attend(q, k, v, info, info, mask).astype(jnp.float32).sum()
        return jax.grad(call, argnums=(0, 1, 2))(q, k, v)

    with targeting(mesh):
        cut = jax.shard_map(gradient, in_specs=P("data"), out_specs=P("data"), check_vma=False)
        text = jax.jit(cut).lower(shape((8, 1024, 4, 64)), *[shape((8, 1024, 2, 64))] * 2).compile().as_text()
    assert text.count('custom_call_target="__cudnn$fmha') == calls
