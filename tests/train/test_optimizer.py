import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.train.algorithms import AdamW
from irope_jax.train.optimizer import OptimizerConfig, decayed, learning_rate, make_optimizer
from irope_jax.train.schedules import ConstantRate, Cosine, Linear, WarmupStableDecay


def rates(schedule, steps=100, peak=1.0):
    rate = learning_rate(OptimizerConfig(learning_rate=peak, schedule=schedule), steps)
    return np.array([float(rate(step)) for step in range(steps + 1)])


@pytest.mark.parametrize("schedule", [ConstantRate(10), Cosine(10), Linear(10), WarmupStableDecay(10, 20)])
def test_every_schedule_warms_up_evenly_to_its_peak(schedule):
    np.testing.assert_allclose(rates(schedule)[:11], np.linspace(1 / 11, 1, 11), atol=1e-6)


def test_after_warm_up_each_schedule_has_its_shape():
    after = np.arange(91) / 90
    np.testing.assert_allclose(
        rates(Cosine(10, final=0.1))[10:], 0.1 + 0.9 * (1 + np.cos(np.pi * after)) / 2, atol=1e-5
    )
    np.testing.assert_allclose(rates(Linear(10))[10:], 1 - after, atol=1e-5)
    assert (rates(ConstantRate(10))[10:] == 1).all()
    wsd = rates(WarmupStableDecay(10, 20))
    assert (wsd[10:81] == 1).all()
    np.testing.assert_allclose(wsd[80:], 1 - np.arange(21) / 20, atol=1e-5)


def test_warm_up_longer_than_the_run_is_an_error():
    with pytest.raises(ConfigError, match="more than the 100 steps"):
        rates(WarmupStableDecay(90, 20))


def test_weight_decay_leaves_what_the_patterns_name():
    params = {"norm": {"scale": jnp.ones(2)}, "w": jnp.ones(2)}
    assert decayed(params, ("*scale",)) == {"norm": {"scale": False}, "w": True}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, schedule=ConstantRate(), weight_decay=0.5), 10)
    zeros = {"norm": {"scale": jnp.zeros(2)}, "w": jnp.zeros(2)}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.05 * np.ones(2), rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"]["scale"], np.zeros(2))


def test_clipping_scales_the_whole_gradient():
    gradient = {"a": jnp.full(4, 30.0), "b": jnp.full(4, 40.0)}
    params = {"a": jnp.zeros(4), "b": jnp.zeros(4)}
    config = OptimizerConfig(
        learning_rate=1.0, schedule=ConstantRate(), algorithm=AdamW(b1=0.0, eps=1.0), weight_decay=0.0, clip_norm=1.0
    )
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    clipped = np.array([0.3, 0.4])  # global norm 100 -> 1
    np.testing.assert_allclose([-updates["a"][0], -updates["b"][0]], clipped / (clipped + 1), rtol=1e-5)


@pytest.mark.parametrize("bad", [dict(learning_rate=0.0), dict(weight_decay=-1.0), dict(clip_norm=0.0)])
def test_values_that_cannot_work_are_refused(bad):
    with pytest.raises(ConfigError):
        OptimizerConfig(**bad)
