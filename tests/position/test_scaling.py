"""Each RoPE scaling against its formula written from the paper."""

import numpy as np
import pytest

from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.position.scaling import RopeScaling, Unscaled
from tests.oracles import position as oracle


def test_unscaled_is_the_paper_whatever_the_length():
    for seq_len in (None, 10, 10**7):
        ours = Unscaled().frequencies(64, 500000.0, seq_len)
        np.testing.assert_allclose(ours.inv_freq, oracle.rope_inv_freq(64, 500000.0), rtol=1e-14)
        assert ours.attention_factor == 1.0


def test_odd_head_width_is_refused():
    with pytest.raises(ConfigError, match="head_dim=5"):
        Unscaled().frequencies(5, 10000.0)


def test_union_is_configuration():
    assert to_dict(Unscaled()) == {"kind": "unscaled"}
    assert from_dict(RopeScaling, {"kind": "unscaled"}) == Unscaled()
