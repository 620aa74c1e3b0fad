"""RoPE and NoPE as configuration and as the function the model calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.position import encoding, rope
from irope_jax.position.encoding import NoPE, RoPE
from irope_jax.position.scaling import Unscaled
from tests.oracles import position as oracle


def inputs(head_dim=8):
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((2, t, n, head_dim)).astype(np.float32) for t, n in ((3, 4), (5, 2)))
    return q, k, np.array([[2, 3, 4], [0, 1, 10**7]], np.int32), np.arange(10, dtype=np.int32).reshape(2, 5)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_queries_and_keys_turn_by_their_own_positions(pairing):
    q, k, q_at, k_at = inputs()
    ours = jax.jit(lambda *a: encoding.encode(RoPE(theta=50.0, pairing=pairing), *a))(q, k, q_at, k_at)
    inv_freq = oracle.rope_inv_freq(8, 50.0)
    np.testing.assert_allclose(ours[0], oracle.rope_rotate(q, q_at, inv_freq, pairing), atol=1e-5)
    np.testing.assert_allclose(ours[1], oracle.rope_rotate(k, k_at, inv_freq, pairing), atol=1e-5)


def test_shared_positions_compute_their_angles_once():
    q, _, at, _ = inputs()

    def both(q, k, a):
        return encoding.encode(RoPE(), q, k, a, a)

    jaxpr = str(jax.make_jaxpr(both)(q, q, at))
    assert jaxpr.count(" cos ") == 1 and jaxpr.count(" sin ") == 1
    np.testing.assert_array_equal(*both(q, q, at))


def test_nope_returns_what_it_got():
    q, k, q_at, k_at = inputs()
    ours = encoding.encode(NoPE(), q, k, q_at, k_at)
    assert ours[0] is q and ours[1] is k and encoding.logit_factor(NoPE(), 8) == 1.0


def test_gradient_is_the_rotation_back():
    q, k, q_at, k_at = inputs()
    _, vjp = jax.vjp(lambda q: encoding.encode(RoPE(), q, k, q_at, k_at)[0], q)
    (back,) = vjp(jnp.asarray(q))
    np.testing.assert_allclose(back, rope.rotate(q, -q_at, RoPE().frequencies(8)), atol=1e-5)


def test_odd_head_width_names_the_field_and_the_fix():
    q, k, q_at, k_at = inputs(head_dim=7)
    with pytest.raises(ConfigError, match=r"head_dim=7: .*even"):
        encoding.encode(RoPE(), q, k, q_at, k_at)


def test_specs_are_configuration():
    spec = RoPE(theta=500000.0, pairing="interleaved")
    assert to_dict(spec) == {
        "kind": "rope",
        "theta": 500000.0,
        "scaling": {"kind": "unscaled"},
        "pairing": "interleaved",
    }
    for s in (spec, NoPE()):
        assert from_dict(encoding.PositionSpec, to_dict(s)) == s
    assert hash(spec) == hash(RoPE(theta=500000.0, scaling=Unscaled(), pairing="interleaved"))
    assert encoding.logit_factor(spec, 8) == 1.0
    with pytest.raises(ConfigError, match="theta"):
        RoPE(theta=0.5)
    with pytest.raises(ConfigError, match="pairing"):
        from_dict(encoding.PositionSpec, {"kind": "rope", "pairing": "halve"})
