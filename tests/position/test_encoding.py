"""Every kind of layer as configuration and as what the model calls: distances, exactness, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.core.types import TokenInfo
from irope_jax.position import encoding, rope
from irope_jax.position.encoding import ALiBi, NoPE, PositionSpec, RoPE, XPos
from irope_jax.position.extension import DualChunk, ReRoPE, SelfExtend
from irope_jax.position.rope import Turns
from irope_jax.position.scaling import DynamicNTK, LongRoPE, Unscaled, YaRN
from tests.oracles import position as oracle

AT = np.array([[2, 3, 4], [0, 1, 10**7]], np.int32)
FACTORS = (1.0, 1.5, 2.0, 4.0)


def inputs(head_dim=8, length=3):
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((2, length, n, head_dim)).astype(np.float32) for n in (4, 2))


def encode(spec, q, k, at=AT, info=None, **options):
    info = info or TokenInfo.single(*at.shape)
    return encoding.encode(spec, q, k, info, at, **options)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_queries_and_keys_turn_by_their_positions(pairing):
    q, k = inputs()
    ours = jax.jit(lambda *a: encode(RoPE(theta=50.0, pairing=pairing), *a))(q, k)
    inv_freq = oracle.rope_inv_freq(8, 50.0)
    np.testing.assert_allclose(ours[0], oracle.rope_rotate(q, AT, inv_freq, pairing), atol=1e-5)
    np.testing.assert_allclose(ours[1], oracle.rope_rotate(k, AT, inv_freq, pairing), atol=1e-5)


def test_angles_are_computed_once_for_queries_and_keys():
    q, k = inputs()
    jaxpr = str(jax.make_jaxpr(lambda q, k: encode(RoPE(), q, k))(q, k))
    assert jaxpr.count(" cos ") == 1 and jaxpr.count(" sin ") == 1


@pytest.mark.parametrize("spec", [NoPE(), ALiBi()], ids=lambda s: s.kind)
def test_kinds_that_do_not_rotate_return_what_they_got(spec):
    q, k = inputs()
    ours = encode(spec, q, k)
    assert ours[0] is q and ours[1] is k and encoding.logit_factor(spec, 8) == 1.0


def test_gradient_is_the_rotation_back():
    q, k = inputs()
    _, vjp = jax.vjp(lambda q: encode(RoPE(), q, k)[0], q)
    (back,) = vjp(jnp.asarray(q))
    np.testing.assert_allclose(back, rope.rotate(q, -AT, RoPE().frequencies(8)), atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 40])
def test_alibi_slopes_for_any_number_of_heads(heads):
    np.testing.assert_allclose(encoding.slopes(ALiBi(), heads), oracle.alibi_slopes(heads), rtol=1e-6)
    assert encoding.slopes(RoPE(), heads) is None


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("part", ["proportional", "prefix"])
def test_a_part_of_a_head_turns(part, fraction):
    spec = RoPE(theta=100.0, fraction=fraction, part=part)
    q, k = inputs(head_dim=16)
    ours = np.asarray(encode(spec, q, k)[0])
    table = oracle.p_rope_inv_freq if part == "proportional" else oracle.prefix_inv_freq
    inv_freq = table(16, 100.0, fraction)
    np.testing.assert_allclose(spec.frequencies(16).inv_freq, inv_freq, rtol=1e-12)
    width = 2 * len(inv_freq)
    np.testing.assert_allclose(ours[..., :width], oracle.rope_rotate(q[..., :width], AT, inv_freq, "half"), atol=1e-5)
    np.testing.assert_array_equal(ours[..., width:], q[..., width:])  # a prefix leaves the rest bit for bit
    still = np.r_[np.arange(8)[inv_freq == 0], 8 + np.arange(8)[inv_freq == 0]] if part == "proportional" else []
    np.testing.assert_array_equal(ours[..., still], q[..., still])


def test_a_factor_on_a_prefix_lies_on_the_prefix_and_not_on_the_logits():
    scaling = YaRN(factor=4.0, original_length=64)
    factor = scaling.frequencies(8, 10000.0).attention_factor
    q, k = inputs(head_dim=16)
    whole = RoPE(scaling=scaling)
    part = RoPE(scaling=scaling, fraction=0.5, part="prefix")
    assert encoding.logit_factor(whole, 16) == pytest.approx(factor**2) and encoding.logit_factor(part, 16) == 1.0
    turned = np.asarray(encode(part, q, k)[0])
    np.testing.assert_allclose(
        np.linalg.norm(turned[..., :8], axis=-1), factor * np.linalg.norm(q[..., :8], axis=-1), rtol=1e-5
    )
    np.testing.assert_array_equal(turned[..., 8:], q[..., 8:])


def test_first_tokens_turn_bit_for_bit_unscaled():
    """The n-hat of LongRoPE, in the very rotation that every other token shares."""
    q, k = inputs(head_dim=8, length=12)
    at = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    scaled = RoPE(scaling=LongRoPE(4, 4.0, FACTORS, first_tokens=5))
    ours, plain = encode(scaled, q, k, at)[0], encode(RoPE(), q, k, at)[0]
    np.testing.assert_array_equal(ours[:, :5], plain[:, :5])
    assert np.abs(ours[:, 5:] - plain[:, 5:]).max(axis=(0, 2, 3)).min() > 0.1
    everywhere = encode(RoPE(scaling=LongRoPE(4, 4.0, FACTORS)), q, k, at)[0]
    np.testing.assert_array_equal(ours[:, 5:], everywhere[:, 5:])
    assert not encoding.is_relative(scaled) and encoding.is_relative(RoPE())


@pytest.mark.parametrize("scaling", [DynamicNTK(2.0, 4, step=2), LongRoPE(4, 4.0, FACTORS)], ids=lambda s: s.kind)
def test_a_packed_document_turns_as_it_does_alone(scaling):
    """Frequencies follow the length of the document, not that of the row or the batch."""
    lengths, total = (3, 8, 5), 18
    positions = np.concatenate([*(np.arange(n) for n in lengths), np.zeros(2, int)]).astype(np.int32)[None]
    segments = np.concatenate([*(np.full(n, i + 1) for i, n in enumerate(lengths)), np.zeros(2, int)])
    rows = np.arange(total, dtype=np.int32)[None]
    info = TokenInfo(positions, segments.astype(np.int32)[None], rows, first_row=0)
    q, k = (x[:1] for x in inputs(length=total))
    spec = RoPE(scaling=scaling)
    together = encode(spec, q, k, positions, info)
    order = np.random.default_rng(1).permutation(total)
    shuffled = encode(spec, q[:, order], k[:, order], positions[:, order], info.take(order))
    for x, y in zip(together, shuffled):
        np.testing.assert_array_equal(np.asarray(x)[:, order], y)
    start = 0
    for n in lengths:
        here = slice(start, start + n)
        alone = encode(spec, q[:, here], k[:, here], positions[:, here])
        # rounded up to the step, but never past the row: 8 and 5 tokens alone are rows of 8 and 5
        even = scaling.kind == "longrope" or n % 2 == 0 or n <= 4
        if even:
            np.testing.assert_array_equal(np.asarray(together[0])[:, here], alone[0])
        start += n


def test_frequencies_may_be_arguments_and_be_trained():
    q, k = inputs()
    spec = RoPE(scaling=YaRN(factor=4.0, original_length=64))
    compiled = jax.jit(lambda turns: encode(RoPE(), q, k, turns=turns)[0])
    ours = compiled(Turns.of(spec.frequencies(8)))
    np.testing.assert_allclose(ours, encode(spec, q, k)[0], atol=1e-6)
    compiled(Turns.of(RoPE(theta=77.0).frequencies(8)))
    assert compiled._cache_size() == 1

    at = np.array([[2, 3, 40], [0, 1, 5]], np.int32)
    inv_freq = jnp.asarray(spec.frequencies(8).inv_freq, jnp.float32)
    loss = lambda f: jnp.square(encode(RoPE(), q, k, at, turns=Turns.learned(f))[0] - 1).sum()
    np.testing.assert_allclose(
        encode(RoPE(), q, k, at, turns=Turns.learned(inv_freq))[0], encode(spec, q, k, at)[0], atol=2e-5
    )
    slope = np.asarray(jax.grad(loss)(inv_freq))
    exact = lambda f: np.square(oracle.rope_rotate(q, at, f, "half") - 1).sum()  # float64
    for i in range(4):
        step = np.zeros(4)
        step[i] = 1e-6
        numeric = (exact(np.asarray(inv_freq, float) + step) - exact(np.asarray(inv_freq, float) - step)) / 2e-6
        np.testing.assert_allclose(slope[i], numeric, rtol=1e-4)


def test_xpos_decays_with_distance_and_refuses_what_would_overflow():
    spec = XPos(rope=RoPE(theta=100.0))
    q, k = inputs(head_dim=16, length=9)
    at = np.broadcast_to(np.arange(9, dtype=np.int32) * 700, (2, 9))
    zeta = oracle.xpos_scale(16, 0.4)
    turned = encode(spec.rope, q, k, at)
    ours = encode(spec, q, k, at, longest=9 * 700)
    for place in range(8):
        one = np.zeros((2, 9, 4, 16), np.float32)
        one[..., [place, 8 + place]] = 1.0
        with_decay = np.einsum("btnh,bsnh->bts", ours[0][:, :, :2] * one[:, :, :2], ours[1])
        without = np.einsum("btnh,bsnh->bts", turned[0][:, :, :2] * one[:, :, :2], turned[1])
        distance = (at[:, :, None] - at[:, None, :]) / 512
        np.testing.assert_allclose(with_decay, without * zeta[place] ** distance, rtol=2e-3, atol=1e-3)
    with pytest.raises(ConfigError, match=r"xpos.*26,156.*chunked"):
        encode(spec, q, k, at, longest=30_000)


def span_info(starts, widths):
    return TokenInfo.spans(np.array([starts], np.int32), np.array([widths], np.int32))


def test_a_span_turns_as_the_mean_of_its_positions():
    """Span attenuation by brute force: the mean of the rotated vector over every position of the run."""
    starts, widths = [0, 32, 64, 70, 71], [32, 32, 6, 1, 2]
    info = span_info(starts, widths)
    centres = np.asarray(info.positions + info.offsets)[0]
    np.testing.assert_array_equal(centres, [15.5, 47.5, 66.5, 70.0, 71.5])
    x = np.random.default_rng(0).standard_normal((1, 5, 2, 16)).astype(np.float32)
    spec = RoPE(theta=100.0, blur="span")
    ours = np.asarray(encoding.encode(spec, x, x, info, info.positions)[0])
    inv_freq = oracle.rope_inv_freq(16, 100.0)
    for t, (start, width) in enumerate(zip(starts, widths)):
        runs = [
            oracle.rope_rotate(x[:, t : t + 1], np.array([[p]]), inv_freq, "half") for p in range(start, start + width)
        ]
        np.testing.assert_allclose(ours[:, t : t + 1], np.mean(runs, axis=0), atol=2e-6)


def test_attenuations_equal_their_definitions():
    inv_freq = oracle.rope_inv_freq(32, 10000.0)
    for sigma in (0.0, 0.5, 9.23):
        ours = rope.attenuation(jnp.asarray(inv_freq, jnp.float32), np.float32(sigma), "gaussian")
        np.testing.assert_allclose(ours, oracle.gaussian_attenuation(sigma, inv_freq), atol=1e-6)
    for width in (1, 2, 7, 32, 1024):
        sigma = np.sqrt((width**2 - 1) / 12)
        ours = rope.attenuation(jnp.asarray(inv_freq, jnp.float32), np.float32(sigma), "span")
        np.testing.assert_allclose(ours, oracle.span_attenuation(width, inv_freq), atol=2e-5)


@pytest.mark.parametrize("blur", ["gaussian", "span"])
def test_spread_zero_is_rope_bit_for_bit(blur):
    q, k = inputs()
    info = TokenInfo.single(2, 3)
    zero = info.replace(spreads=jnp.zeros((2, 3)), offsets=jnp.zeros((2, 3)))
    for ours, plain in zip(encode(RoPE(blur=blur), q, k, info=zero), encode(RoPE(), q, k, info=info)):
        np.testing.assert_array_equal(ours, plain)


EXTENDED = [
    (SelfExtend(window=4, group=3), lambda n: oracle.self_extend_distance(n, 4, 3)),
    (ReRoPE(window=5), lambda n: oracle.rerope_distance(n, 5)),
    (DualChunk(chunk=6, farthest=9), lambda n: dual_chunk_distance(n, 6, 9)),
]


def dual_chunk_distance(length, chunk, farthest):
    """Written out pair by pair; the example of the paper has chunk 6 and farthest 9."""
    out = np.zeros((length, length))
    for i in range(length):
        for j in range(i + 1):
            between = i // chunk - j // chunk
            at = {0: i % chunk, 1: min(i % chunk + chunk, farthest)}.get(between, farthest)
            out[i, j] = at - j % chunk
    return out


@pytest.mark.parametrize("spec, distances", EXTENDED, ids=[s.kind for s, _ in EXTENDED])
def test_extensions_ask_for_the_distances_they_say(spec, distances):
    """Each visible pair is in exactly one part, at the distance of a double loop."""
    from irope_jax.attention.mask import Chunked, Global, Sliding, allowed

    length = 29
    info = TokenInfo.single(1, length)
    seen, found = np.zeros((length, length), int), np.zeros((length, length))
    for part in spec.parts(info):
        mask = Sliding(part.window) if part.window else Chunked(part.chunk) if part.chunk else Global()
        here = np.asarray(allowed(mask, part.q_info, part.k_info))[0]
        seen += here
        between = np.asarray(part.q_positions)[0][:, None] - np.asarray(part.k_positions)[0][None, :]
        found = np.where(here, between, found)
    np.testing.assert_array_equal(seen, np.tril(np.ones((length, length), int)))
    lower = np.tril(np.ones((length, length), bool))
    np.testing.assert_array_equal(found[lower], distances(length)[lower])


def test_odd_head_width_names_the_field_and_the_fix():
    q, k = inputs(head_dim=7)
    with pytest.raises(ConfigError, match=r"head_dim=7: .*even"):
        encode(RoPE(), q, k)


def test_specs_are_configuration():
    spec = RoPE(theta=500000.0, pairing="interleaved")
    assert to_dict(spec)["scaling"] == {"kind": "unscaled"} and to_dict(spec)["pairing"] == "interleaved"
    others = [NoPE(), ALiBi(), XPos(), *(s for s, _ in EXTENDED), RoPE(scaling=LongRoPE(4, 4.0, FACTORS))]
    for s in (spec, *others):
        assert from_dict(PositionSpec, to_dict(s)) == s and hash(s) == hash(dataclasses.replace(s))
    assert hash(spec) == hash(RoPE(theta=500000.0, scaling=Unscaled(), pairing="interleaved"))
    assert encoding.logit_factor(spec, 8) == 1.0
    for change, field in (
        (dict(theta=0.5), "theta"),
        (dict(fraction=0.0), "fraction"),
        (dict(part="suffix"), "part"),
        (dict(pairing="halve"), "pairing"),
        (dict(blur="box"), "blur"),
    ):
        with pytest.raises(ConfigError, match=field):
            RoPE(**change)
    with pytest.raises(ConfigError, match=r"fraction=0.3.*pairs"):
        RoPE(fraction=0.3, part="prefix").check(16)
    with pytest.raises(ConfigError, match="pairing"):
        from_dict(PositionSpec, {"kind": "rope", "pairing": "halve"})
    with pytest.raises(ConfigError, match=r"farthest=3.*chunk=6"):
        DualChunk(chunk=6, farthest=3)
