"""Temperatures: golden values, integer exactness, what each counts, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.attention.mask import Chunked, Global, Sliding, allowed, visible_keys
from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.core.types import TokenInfo
from irope_jax.position import temperature
from irope_jax.position.temperature import Constant, LogFloor, LogN, SSMax, TemperatureSpec
from tests.oracles import position as oracle

GOLDEN = {
    0: 1.0,
    8190: 1.0,
    8191: 1.0693147180559945,
    16383: 1.109861228866811,
    65535: 1.219722457733622,
    131071: 1.2833213344056216,
    262143: 1.349650756146648,
    1048575: 1.4859812404361672,
    10485759: 1.7155396301896735,
}


def at(positions) -> TokenInfo:
    positions = np.asarray([positions], np.int32)
    return TokenInfo(positions, np.ones_like(positions), positions, document_multiple=0)


def factors(spec, positions, learned_N=None):
    info = at(positions)
    return temperature.scale(spec, info, info.positions + 1, learned_N)[0]


def test_golden_values_of_llama4():
    ours = factors(LogFloor(), list(GOLDEN))
    assert ours.dtype == jnp.float32 and ours.shape == (len(GOLDEN), 1)
    np.testing.assert_allclose(ours[:, 0], list(GOLDEN.values()), rtol=1.5e-7)


@pytest.mark.parametrize("floor_scale, attn_scale", [(8192, 0.1), (128, 0.206), (1, 1.0), (1000, 0.3)])
def test_every_step_falls_where_integers_say(floor_scale, attn_scale):
    edges = floor_scale * np.array([1, 2, 3, 7, 100, 16_777])
    positions = np.unique(np.r_[0, edges - 2, edges - 1, edges, 16_777_215, 16_777_217]).clip(0).astype(np.int32)
    ours = jax.jit(lambda: factors(LogFloor(floor_scale, attn_scale), positions))()[:, 0]
    exact = [oracle.llama4_temperature(p, floor_scale, attn_scale) for p in positions]
    np.testing.assert_allclose(ours, exact, rtol=3e-7)
    ours = factors(LogFloor(floor_scale, attn_scale, offset=0), positions)[:, 0]
    np.testing.assert_allclose(ours, [oracle.ministral(p, floor_scale, attn_scale) for p in positions], rtol=3e-7)


def test_one_factor_for_a_whole_document():
    """By length, every token of a document has the factor that its last token has by position."""
    positions = np.array([[0, 1, 2, 3, 0, 1, 0, 0]], np.int32)
    segments = np.array([[1, 1, 1, 1, 2, 2, 3, 0]], np.int32)
    info = TokenInfo(positions, segments, np.arange(8, dtype=np.int32)[None])
    ours = temperature.scale(LogFloor(2, 1.0, by="length"), info, info.positions)[0, :, 0]
    by_length = {n: 1 + np.log1p(n // 2) for n in (4, 2, 1)}
    np.testing.assert_allclose(ours, [by_length[4]] * 4 + [by_length[2]] * 2 + [by_length[1]] * 2, rtol=1e-6)


def test_log_n_changes_nothing_within_the_training_length():
    positions = [0, 5, 127, 128, 1000, 10**6]
    ours = factors(LogN(128), positions)[:, 0]
    np.testing.assert_allclose(ours, [oracle.log_n(p, 128) for p in positions], rtol=1e-6)
    assert list(ours[:3]) == [1, 1, 1] and ours[3] > 1


@pytest.mark.parametrize("length", [2, 128, 1024])
def test_ssmax_starts_with_mean_one_and_differs_by_head(length):
    spec = SSMax(length)
    assert spec.initial == pytest.approx(oracle.ssmax_init(length), rel=1e-9)
    learned = np.array([spec.initial, 2.0], np.float32)
    ours = np.asarray(factors(spec, np.arange(length), learned))
    assert ours[:, 0].mean() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(ours[:, 1], 2 * np.log(np.arange(1, length + 1)), rtol=1e-6, atol=1e-6)


MASKS = [Global(), Chunked(4), Chunked(4, shift=1), Chunked(4, by="row", shift=3), Sliding(3)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_visible_keys_are_what_the_mask_draws(mask):
    positions = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 0]], np.int32)
    segments = np.array([[1] * 6 + [2] * 7 + [3]], np.int32)
    info = TokenInfo(positions, segments, np.arange(14, dtype=np.int32)[None])
    np.testing.assert_array_equal(visible_keys(mask, info), allowed(mask, info, info).sum(-1))


def test_evaluation_only_means_not_while_training():
    assert temperature.in_training(LogFloor(when="eval")) == Constant()
    assert temperature.in_training(LogFloor()) == LogFloor() and temperature.in_training(SSMax(8)) == SSMax(8)
    assert temperature.in_training(LogN(8, when="eval")) == Constant()


def test_no_temperature_is_nothing_to_multiply():
    info = at([0, 1, 2])
    assert temperature.scale(Constant(), info, info.positions) is None


def test_specs_are_configuration_and_refuse_what_is_wrong():
    for spec in (Constant(), LogFloor(offset=0, by="length", when="eval"), LogN(64), SSMax(64)):
        assert from_dict(TemperatureSpec, to_dict(spec)) == spec
    for make, field in (
        (lambda: LogFloor(floor_scale=0), "floor_scale=0"),
        (lambda: LogFloor(attn_scale=-0.1), "attn_scale"),
        (lambda: LogN(1), "train_length=1"),
        (lambda: SSMax(1), "train_length=1"),
        (lambda: from_dict(TemperatureSpec, {"kind": "log_floor", "offset": 2}), "offset"),
    ):
        with pytest.raises(ConfigError, match=field):
            make()
    with pytest.raises(TypeError, match="integer"):
        temperature.scale(LogFloor(), TokenInfo(*[np.zeros((1, 3), np.float32)] * 3), np.zeros((1, 3), np.float32))
