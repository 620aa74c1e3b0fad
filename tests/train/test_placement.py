"""Averages of an optimizer in fewer bits and on the host: what is kept, how near it stays, and that it resumes.

XLA:CPU has a memory kind `pinned_host`, so placement is tested as it is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from irope_jax.checkpoint.native import Checkpoints
from irope_jax.core.config import ConfigError
from irope_jax.core.numerics import assert_equal_trees
from irope_jax.core.types import Batch, TokenInfo
from irope_jax.model.config import ModelConfig, irope_layers
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.sharding.rules import batch_sharding
from irope_jax.train.optimizer import ConstantRate, OptimizerConfig, learning_rate, make_optimizer
from irope_jax.train.placement import (
    Coded,
    OptimizerState,
    decode_int8,
    encode_int8,
    on_device,
    placed,
    round_to_bfloat16,
    stored,
)
from irope_jax.train.state import init_state, state_shardings
from irope_jax.train.step import make_train_step
from tests.quickly import keep

MODEL = ModelConfig(
    vocab_size=256, d_model=64, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=32, attention="reference",
    pattern=irope_layers(8, SwiGLU(128), interval=1),
)  # fmt: skip


def bits_of(shape, seed=0):
    return jax.random.bits(jax.random.key(seed), shape, jnp.uint16)


def test_eight_bits_by_hand():
    """One octave is five codes: the largest is 127, half of it 122, and what is not zero never becomes zero."""
    x = jnp.array([8.0, -4.0, 0.0, 1.0] + [0.0] * 11 + [-1e-30], jnp.float32)
    coded = encode_int8(x, bits_of(x.shape), 16)
    assert coded.scales.tolist() == [8.0] and coded.codes.dtype == jnp.int8
    assert coded.codes[:4].tolist() == [127, -122, 0, 112] and coded.codes[15] == -1
    np.testing.assert_allclose(decode_int8(coded)[:4], x[:4], rtol=1e-6)


@pytest.mark.parametrize("code", ["bfloat16", "int8"])
def test_rounding_is_near_and_right_in_the_mean(code):
    x = jnp.tile(jax.random.normal(jax.random.key(1), (1, 64)), (4096, 1))
    if code == "bfloat16":
        back, step = round_to_bfloat16(x, bits_of(x.shape)).astype(jnp.float32), 2**-7
    else:
        back, step = decode_int8(encode_int8(x, bits_of(x.shape), 32)), 2**0.2 - 1
    error = np.asarray((back - x) / jnp.abs(x))
    assert np.abs(error).max() <= step * 1.0001
    assert np.abs(error).max() > step / 4  # it rounds at all
    assert np.abs(error.mean(0)).max() < 5 * step / 2 / 4096**0.5


def test_an_average_that_hardly_moves_does_move():
    """Squares of gradients fall from 1 to 0.5 by a thousandth a step: to the nearest, neither would move."""
    for form in ("bfloat16", "int8"):
        adam = stored(optax.scale_by_adam(b2=0.999), OptimizerState(form))
        params = jnp.zeros((128, 64))
        state = adam.init(params)
        inner = state.inner
        full = inner._replace(nu=jnp.ones_like(params), mu=jnp.zeros_like(params))
        start = state._replace(inner=full)

        def fall(state, _, adam=adam, params=params):
            return adam.update(params, state, params)[1], None

        start = jax.eval_shape(lambda s: fall(s, None)[0], start) and fall(start, None)[0]
        nu = jax.jit(lambda s: jax.lax.scan(fall, s, None, length=692)[0])(start).inner.nu
        nu = decode_int8(nu) if isinstance(nu, Coded) else nu.astype(jnp.float32)
        assert abs(float(nu.mean()) - 0.5) < 0.02, form


def test_only_large_averages_change_their_format():
    params = {"large": jnp.zeros((64, 128)), "small": jnp.zeros((128,)), "odd": jnp.zeros((512, 11))}
    state = stored(optax.adam(1e-3), OptimizerState("int8", block=32)).init(params).inner[0]
    assert state.mu["large"].codes.dtype == jnp.int8 and state.nu["large"].scales.shape == (64, 4)
    assert state.mu["small"].dtype == state.mu["odd"].dtype == jnp.float32
    bytes_of = lambda state: sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim == 2)
    plain = optax.adam(1e-3).init({"large": params["large"]})
    assert bytes_of({"large": state.mu["large"]}) * 3.5 < bytes_of(plain[0].mu)
    free = stored(optax.contrib.schedule_free_adamw(1e-3), OptimizerState("int8")).init({"large": params["large"]})
    assert free.inner.z["large"].dtype == jnp.float32  # weights, not an average
    with pytest.raises(ConfigError, match="use 16 or more"):
        OptimizerState(block=4)


def batch(mesh):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (4, 17)).astype(np.int32)
    info = TokenInfo.single(4, 16).replace(first_row=0)
    made = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((4, 16), np.float32), info)
    return jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), made)


class Run:
    """Training of one batch on two devices, by a config of the optimizer's state."""

    def __init__(self, form: OptimizerState):
        self.mesh = make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
        config = OptimizerConfig(learning_rate=3e-3, schedule=ConstantRate(), state=form)
        optimizer = make_optimizer(config, 50)
        self.abstract, self.shardings = state_shardings(MODEL, optimizer, self.mesh)
        self.fresh = lambda: init_state(MODEL, optimizer, self.mesh, 0)
        step = make_train_step(MODEL, optimizer, learning_rate(config, 50))
        self.take = jax.jit(step, out_shardings=(self.shardings, None))
        self.batch = batch(self.mesh)

    def steps(self, state, count):
        losses = []
        with jax.set_mesh(self.mesh):
            for _ in range(count):
                state, scalars = self.take(state, self.batch)
                losses.append(float(scalars["loss"]))
        return state, np.array(losses)


