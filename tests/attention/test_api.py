"""The door: choices, errors, logging, transformations, devices."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from irope_jax.attention import Chunked, Global, Sliding, allowed, attend
from irope_jax.attention.api import IMPLEMENTATIONS, Implementation, _choose
from irope_jax.attention.cases import MASKS
from irope_jax.core.config import ConfigError
from irope_jax.core.types import TokenInfo


def inputs(batch=1, length=48, heads=2, key_heads=2, width=8, seed=0):
    random = np.random.default_rng(seed)

    def make(n):
        return jnp.asarray(random.normal(size=(batch, length, n, width)), jnp.float32)

    return make(heads), make(key_heads), make(key_heads), TokenInfo.single(batch, length)


@pytest.mark.parametrize("impl", ["splash", "blockwise", "reference"])
@pytest.mark.parametrize("mask", MASKS)
def test_gradient_reaches_exactly_what_the_picture_shows(mask, impl):
    q, k, v, info = inputs(length=80)
    segments = jnp.where(info.rows < 37, 1, 2)
    info = TokenInfo(jnp.where(info.rows < 37, info.rows, info.rows - 37), segments, info.rows, first_row=0)
    probe = jax.jit(jax.grad(lambda v, t: attend(q, k, v, info, info, MASKS[mask], impl=impl)[0, t].sum()))
    seen = np.asarray(allowed(MASKS[mask], info, info))[0]
    for t in (0, 15, 16, 36, 37, 60, 79):
        assert ((np.asarray(probe(v, t))[0] != 0).all((1, 2)) == seen[t]).all()


@pytest.mark.parametrize(
    "change, field",
    [
        ({"impl": "blokwise"}, "impl"),
        ({"mask": "global"}, "mask"),
        ({"k": jnp.zeros((1, 48, 2, 4))}, "k.shape"),
        ({"v": jnp.zeros((1, 40, 2, 8))}, "v.shape"),
        ({"q": jnp.zeros((1, 48, 3, 8))}, "k.shape"),
        ({"q": jnp.zeros((1, 48, 2, 8), int)}, "q.dtype"),
        ({"q_info": TokenInfo.single(1, 47)}, "q_info.positions.shape"),
        ({"slopes": jnp.ones(3)}, "slopes.shape"),
    ],
)
def test_mistakes_name_the_field(change, field):
    q, k, v, info = inputs()
    args = {"q": q, "k": k, "v": v, "q_info": info, "k_info": info, "mask": Global()} | change
    options = {name: args.pop(name) for name in ("impl", "slopes") if name in args}
    with pytest.raises(ConfigError) as error:
        attend(*args.values(), **options)
    assert error.value.field == field
    assert "blokwise" not in change.values() or "blockwise" in str(error.value)


def test_an_implementation_that_cannot_says_why_and_is_not_replaced(monkeypatch):
    refusing = Implementation(None, refuses=lambda case: f"no masks like {case.mask.kind}", chosen=lambda case: True)
    monkeypatch.setitem(IMPLEMENTATIONS, "picky", refusing)
    q, k, v, info = inputs()
    with pytest.raises(ConfigError, match="no masks like sliding"):
        attend(q, k, v, info, info, Sliding(3), impl="picky")


def test_choice_is_logged_once_per_case(caplog):
    _choose.cache_clear()
    q, k, v, info = inputs()
    with caplog.at_level(logging.INFO, logger="irope_jax.attention.api"):
        for _ in range(3):
            attend(q, k, v, info, info, Global())
        attend(q, k, v, info, info, Chunked(8))
        attend(q, k, v, info, info, Chunked(8), impl="reference")  # who asks for one knows
    assert [r.getMessage().split()[1] for r in caplog.records] == ["blockwise", "blockwise"]


def test_inside_scan_with_remat():
    q, k, v, info = inputs()

    def layers(q, policy):
        def layer(x, _):
            return x + attend(x, k, v, info, info, Chunked(16)), None

        return jax.lax.scan(jax.checkpoint(layer, policy=policy), q, length=3)[0].sum()

    keep = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    plain = jax.jit(jax.grad(lambda q: layers(q, None)))(q)
    kept = jax.jit(jax.grad(lambda q: layers(q, keep)))(q)

    def unrolled(x):
        for _ in range(3):
            x = x + attend(x, k, v, info, info, Chunked(16), impl="reference")
        return x.sum()

    np.testing.assert_allclose(plain, jax.grad(unrolled)(q), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(plain, kept, atol=1e-6)


@pytest.fixture
def mesh():
    if jax.device_count() < 8:
        pytest.skip("needs 8 (simulated) devices")
    return Mesh(np.array(jax.devices()[:8]), ("data",))


@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(mesh, check_vma, length):
    q, k, v, _ = inputs(batch=8, length=length, key_heads=1)

    def loss(q, k, v):
        return (attend(q, k, v, info_here(q), info_here(q), Sliding(20)) ** 2).sum()

    def info_here(q):
        return TokenInfo.single(q.shape[0], q.shape[1])

    split = jax.shard_map(
        jax.grad(loss, argnums=(0, 1, 2)), mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
    )
    got = jax.jit(split)(q, k, v)
    for a, b in zip(got, jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [Global(), Chunked(64), Sliding(50)], ids=str)
def test_batch_sharded_over_devices_sends_nothing(mesh, mask):
    q, k, v, _ = inputs(batch=8, length=256, heads=4)
    spec = NamedSharding(mesh, P("data"))

    def gradients(q, k, v):
        def call(q, k, v):
            return attend(q, k, v, TokenInfo.single(8, 256), TokenInfo.single(8, 256), mask)

        out, pull = jax.vjp(call, q, k, v)
        return out, pull(out)

    compiled = jax.jit(gradients, in_shardings=(spec,) * 3, out_shardings=spec).lower(q, k, v).compile()
    text = compiled.as_text()
    sent = [word for word in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter") if f"{word}(" in text]
    assert not sent
