"""Mixtures of experts: the definition in float64, every mesh, what is dropped, and what the products cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.core.types import TokenInfo
from irope_jax.model.config import FfnSpec
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.model.grouped import grouped_dot
from irope_jax.model.moe import Capacity, Dropless, ExpertWeights, MixtureOfExperts, MoE, mixture
from irope_jax.model.routing import Balance, SigmoidRouter, SoftmaxRouter, moved_bias, route, router_sums
from irope_jax.plan.hlo import matmul_flops
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from tests.oracles import moe as oracle

B, T, D, F, E = 4, 32, 16, 24, 4


def made(seed=0, top_k=2):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    weights = ExpertWeights(0.5 * draw(E, D, F), 0.5 * draw(E, D, F), 0.5 * draw(E, F, D))
    return draw(B, T, D), draw(B, T, E), weights


def info(padded: int = 0) -> TokenInfo:
    single = TokenInfo.single(B, T)
    segments = jnp.where(jnp.arange(T) < padded, 0, single.segments)
    return single.replace(segments=segments, unbroken=False) if padded else single


def run(cfg, x, logits, weights, at):
    routing = route(cfg.router, logits, cfg.top_k)
    return mixture(cfg, x, routing, weights, at, at.segments != 0)


ROUTERS = [(SigmoidRouter(), 1), (SigmoidRouter(), 2), (SoftmaxRouter(), 2), (SoftmaxRouter(renormalise=False), 3)]


@pytest.mark.parametrize(("router", "k"), ROUTERS)
@pytest.mark.parametrize("room", [None, 3])
def test_mixture_is_its_definition(router, k, room):
    x, logits, weights = made()
    group = 16
    dispatch = Dropless() if room is None else Capacity(factor=room * E / (group * k), group=group)
    cfg = MoE(E, F, k, router, dispatch=dispatch)
    out, dropped = run(cfg, x, logits, weights, info())
    flat = np.asarray(logits, np.float64).reshape(-1, E)
    chosen, score = oracle.route(flat, k, router.kind, renormalise=getattr(router, "renormalise", True))
    if room is not None:
        kept = np.concatenate([oracle.kept(part, E, room) for part in np.split(chosen, len(chosen) // group)])
        assert int(dropped) == (~kept).sum() > 0
        score = score * kept
    weigh = "input" if router.kind == "sigmoid" else "output"
    want = oracle.mixture(np.asarray(x).reshape(-1, D), chosen, score, *weights, weigh)
    np.testing.assert_allclose(out.reshape(-1, D), want, atol=2e-5)


def test_routers_and_balance_are_their_definitions():
    _, logits, _ = made()
    flat = np.asarray(logits, np.float64).reshape(-1, E)
    bias = np.array([0.5, -1.0, 0.0, 2.0])
    real = np.ones((B, T), bool)
    for router in (SigmoidRouter(), SoftmaxRouter(), SoftmaxRouter(renormalise=False)):
        chosen, score = oracle.route(flat, 2, router.kind, bias, getattr(router, "renormalise", True))
        ours = route(router, logits, 2, jnp.asarray(bias, jnp.float32))
        np.testing.assert_array_equal(ours.chosen.reshape(-1, 2), chosen)
        np.testing.assert_allclose(ours.score.reshape(-1, 2), score, rtol=1e-5)
        sums = router_sums(router, logits, ours.chosen, real)
        want = oracle.load_balance(flat, chosen, router.kind)
        assert float(sums.balance / sums.tokens) == pytest.approx(want, rel=1e-5)
        assert float(sums.z / sums.tokens) == pytest.approx(oracle.router_z(flat), rel=1e-5)
        np.testing.assert_array_equal(sums.load, np.bincount(chosen.ravel(), minlength=E))
        np.testing.assert_allclose(moved_bias(bias, sums.load, 0.1), oracle.moved_bias(bias, sums.load, 0.1), rtol=1e-6)


def test_padding_goes_nowhere_and_takes_no_room():
    x, logits, weights = made()
    for dispatch in (Dropless(), Capacity(0.5, 8)):
        cfg = MoE(E, F, 1, dispatch=dispatch)
        out, dropped = run(cfg, x, logits, weights, info(padded=8))
        alone, dropped_alone = run(cfg, x[:, 8:], logits[:, 8:], weights, TokenInfo.single(B, T - 8))
        assert (out[:, :8] == 0).all()
        np.testing.assert_allclose(out[:, 8:], alone, atol=1e-6)
        assert int(dropped) == int(dropped_alone)


def loss(cfg, x, logits, weights, at):
    out, dropped = run(cfg, x, logits, weights, at)
    return (out * jnp.sin(jnp.arange(out.size).reshape(out.shape))).sum(), (out, dropped)


MESHES = [
    (MeshConfig(data=1, fsdp=2, context=2, expert=2, tensor=1), "auto", Dropless()),
    (MeshConfig(data=1, expert=4, tensor=2), "tokens", Dropless()),
    (MeshConfig(data=2, expert=2, tensor=2), "weights", Dropless()),
    (MeshConfig(data=1, expert=4, context=2), "tokens", Capacity(1.0, 8)),
]


@pytest.mark.parametrize(("mesh", "exchange", "dispatch"), MESHES)
def test_every_mesh_gives_the_same(mesh, exchange, dispatch):
    x, logits, weights = made()
    x, logits = (jnp.concatenate([z, z[::-1] + 0.1]) for z in (x, logits))
    at = jax.tree.map(lambda z: jnp.concatenate([z, z]), info(padded=3))
    cfg = MoE(E, F, 2, SoftmaxRouter(), dispatch=dispatch, exchange=exchange)
    step = jax.value_and_grad(functools.partial(loss, cfg), argnums=(0, 1, 2), has_aux=True)
    (_, want), want_grads = jax.jit(step)(x, logits, weights, at)
    with jax.set_mesh(make_mesh(mesh)):
        (_, got), got_grads = jax.jit(step)(x, logits, weights, at)
    for ours, theirs in zip(jax.tree.leaves((got, got_grads)), jax.tree.leaves((want, want_grads)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_groups_that_devices_would_cut_are_refused():
    x, logits, weights = made()
    cfg = MoE(E, F, 1, dispatch=Capacity(1.0, 32))
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=2, expert=4))), pytest.raises(ConfigError, match="use 16"):
        jax.eval_shape(lambda: run(cfg, x, logits, weights, info()))


@pytest.mark.parametrize("sizes", [[5, 0, 300, 17, 100], [0, 0, 0, 0, 0], [512, 0, 0, 0, 0], [100, 100, 100, 100, 112]])
def test_grouped_products_and_their_gradients(sizes):
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((512, 12), (5, 12, 20)))
    member = np.zeros((512, 5), np.float32)
    member[np.arange(sum(sizes)), np.repeat(np.arange(5), sizes)] = 1
    pull = rng.standard_normal((512, 20)).astype(np.float32)
    ways = [
        lambda x, w: grouped_dot(x, w, jnp.asarray(sizes, jnp.int32)),
        lambda x, w: jnp.einsum("MD,ME,EDF->MF", x, member, w),
    ]
    ours, dense = ((way(x, w), *jax.grad(lambda *a: (way(*a) * pull).sum(), (0, 1))(x, w)) for way in ways)  # noqa: B023
    for got, want in zip(ours, dense, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-5)


def test_a_step_costs_what_the_chosen_experts_cost():
    """Dense evaluation would take E / k = 8 times as much."""
    tokens, width, hidden, experts = 4096, 32, 48, 8
    module = MixtureOfExperts(MoE(experts, hidden, 1, shared=SwiGLU(hidden)))
    at, x = TokenInfo.single(1, tokens), jnp.zeros((1, tokens, width))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), x, at))["params"]
    step = jax.grad(lambda p, x: (module.apply({"params": p}, x, at) ** 2).sum(), argnums=(0, 1))
    text = jax.jit(step).lower(params, x).compile().as_text()
    active = 3 * 2 * tokens * (2 * 3 * width * hidden + width * experts)
    assert 0.9 * active < matmul_flops(text) <= 1.1 * active


def test_spec_is_configuration():
    spec = MoE(8, 32, 2, SoftmaxRouter(), SwiGLU(16), Capacity(1.5, 64), Balance(0.1, 0.0, 0.001), "tokens")
    assert from_dict(FfnSpec, to_dict(spec)) == spec
    bad = {"top_k": 9, "num_experts": 0, "dispatch.factor": 0.0, "balance.loss": -1.0}
    for field, value in bad.items():
        values = to_dict(spec)
        *parents, leaf = field.split(".")
        functools.reduce(dict.__getitem__, parents, values)[leaf] = value
        with pytest.raises(ConfigError, match=leaf):
            from_dict(FfnSpec, values)