@pytest.fixture(scope="module")
def exact():
    run = Run(OptimizerState())
    return run.steps(run.fresh(), 50)


@pytest.mark.parametrize("form", keep("int8", of=("bfloat16", "int8")))
def test_training_stays_close_and_resumes_bit_equal(form, exact, tmp_path):
    run = Run(OptimizerState(form, block=32, place="host" if form == "int8" else "device"))
    middle, first = run.steps(run.fresh(), 20)
    end, rest = run.steps(middle, 30)
    losses = np.concatenate([first, rest])
    assert exact[1][-1] < 0.5 * exact[1][0]
    # Of the whole way down, at every step.
    far = np.abs(losses - exact[1]).max() / (exact[1][0] - exact[1][-1])
    assert 0 < far < (0.01 if form == "bfloat16" else 0.05), far
    with Checkpoints(tmp_path, create=True) as there:
        there.save(20, middle, {}, {})
        there.wait()
        restored, _, _ = there.restore(run.abstract, run.shardings)
    assert_equal_trees(restored, middle, what="restored")
    again, same = run.steps(restored, 30)
    np.testing.assert_array_equal(same, rest)
    assert_equal_trees(again, end, what="after resuming")


def test_a_state_on_the_host_lies_there_but_for_what_is_small():
    here, there = (stored(optax.adam(1e-3), OptimizerState(place=place)) for place in ("device", "host"))
    params = {"large": jnp.ones((64, 128)), "small": jnp.ones((8,))}
    state = here.init(params)
    lie = jax.tree.map(lambda x: x.sharding, state)
    shardings = placed(there, state, lie)
    assert placed(here, state, lie) == lie
    kinds = {shardings[0].mu[name].memory_kind for name in params} | {shardings[0].count.memory_kind}
    assert shardings[0].nu["large"].memory_kind == "pinned_host" and kinds == {"pinned_host", "device"}


def test_arrays_that_are_on_the_device_stay_as_they_are():
    x = jnp.ones((3,))
    assert "device_put" not in str(jax.make_jaxpr(on_device)(x))
