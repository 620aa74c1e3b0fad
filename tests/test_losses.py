"""The chunked loss against float64 numpy, its gradients too, at odd lengths and split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from irope_jax import losses
from irope_jax.core.config import ConfigError
from irope_jax.plan import hlo
from irope_jax.plan.hlo.text import arrays_of

B, T, D, V = 2, 13, 8, 31


def case(batch=B, length=T, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.standard_normal((batch, length, D)), dtype)
    w = jnp.asarray(rng.standard_normal((D, V)), dtype)
    targets = rng.integers(0, V, (batch, length)).astype(np.int32)
    weights = (rng.random((batch, length)) * (rng.random((batch, length)) < 0.7)).astype(np.float32)
    return hidden, w, targets, weights


def definition(hidden, w, targets, weights, z_loss=0.0):
    """Sums and gradients of loss_sum + z_loss * z_sum in float64, one token at a time."""
    h, w = np.asarray(hidden, np.float64), np.asarray(w, np.float64)
    d_h, d_w = np.zeros_like(h), np.zeros_like(w)
    nll, hit, z = (np.zeros(targets.shape) for _ in range(3))
    for at in np.ndindex(*targets.shape):
        logits = h[at] @ w
        log_z = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        p = np.exp(logits - log_z)
        nll[at], z[at], hit[at] = log_z - logits[targets[at]], log_z**2, logits.argmax() == targets[at]
        g = weights[at] * ((1 + 2 * z_loss * log_z) * p - np.eye(len(p))[targets[at]])
        d_h[at] = w @ g
        d_w += np.outer(h[at], g)
    sums = [(weights * x).sum() for x in (nll, np.ones_like(nll), z, hit)]
    return sums, d_h, d_w, nll, hit.astype(bool)


def fields(sums):
    return [sums.loss_sum, sums.weight_sum, sums.z_sum, sums.correct_sum]


@pytest.mark.parametrize("chunk", [None, 1, 4, 7, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_sums_and_gradients_at_every_chunk(chunk, z_loss):
    hidden, w, targets, weights = case()
    targets[0, :4] = np.argmax(np.asarray(hidden @ w), -1)[0, :4]  # some hits
    sums, d_h, d_w, _, _ = definition(hidden, w, targets, weights, z_loss)

    def loss(h, w):
        found = losses.chunked_cross_entropy(h, w, targets, weights, chunk=chunk, z_loss=z_loss)
        return found.loss_sum + z_loss * found.z_sum, found

    plain = jax.jit(loss)(hidden, w)[1]
    (_, found), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, w)
    assert sums[3] > 0
    for ours in (plain, found):
        np.testing.assert_allclose(fields(ours), sums, rtol=2e-6)
    np.testing.assert_allclose(grads[0], d_h, atol=2e-6)
    np.testing.assert_allclose(grads[1], d_w, atol=1e-5)


def test_gradient_scales_with_what_is_done_to_the_sum():
    hidden, w, targets, weights = case()
    _, d_h, d_w, _, _ = definition(hidden, w, targets, weights)
    loss = lambda h, w: losses.chunked_cross_entropy(h, w, targets, weights, chunk=5).loss_sum
    grads = jax.grad(lambda h, w: 3.0 * loss(h, w) / weights.sum(), (0, 1))(hidden, w)
    np.testing.assert_allclose(grads[0], 3 * d_h / weights.sum(), atol=1e-6)
    np.testing.assert_allclose(grads[1], 3 * d_w / weights.sum(), atol=1e-6)


@pytest.mark.parametrize("length, chunk", [(13, 4), (13, 100), (12, 6), (1, 1)])
def test_token_losses(length, chunk):
    hidden, w, targets, weights = case(length=length)
    _, _, _, nll, hit = definition(hidden, w, targets, weights)
    ours, correct = jax.jit(lambda h: losses.token_losses(h, w, targets, chunk=chunk))(hidden)
    np.testing.assert_allclose(ours, nll, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(correct, hit)
    assert (ours.dtype, correct.dtype) == (jnp.float32, jnp.bool_)


def test_ties_are_not_hits():
    hidden, w, targets, weights = case()
    sums = losses.chunked_cross_entropy(hidden, jnp.zeros_like(w), targets, weights)
    assert sums.correct_sum == 0.0
    np.testing.assert_allclose(sums.loss_sum / sums.weight_sum, np.log(V), rtol=1e-6)


def test_low_precision_inputs_keep_float32_sums_and_their_own_gradient_types():
    hidden, w, targets, weights = case(dtype=jnp.bfloat16)
    sums, d_h, d_w, _, _ = definition(hidden.astype(jnp.float32), w.astype(jnp.float32), targets, weights)
    loss = lambda h, w: losses.chunked_cross_entropy(h, w, targets, weights, chunk=8).loss_sum
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, w)
    np.testing.assert_allclose(value, sums[0], rtol=1e-5)  # products of bfloat16 are exact in float32
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 2
    for ours, exact in zip(grads, (d_h, d_w)):
        np.testing.assert_allclose(np.asarray(ours, np.float32), exact, atol=0.02 * np.abs(exact).max())


def test_large_logits_do_not_overflow_and_targets_of_no_weight_may_be_anything():
    hidden, w, targets, weights = case()
    targets = np.where(weights == 0, -1, targets).astype(np.int32)
    ours = losses.chunked_cross_entropy(1e4 * hidden, w, targets, weights, chunk=6)
    sums = definition(1e4 * hidden, w, targets, weights)[0]
    np.testing.assert_allclose(ours.loss_sum, sums[0], rtol=1e-5)


def test_no_array_of_batch_length_vocabulary_and_the_fewest_products():
    length, wide = 64, 256
    args = [jax.ShapeDtypeStruct(s, t) for s, t in (((1, length, D), "float32"), ((D, wide), "float32"))]
    targets, weights = np.zeros((1, length), np.int32), np.ones((1, length), np.float32)
    loss = lambda h, w: losses.chunked_cross_entropy(h, w, targets, weights, chunk=8).loss_sum
    for function, products in ((loss, 1), (jax.value_and_grad(loss, (0, 1)), 3)):
        program = jax.jit(function).lower(*args).compile().as_text()
        assert hlo.matmul_flops(program) == products * 2 * length * D * wide
        sizes = [a.bytes / 4 for line in program.splitlines() if " = " in line for a in arrays_of(line)]
        assert max(sizes) < length * wide / 4


@pytest.mark.parametrize(
    "spec, shards", [(P("data"), (4, 1)), (P("data", "rest"), (4, 2)), (P(("data", "rest")), (1, 1))]
)
def test_split_over_devices_under_plain_jit(spec, shards):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "rest"))
    hidden, w, targets, weights = case(batch=8, length=32)
    sums, d_h, d_w, _, _ = definition(hidden, w, targets, weights)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, spec))
    loss = jax.jit(
        jax.value_and_grad(
            lambda h, w, t, m: losses.chunked_cross_entropy(h, w, t, m, chunk=16, shards=shards).loss_sum, (0, 1)
        )
    )
    args = place(hidden), jax.device_put(w, NamedSharding(mesh, P())), place(targets), place(weights)
    value, grads = loss(*args)
    np.testing.assert_allclose(value, sums[0], rtol=2e-6)
    np.testing.assert_allclose(grads[0], d_h, atol=2e-6)
    np.testing.assert_allclose(grads[1], d_w, atol=1e-5)
    assert grads[0].sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    cost = hlo.analyse(loss.lower(*args).compile().as_text())
    devices = 4 if spec == P("data") else 8
    assert cost.matmul_flops_max == 6 * hidden.size * V // devices  # no device does another one's tokens
    assert set(cost.collective_bytes) == {"all-reduce"}  # hidden states and logits stay where they are
    if shards != (1, 1):  # the gradient of w crosses devices once, not once per chunk
        assert cost.total_bytes < 2 * 2 * D * V * 4


@pytest.mark.parametrize("chunk, shards, field", [(0, (1, 1), "chunk"), (4, (3, 1), "shards"), (4, (1, 2), "shards")])
def test_impossible_layouts_are_refused(chunk, shards, field):
    with pytest.raises(ConfigError, match=field):
        losses.chunked_cross_entropy(*case(), chunk=chunk, shards=shards)
