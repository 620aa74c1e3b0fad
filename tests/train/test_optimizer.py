import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.train.algorithms import Adafactor, AdamW, Lion, Muon, ScheduleFreeAdamW
from irope_jax.train.optimizer import Group, OptimizerConfig, decayed, learning_rate, make_optimizer
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


@pytest.mark.parametrize(
    "bad",
    [
        lambda: AdamW(b2=1.0),
        lambda: Lion(b1=-0.1),
        lambda: Muon(rms=0.0),
        lambda: Adafactor(min_factored=1),
        lambda: ScheduleFreeAdamW(b1=0.0),
        lambda: Group(()),
        lambda: Group(("*",), learning_rate=0.0),
        lambda: OptimizerConfig(ema_decay=1.0),
        lambda: OptimizerConfig(algorithm=ScheduleFreeAdamW()),  # with a rate that decays
        lambda: OptimizerConfig(algorithm=ScheduleFreeAdamW(), schedule=ConstantRate(), ema_decay=0.9),
    ],
)
def test_algorithms_and_groups_that_cannot_work_are_refused(bad):
    with pytest.raises(ConfigError):
        bad()


def steps(optimizer, params, gradients, count=1):
    state = optimizer.init(params)
    for _ in range(count):
        updates, state = optimizer.update(gradients, state, params)
        params = {name: params[name] + updates[name] for name in params}
    return params


def test_the_first_group_that_names_a_parameter_has_it():
    """A sign of the gradient, so that every update is its rate; then decay, in units of it."""
    params = {name: jnp.full(2, 1.0) for name in ("a_scale", "b_scale", "b", "c_scale", "c")}
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule=ConstantRate(),
        algorithm=Lion(),
        weight_decay=0.5,
        groups=(Group(("a*", "b_*"), 2.0), Group(("b*",), weight_decay=0.0), Group(("*_scale",), 3.0, 0.25)),
        clip_norm=None,
    )
    found = steps(make_optimizer(config, 10), params, {name: jnp.ones(2) for name in params})
    moved = {name: float((1 - value[0]) / 0.1) for name, value in found.items()}
    wanted = {"a_scale": 2.0, "b_scale": 2.0, "b": 1.0, "c_scale": 3 * 1.25, "c": 1.5}  # of a_scale no decay
    assert moved == pytest.approx(wanted, rel=1e-5)


def test_groups_share_one_clipping_and_leave_what_is_frozen():
    params = {name: jnp.zeros(4) for name in ("a", "b", "c")}
    gradient = {"a": jnp.full(4, 30.0), "b": jnp.full(4, 40.0), "c": jnp.full(4, 1e6)}
    config = OptimizerConfig(
        learning_rate=1.0, schedule=ConstantRate(), algorithm=AdamW(b1=0.0, eps=1.0), weight_decay=0.0,
        groups=(Group(("a",), 0.5),), frozen=("c",),
    )  # fmt: skip
    found = steps(make_optimizer(config, 10), params, gradient)
    clipped = np.array([0.3, 0.4])  # the norm of a and b is 100, whatever c has
    np.testing.assert_allclose([-found["a"][0], -found["b"][0]], clipped / (clipped + 1) * [0.5, 1], rtol=1e-5)
    assert not found["c"].any()


def test_a_group_that_names_nothing_is_an_error():
    params = {"attention": jnp.ones(2), "head": jnp.ones(2)}
    config = OptimizerConfig(groups=(Group(("head",)), Group(("head", "atention"))), schedule=ConstantRate())
    with pytest.raises(ConfigError, match=r"train\.optimizer\.groups\.1\.patterns='atention'.*mean 'attention'"):
        make_optimizer(config, 10).init(params)
    config = OptimizerConfig(groups=(Group(("head",)),), frozen=("head",))
    with pytest.raises(ConfigError, match="matches no parameter that is trained"):
        make_optimizer(config, 10).init(params)


def test_the_average_keeps_what_the_config_says_and_less_in_the_beginning():
    optimizer = make_optimizer(OptimizerConfig(ema_decay=0.6), 100)
    values = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    averaged, wanted = {"w": jnp.asarray(values[0])}, values[0].astype(np.float64)
    for step, value in enumerate(values[1:]):
        averaged = optimizer.average(averaged, {"w": jnp.asarray(value, jnp.bfloat16)}, None, jnp.asarray(step))
        keep = min(0.6, (1 + step) / (10 + step))
        wanted = keep * wanted + (1 - keep) * np.asarray(jnp.asarray(value, jnp.bfloat16), np.float64)
    assert averaged["w"].dtype == jnp.float32 and keep == 0.6
    np.testing.assert_allclose(averaged["w"], wanted, rtol=1e-5, atol=1e-6)
    assert make_optimizer(OptimizerConfig(), 100).average is None


def test_what_schedule_free_does_not_train_is_evaluated_as_it_is():
    config = OptimizerConfig(algorithm=ScheduleFreeAdamW(), schedule=ConstantRate(), frozen=("b",))
    optimizer = make_optimizer(config, 10)
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "layer": {"balance_bias": jnp.ones(2)}}
    state = optimizer.init(params)
    moved = {"a": params["a"], "b": params["b"], "layer": {"balance_bias": jnp.full(2, 5.0)}}  # by its rule
    averaged = optimizer.average(params, moved, state, jnp.asarray(0))
    np.testing.assert_array_equal(averaged["layer"]["balance_bias"], np.full(2, 5.0))
    np.testing.assert_array_equal(averaged["b"], np.ones(2))
    zeros = {"a": jnp.zeros(2), "b": jnp.zeros(2), "layer": {"balance_bias": jnp.zeros(2)}}
    updates, _ = optimizer.update(zeros, state, moved)
    assert not updates["layer"]["balance_bias"].any()


def test_schedule_free_refuses_weights_in_bfloat16():
    config = OptimizerConfig(algorithm=ScheduleFreeAdamW(), schedule=ConstantRate())
    with pytest.raises(ConfigError, match=r"precision\.params"):
        make_optimizer(config, 10).init({"a": jnp.ones(2, jnp.bfloat16)})
