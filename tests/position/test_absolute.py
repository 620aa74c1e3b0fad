"""Sinusoids against the paper; what is refused."""

import numpy as np
import pytest

from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.position.absolute import Learned, NoEmbedding, PositionEmbedding, Sinusoidal, sinusoids
from tests.oracles import position as oracle


def test_sinusoids_are_those_of_the_paper():
    positions = np.array([[0, 1, 2, 100, 10**6]], np.int32)
    ours = sinusoids(Sinusoidal(amplitude=0.5), positions, 16)
    assert ours.shape == (1, 5, 16)
    np.testing.assert_allclose(ours[0], 0.5 * oracle.sinusoidal(positions[0], 16), atol=1e-5)


def test_specs_are_configuration_and_refuse_what_is_wrong():
    for spec in (NoEmbedding(), Sinusoidal(base=500.0), Learned(64)):
        assert from_dict(PositionEmbedding, to_dict(spec)) == spec
    for make, field in (
        (lambda: Sinusoidal(base=1.0), "base"),
        (lambda: Sinusoidal(amplitude=0.0), "amplitude"),
        (lambda: Learned(0), "size=0"),
        (lambda: sinusoids(Sinusoidal(), np.zeros((1, 2), np.int32), 7), "d_model=7"),
    ):
        with pytest.raises(ConfigError, match=field):
            make()
