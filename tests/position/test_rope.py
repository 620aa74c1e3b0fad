"""Rotation and phases against a float64 oracle with exact reduction, and by the properties that define RoPE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.position import rope, scaling
from tests.oracles import position as oracle

PAIRINGS = ("half", "interleaved")
FAR = (0, 1, 2047, 2048, 100_000, 1_000_000, 10_000_000, 2**24 + 1, 10**8, 2**31 - 1)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("head_dim, theta", [(8, 10000.0), (128, 500000.0), (64, 1e9)])
def test_frequencies_of_the_paper(head_dim, theta):
    ours = rope.Frequencies.geometric(head_dim, theta)
    assert ours.inv_freq.dtype == np.float64 and ours.attention_factor == 1.0
    np.testing.assert_allclose(ours.inv_freq, oracle.rope_inv_freq(head_dim, theta), rtol=1e-14)


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e9])
@pytest.mark.parametrize("jit", [False, True])
def test_phases_stay_right_at_any_position(theta, jit):
    frequencies = rope.Frequencies.geometric(128, theta)
    positions = np.array([*FAR, -1, -(10**7)], np.int32)
    compute = jax.jit(rope.phases, static_argnums=1) if jit else rope.phases
    ours = np.asarray(compute(positions, frequencies), np.float64)
    exact = np.array([[oracle.phase(p, f) for f in frequencies.inv_freq] for p in positions])
    wrong = np.abs(np.remainder(ours - exact + np.pi, 2 * np.pi) - np.pi)
    assert wrong.max() < 4e-6
    assert np.abs(ours).max() <= np.pi * (1 + 1e-6)


SCALINGS = [
    scaling.Linear(16.0),
    scaling.NTK(16.0),
    scaling.DynamicNTK(2.0, 8192, step=2**29),
    scaling.NTKByParts(16.0, 8192),
    scaling.YaRN(16.0, 8192),
    scaling.Llama3(16.0, 8192),
    scaling.LongRoPE(8192, 16.0, tuple(np.linspace(1, 16, 64)), first_tokens=4),
]


@pytest.mark.parametrize("spec", SCALINGS, ids=lambda s: s.kind)
def test_phases_of_scaled_frequencies_stay_right(spec):
    frequencies = spec.frequencies(128, 500000.0, 2**31 - 1)
    positions = np.array(FAR, np.int32)
    ours = np.asarray(rope.phases(positions, frequencies, lengths=np.full_like(positions, 2**31 - 1)), np.float64)
    for angle, p in zip(ours, positions):
        inv_freq = frequencies.first if p < frequencies.first_tokens else frequencies.inv_freq
        exact = np.array([oracle.phase(p, f) for f in inv_freq])
        assert np.abs(np.remainder(angle - exact + np.pi, 2 * np.pi) - np.pi).max() < 4e-6


def test_a_plain_float32_product_would_fail():
    """The reason for the fixed-point phases, kept as a fact."""
    frequencies = rope.Frequencies.geometric(128, 500000.0)
    naive = np.float32(1e7) * frequencies.inv_freq.astype(np.float32)
    exact = np.array([oracle.phase(10_000_000, f) for f in frequencies.inv_freq])
    assert np.abs(np.remainder(naive - exact + np.pi, 2 * np.pi) - np.pi).max() > 0.05


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_rotate_against_dense_rotation_matrices(pairing):
    x = normal(0, 2, 5, 3, 8)
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 10**7, 2**24 + 1, 10**8]], np.int32)
    frequencies = rope.Frequencies.geometric(8, 100.0)
    ours = rope.rotate(x, positions, frequencies, pairing)
    np.testing.assert_allclose(ours, oracle.rope_rotate(x, positions, frequencies.inv_freq, pairing), atol=2e-5)
    np.testing.assert_array_equal(ours[0, 0], x[0, 0])  # position 0 does nothing


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("offset", [5, 10**6, 10**8])
def test_scores_depend_on_distance_only(pairing, offset):
    q, k = normal(1, 1, 9, 2, 16), normal(2, 1, 9, 2, 16)
    frequencies = rope.Frequencies.geometric(16, 10000.0)
    places = jnp.arange(9, dtype=jnp.int32)[None]

    def scores(shift):
        turned = [rope.rotate(x, places + shift, frequencies, pairing) for x in (q, k)]
        return jnp.einsum("btnh,bsnh->bnts", *turned)

    np.testing.assert_allclose(scores(offset), scores(0), atol=1e-4)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_rotation_keeps_norms_and_turns_back(pairing):
    x, positions = normal(3, 2, 6, 2, 32), np.array([np.arange(6), 10**7 + np.arange(6)], np.int32)
    frequencies = rope.Frequencies.geometric(32, 10000.0)
    there = rope.rotate(x, positions, frequencies, pairing)
    np.testing.assert_allclose(np.linalg.norm(there, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(rope.rotate(there, -positions, frequencies, pairing), x, atol=2e-5)


def test_the_pairings_are_one_map_after_a_permutation():
    x, positions = normal(4, 1, 7, 2, 12), np.arange(7, dtype=np.int32)[None] * 1000
    frequencies = rope.Frequencies.geometric(12, 10000.0)
    evens_then_odds = np.r_[0:12:2, 1:12:2]
    interleaved = rope.rotate(x, positions, frequencies, "interleaved")
    half = rope.rotate(x[..., evens_then_odds], positions, frequencies, "half")
    np.testing.assert_array_equal(half, np.asarray(interleaved)[..., evens_then_odds])


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_chunk_relative_positions_score_the_same_within_a_chunk(pairing):
    size, frequencies = 8, rope.Frequencies.geometric(16, 500000.0)
    q, k = normal(5, 1, 24, 1, 16), normal(6, 1, 24, 1, 16)
    absolute = np.arange(10**7, 10**7 + 24, dtype=np.int32)[None]  # 10**7 is a multiple of the chunk

    def score(p):
        return jnp.einsum("btnh,bsnh->bts", *(rope.rotate(x, p, frequencies, pairing) for x in (q, k)))

    same_chunk = np.equal.outer(np.arange(24) // size, np.arange(24) // size)
    relative, exact = np.asarray(score(absolute % size))[0], np.asarray(score(absolute))[0]
    np.testing.assert_allclose(relative[same_chunk], exact[same_chunk], atol=1e-4)
    assert np.abs(relative - exact)[~same_chunk].max() > 0.1  # across chunks they mean different distances


def test_low_precision_inputs_turn_in_float32():
    x = jnp.asarray(normal(7, 1, 4, 2, 8), jnp.bfloat16)
    positions, frequencies = np.array([[0, 3, 10**6, 10**7]], np.int32), rope.Frequencies.geometric(8, 10000.0)
    ours = rope.rotate(x, positions, frequencies, "half")
    assert ours.dtype == jnp.bfloat16
    exact = oracle.rope_rotate(np.asarray(x, np.float32), positions, frequencies.inv_freq, "half")
    np.testing.assert_allclose(np.asarray(ours, np.float32), exact, rtol=2**-8, atol=1e-5)


def test_wrong_inputs_are_refused():
    frequencies = rope.Frequencies.geometric(8, 10000.0)
    with pytest.raises(ConfigError, match=r"head_dim=7: .*even"):
        rope.Frequencies.geometric(7, 10000.0)
    with pytest.raises(TypeError, match="integers"):
        rope.phases(np.zeros((1, 3), np.float32), frequencies)
    with pytest.raises(ConfigError, match="head_dim=6"):
        rope.rotate(np.zeros((1, 3, 1, 6), np.float32), np.zeros((1, 3), np.int32), frequencies, "half")
    with pytest.raises(ConfigError, match="pairing"):
        rope.rotate(np.zeros((1, 3, 1, 8), np.float32), np.zeros((1, 3), np.int32), frequencies, "other")
