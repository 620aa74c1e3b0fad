"""The staircase of Llama 4: golden values, integer exactness, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.position import temperature
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


def test_golden_values_of_llama4():
    ours = temperature.scale(temperature.LogFloor(), np.array([list(GOLDEN)], np.int32))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours[0], list(GOLDEN.values()), rtol=1.5e-7)


@pytest.mark.parametrize("floor_scale, attn_scale", [(8192, 0.1), (128, 0.206), (1, 1.0), (1000, 0.3)])
def test_every_step_falls_where_integers_say(floor_scale, attn_scale):
    edges = floor_scale * np.array([1, 2, 3, 7, 100, 16_777])
    positions = np.unique(np.r_[0, edges - 2, edges - 1, edges, 16_777_215, 16_777_217]).clip(0).astype(np.int32)
    spec = temperature.LogFloor(floor_scale, attn_scale)
    ours = jax.jit(lambda p: temperature.scale(spec, p))(positions[None])[0]
    exact = [oracle.llama4_temperature(p, floor_scale, attn_scale) for p in positions]
    np.testing.assert_allclose(ours, exact, rtol=3e-7)


def test_no_temperature_is_nothing_to_multiply():
    assert temperature.scale(temperature.Constant(), np.zeros((1, 3), np.int32)) is None


def test_wrong_inputs_are_refused():
    with pytest.raises(ConfigError, match="floor_scale=0"):
        temperature.LogFloor(floor_scale=0)
    with pytest.raises(ConfigError, match="attn_scale"):
        temperature.LogFloor(attn_scale=-0.1)
    with pytest.raises(TypeError, match="integer"):
        temperature.scale(temperature.LogFloor(), np.zeros((1, 3), np.float32))
