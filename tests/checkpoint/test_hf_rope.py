"""Rotations of Hugging Face configs: old and new keys, both directions, and what is refused."""

import math

import pytest

from irope_jax.checkpoint.hf_rope import rope_from_hf, rope_to_hf
from irope_jax.core.config import ConfigError
from irope_jax.position.rotary import RoPE
from irope_jax.position.scaling import NTK, DynamicNTK, Linear, Llama3, LongRoPE, NTKByParts, Unscaled, YaRN

FACTORS = (1.0, 1.5, 2.0, 4.0)


def config(**parameters):
    return {"max_position_embeddings": 512, "rope_parameters": {"rope_theta": 5e4, **parameters}}


CASES = [
    (config(rope_type="default"), Unscaled()),
    (config(rope_type="linear", factor=4.0), Linear(4.0)),
    (config(rope_type="dynamic", factor=2.0), DynamicNTK(2.0, 512, step=1)),
    (config(rope_type="yarn", factor=8.0, original_max_position_embeddings=64), YaRN(8.0, 64)),
    (config(rope_type="yarn", factor=8.0), YaRN(8.0, 512)),
    (config(rope_type="yarn", factor=None, original_max_position_embeddings=64), YaRN(8.0, 64)),
    (
        config(
            rope_type="llama3",
            factor=8.0,
            original_max_position_embeddings=64,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
        Llama3(8.0, 64),
    ),
    (
        config(
            rope_type="longrope",
            long_factor=list(FACTORS),
            short_factor=[1, 1, 1, 1],
            original_max_position_embeddings=64,
        ),
        LongRoPE(64, 8.0, FACTORS, (1.0,) * 4),
    ),
]


@pytest.mark.parametrize("values, scaling", CASES, ids=lambda x: getattr(x, "kind", ""))
def test_each_method_is_read_and_written(values, scaling):
    rope = rope_from_hf(values)
    assert rope == RoPE(5e4, scaling)
    written = {"max_position_embeddings": 512} | rope_to_hf(rope, 8)
    again = rope_from_hf(written)
    for length in (40, 600, 5000):
        old, new = rope.frequencies(8, length), again.frequencies(8, length)
        assert (old.inv_freq == new.inv_freq).all() and old.attention_factor == pytest.approx(new.attention_factor)


def test_keys_of_transformers_4():
    old = {"max_position_embeddings": 512, "rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4}}
    assert rope_from_hf(old) == RoPE(5e4, Linear(4.0))
    assert rope_from_hf({"rope_theta": 1e6, "rope_scaling": None, "max_position_embeddings": 8}) == RoPE(1e6)
    assert rope_from_hf({"max_position_embeddings": 8}) == RoPE(1e4)
    assert rope_from_hf(old | {"rope_parameters": {}}) == RoPE(5e4, Linear(4.0))
    phi = {
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "long_factor": list(FACTORS), "short_factor": list(FACTORS)},
        "partial_rotary_factor": 0.5,
    }
    assert rope_from_hf(phi) == RoPE(1e4, LongRoPE(64, 8.0, FACTORS, FACTORS), fraction=0.5, part="prefix")


def test_deepseek_pair_is_a_quotient_without_softmax_scale():
    """transformers' Llama reads the pair only where both are there, and leaves the softmax scale alone."""
    both = rope_from_hf(config(rope_type="yarn", factor=40.0, mscale=1.0, mscale_all_dim=0.5)).scaling
    magnitude = lambda k: 0.1 * k * math.log(40.0) + 1
    assert both.attention_factor == pytest.approx(magnitude(1.0) / magnitude(0.5)) and both.mscale_all_dim == 0
    one = rope_from_hf(config(rope_type="yarn", factor=40.0, mscale=0.7)).scaling
    assert one.frequencies(8, 1e4).attention_factor == pytest.approx(magnitude(1.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (config(rope_type="linaer", factor=2.0), r"rope_type='linaer'.*linear"),
        (config(rope_type="linear"), r"rope_parameters.factor=None.*number"),
        (config(rope_type="linear", factor=math.nan), r"factor=nan.*finite"),
        (config(rope_type="linear", factor=-2.0), r"factor=-2.0.*1 or more"),
        (config(rope_type="linear", factor=True), r"factor=True.*number"),
        (config(rope_type="linear", factor=2.0, betafast=3), r"betafast=3.*no such parameter"),
        (config(rope_type="longrope", factor=2.0, long_factor="x", short_factor=[]), r"long_factor='x'.*list"),
        (config(rope_type=["linear"]), r"rope_type=\['linear'\]"),
        (config(rope_type="default", rope_theta=10**400), r"rope_theta=1000.*finite"),
        (config(rope_type="yarn", factor=2.0, original_max_position_embeddings=64.5), r"embeddings=64.5.*tokens"),
        (config(rope_type="yarn", original_max_position_embeddings=0), r"embeddings=0.*2 or more"),
        (config(rope_type="longrope", factor=2.0, long_factor=[2.0], short_factor=[]), r"short_factor=\[\].*list"),
        (config(rope_type="default") | {"rope_scaling": {"type": "linear", "factor": 2}}, r"^rope_scaling=.*keep one"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, r"one set of parameters"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"^max_position_embeddings=None.*length"),
        (config(rope_type="default", partial_rotary_factor=1.5), r"fraction=1.5"),
    ],
)
def test_what_cannot_be_read_names_the_field(values, message):
    with pytest.raises(ConfigError, match=message):
        rope_from_hf(values)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (RoPE(pairing="interleaved"), r"pairing='interleaved'.*half"),
        (RoPE(fraction=0.5), r"fraction=0.5.*stand still"),
        (RoPE(scaling=NTK(2.0)), r"ntk.*theta=25198.*unscaled"),
        (RoPE(scaling=NTKByParts(2.0, 64)), r"ntk_by_parts.*no such method"),
        (RoPE(scaling=DynamicNTK(2.0, 64)), r"step=256.*step=1"),
        (RoPE(scaling=YaRN(2.0, 64, mscale_all_dim=1.0)), r"mscale_all_dim=1.0.*attention_factor"),
        (RoPE(scaling=LongRoPE(64, 2.0, FACTORS, first_tokens=4)), r"first_tokens=4.*\(0,\)"),
    ],
    ids=str,
)
def test_what_the_format_cannot_say_is_refused(rope, message):
    with pytest.raises(ConfigError, match=message):
        rope_to_hf(rope, 8)
