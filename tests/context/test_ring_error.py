"""More devices in a ring do not err more: `scripts/check_ring_error.py`, smaller."""

from functools import cache, partial

import numpy as np
import pytest

from scripts.check_ring_error import LIMIT, exact, inputs, ring_errors
from tests.oracles.attention import attention as oracle

LENGTH = 256


@pytest.fixture(scope="module")
def errors():
    arrays = inputs(LENGTH)
    return cache(partial(ring_errors, arrays, exact(*arrays)))


def test_dense_float64_agrees_with_the_oracle_that_goes_query_by_query():
    q, k, v, dout = inputs(24)
    places = np.stack([np.arange(24), np.ones(24, int), np.arange(24)], axis=-1)[None]
    out, _, gradients = oracle(q, k, v, places, places, {"kind": "global"}, scale=q.shape[-1] ** -0.5, dout=dout)
    for found, wanted in zip(exact(q, k, v, dout), (out, *gradients), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ring, dtype", [(2, "bfloat16"), (4, "bfloat16"), (8, "bfloat16"), (8, "float32")])
def test_error_does_not_grow_with_the_ring(errors, ring, dtype):
    ratios = np.divide(errors(ring, dtype), errors(1, dtype))
    assert ratios.max() <= LIMIT, ratios


def test_gradients_that_travel_in_their_own_format_round_at_every_hop(errors):
    """What the test above would see if sums were not float32 on their way."""
    ratios = np.divide(errors(8, "bfloat16", gradients="keys"), errors(1, "bfloat16"))
    assert ratios[:3].max() <= LIMIT < ratios[3:].min(), ratios
