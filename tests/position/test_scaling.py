"""Each RoPE scaling against its formula written from the paper, Hugging Face's numbers, and what must hold of any."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest

from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.position import rope, scaling
from irope_jax.position.scaling import (
    NTK,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    NTKByParts,
    RopeScaling,
    Unscaled,
    YaRN,
)
from tests.oracles import position as position_oracle
from tests.oracles import scaling as oracle

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "hf_rope.json"
CASES = json.loads(GOLDEN.read_text())["cases"]
HEADS = [(16, 10000.0), (64, 100000.0), (128, 500000.0), (128, 1e6), (2, 10000.0)]
ONE_OF_EACH = (
    Unscaled(),
    Linear(4.0),
    NTK(8.0),
    DynamicNTK(2.0, 512, 64),
    NTKByParts(16.0, 4096),
    YaRN(4.0, 4096),
    Llama3(8.0, 8192),
    LongRoPE(4096, 32.0, (1.0, 2.0, 8.0, 32.0), (1.0, 1.0, 1.5, 2.0), first_tokens=4),
)


def exact(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=0)


def of_document(frequencies, length):
    """What a document of `length` tokens turns by."""
    return next((inv_freq for longest, inv_freq in frequencies.shorter if length <= longest), frequencies.inv_freq)


def check_formula(spec, wanted, head_dim, theta, seq_len=None):
    """Frequencies that no length changes, and no factor on logits."""
    found = spec.frequencies(head_dim, theta, seq_len)
    assert found.inv_freq.dtype == np.float64 and found.inv_freq.shape == (head_dim // 2,)
    exact(found.inv_freq, wanted)
    assert found.shorter == () and found.first_tokens == 0 and found.first is None
    return found


# ------------------------------------------------------------------------------------------- formulas of the papers


@pytest.mark.parametrize("head_dim, theta", HEADS)
def test_unscaled_is_the_paper_whatever_the_length(head_dim, theta):
    for seq_len in (None, 10, 10**7):
        found = check_formula(Unscaled(), oracle.unscaled(head_dim, theta), head_dim, theta, seq_len)
        assert (found.attention_factor, found.logit_factor) == (1.0, 1.0)


@pytest.mark.parametrize("head_dim, theta", HEADS)
@pytest.mark.parametrize("factor", [1.5, 4.0, 32.0])
def test_linear(head_dim, theta, factor):
    found = check_formula(Linear(factor), oracle.linear(head_dim, theta, factor), head_dim, theta)
    assert (found.attention_factor, found.logit_factor) == (1.0, 1.0)


@pytest.mark.parametrize("head_dim, theta", HEADS[:-1])
@pytest.mark.parametrize("factor", [1.5, 4.0, 32.0])
def test_ntk(head_dim, theta, factor):
    found = check_formula(NTK(factor), oracle.ntk(head_dim, theta, factor), head_dim, theta)
    assert (found.attention_factor, found.logit_factor) == (1.0, 1.0)
    # the same thing said by the base
    exact(found.inv_freq, oracle.unscaled(head_dim, theta * factor ** (head_dim / (head_dim - 2))))


def test_ntk_of_a_single_pair_keeps_it():
    for spec in (NTK(4.0), DynamicNTK(4.0, 8)):
        np.testing.assert_array_equal(spec.frequencies(2, 10000.0, 100).inv_freq, [1.0])


@pytest.mark.parametrize("head_dim, theta", HEADS)
@pytest.mark.parametrize("factor, length, low, high", [(4.0, 4096, 1, 32), (16.0, 512, 1, 4), (2.0, 10000, 0, 2.5)])
def test_ntk_by_parts(head_dim, theta, factor, length, low, high):
    wanted = oracle.ntk_by_parts(head_dim, theta, factor, length, low, high)
    found = check_formula(NTKByParts(factor, length, low, high), wanted, head_dim, theta)
    assert (found.attention_factor, found.logit_factor) == (1.0, 1.0)


@pytest.mark.parametrize("head_dim, theta", HEADS)
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    "factor, length, fast, slow",
    [
        (4.0, 4096, 32, 1),
        (40.0, 4096, 128, 2),
        (16.0, 600, 4, 1),
        (8.0, 16, 32, 1),
        (2.0, 10**7, 32, 1),  # the ramp ends past the last pair of 16 entries
        (2.0, 10**9, 32, 1),  # and past their width
        (8.0, 6, 32, 1),  # both ends at the first pair
    ],
)
def test_yarn(head_dim, theta, truncate, factor, length, fast, slow):
    spec = YaRN(factor, length, fast, slow, truncate)
    check_formula(spec, oracle.yarn(head_dim, theta, factor, length, fast, slow, truncate), head_dim, theta)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_whose_ramp_is_empty_is_a_step(truncate):
    found = YaRN(4.0, 4096, 2.0, 2.0, truncate).frequencies(64, 10000.0)
    exact(found.inv_freq, oracle.yarn(64, 10000.0, 4.0, 4096, 2.0, 2.0, truncate))


@pytest.mark.parametrize("mscale, mscale_all_dim", [(1.0, 0.0), (1.0, 1.0), (0.707, 0.707), (1.0, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("factor", [1.0, 4.0, 40.0])
def test_yarn_sharpens_attention(factor, mscale, mscale_all_dim):
    found = YaRN(factor, 4096, mscale=mscale, mscale_all_dim=mscale_all_dim).frequencies(64, 10000.0)
    exact(found.attention_factor, oracle.yarn_attention_factor(factor, mscale, mscale_all_dim))
    exact(found.attention_factor**2 * found.logit_factor, oracle.yarn_logit_factor(factor, mscale, mscale_all_dim))
    given = YaRN(factor, 4096, attention_factor=1.25).frequencies(64, 10000.0)
    assert (given.attention_factor, given.logit_factor) == (1.25, 1.0)


@pytest.mark.parametrize("head_dim, theta", HEADS)
@pytest.mark.parametrize(
    "factor, length, low, high", [(8.0, 8192, 1, 4), (32.0, 8192, 1, 4), (16.0, 8192, 1, 1), (3.0, 100, 2, 16)]
)
def test_llama3(head_dim, theta, factor, length, low, high):
    wanted = oracle.llama3(head_dim, theta, factor, length, low, high)
    found = check_formula(Llama3(factor, length, low, high), wanted, head_dim, theta)
    assert (found.attention_factor, found.logit_factor) == (1.0, 1.0)


@pytest.mark.parametrize("head_dim, theta", HEADS)
@pytest.mark.parametrize("short", [True, False])
def test_longrope(head_dim, theta, short):
    rng = np.random.default_rng(head_dim)
    long_factor, short_factor = (tuple(np.sort(rng.uniform(1, top, head_dim // 2)).tolist()) for top in (32, 2))
    spec = LongRoPE(4096, 32.0, long_factor, short_factor if short else ())
    wanted_long = oracle.longrope(head_dim, theta, long_factor)
    wanted_short = oracle.longrope(head_dim, theta, short_factor if short else [1.0] * (head_dim // 2))
    for seq_len in (None, 4097, 131072):  # rows that may hold long documents
        found = spec.frequencies(head_dim, theta, seq_len)
        exact(found.inv_freq, wanted_long)
        assert [length for length, _ in found.shorter] == [4096]
        exact(found.shorter[0][1], wanted_short)
    for seq_len in (1, 4096):  # rows that cannot
        check_formula(spec, wanted_short, head_dim, theta, seq_len)


@pytest.mark.parametrize("factor", [1.0, 4.0, 32.0])
def test_longrope_attention_follows_its_policy(factor):
    made = lambda **kw: LongRoPE(4096, factor, (1.0, 2.0), **kw).frequencies(4, 10000.0)
    exact(made().attention_factor, oracle.longrope_attention_factor(factor, 4096))
    exact(made(attention_policy="yarn").attention_factor, oracle.yarn_mscale(factor))
    assert made(attention_policy="none").attention_factor == 1.0
    assert made(attention_factor=1.5, attention_policy="none").attention_factor == 1.5
    assert made().logit_factor == 1.0


# ------------------------------------------------------------------------- what depends on the length of a document


@pytest.mark.parametrize("head_dim, theta", HEADS[:-1])
@pytest.mark.parametrize(
    "factor, original_length, step, seq_len",
    [(2.0, 100, 16, 300), (1.0, 96, 32, 192), (4.0, 64, 1000, 500), (3.0, 7, 1, 40), (2.0, 100, 16, 101)],
)
def test_dynamic_ntk_follows_each_document(head_dim, theta, factor, original_length, step, seq_len):
    found = DynamicNTK(factor, original_length, step).frequencies(head_dim, theta, seq_len)
    rungs = [length for length, _ in found.shorter]
    assert rungs == sorted(set(rungs)) and rungs[0] == original_length and rungs[-1] < seq_len
    for length in range(1, seq_len + 1):
        counted = length if length <= original_length else oracle.dynamic_length(length, step, seq_len)
        wanted = oracle.dynamic_ntk(head_dim, theta, factor, original_length, counted)
        exact(of_document(found, length), wanted)
        if length <= original_length:
            exact(of_document(found, length), oracle.unscaled(head_dim, theta))


def test_dynamic_ntk_of_short_rows_is_unscaled():
    for seq_len in (1, 511, 512):
        check_formula(DynamicNTK(8.0, 512), oracle.unscaled(64, 10000.0), 64, 10000.0, seq_len)


def test_dynamic_ntk_needs_a_length():
    with pytest.raises(ConfigError, match="length"):
        DynamicNTK(2.0, 512).frequencies(64, 10000.0)


def test_longer_rows_keep_the_frequencies_of_shorter_documents():
    """A whole step means the same in any row, so packing beside a long document changes nothing."""
    spec = DynamicNTK(2.0, 100, 16)
    narrow, wide = (spec.frequencies(64, 10000.0, seq_len) for seq_len in (192, 1000))
    for length in range(1, 193):
        np.testing.assert_array_equal(of_document(narrow, length), of_document(wide, length))


def test_packed_documents_turn_by_their_own_length():
    """The whole way to phases: each token by its document's rung, the first tokens unscaled."""
    dynamic = DynamicNTK(2.0, 20, 8).frequencies(16, 10000.0, 64)
    long_factor, short_factor = tuple(np.linspace(1, 8, 8).tolist()), tuple(np.linspace(1, 2, 8).tolist())
    longrope = LongRoPE(20, 4.0, long_factor, short_factor, first_tokens=3).frequencies(16, 10000.0, 64)
    assert longrope.first_tokens == 3
    exact(longrope.first, oracle.unscaled(16, 10000.0))
    positions = np.array([0, 2, 3, 19, 2, 3, 20, 24, 39, 63], np.int32)
    lengths = np.array([20, 20, 20, 20, 21, 21, 25, 25, 40, 64], np.int32)
    for frequencies in (dynamic, longrope):
        found = jax.jit(lambda p, n, f=frequencies: rope.phases(p, f, lengths=n))(positions, lengths)
        for at, length, angles in zip(positions, lengths, np.asarray(found, np.float64)):
            if frequencies is dynamic:
                n = 0 if length <= 20 else oracle.dynamic_length(length, 8, 64)
                inv_freq = oracle.dynamic_ntk(16, 10000.0, 2.0, 20, n)
            elif at < 3:
                inv_freq = oracle.unscaled(16, 10000.0)
            else:
                inv_freq = oracle.longrope(16, 10000.0, short_factor if length <= 20 else long_factor)
            wanted = [position_oracle.phase(at, f) for f in inv_freq]
            wrong = np.abs(np.remainder(angles - wanted + np.pi, 2 * np.pi) - np.pi)
            assert wrong.max() < 4e-6, (at, length)


# --------------------------------------------------------------------------------- numbers of other implementations


def of_hugging_face(case):
    """The spec and the rotated width of a golden case."""
    given = case["rope_parameters"]
    width = int(case["head_dim"] * given.get("partial_rotary_factor", 1.0))
    length = given.get("original_max_position_embeddings", case["max_position_embeddings"])
    optional = lambda *names: {name: given[name] for name in names if name in given}
    match given["rope_type"]:
        case "linear":
            return Linear(given["factor"]), width
        case "dynamic":
            return DynamicNTK(given["factor"], length), width
        case "yarn":
            names = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
            return YaRN(given["factor"], length, **optional(*names)), width
        case "llama3":
            return Llama3(given["factor"], length, given["low_freq_factor"], given["high_freq_factor"]), width
        case "longrope":
            factor = given.get("factor", case["max_position_embeddings"] / length)
            per_pair = {name: tuple(given[name]) for name in ("long_factor", "short_factor")}
            return LongRoPE(length, factor, **per_pair, **optional("attention_factor")), width
    return None


@pytest.mark.parametrize("case", [c for c in CASES if c["rope_parameters"]["rope_type"] != "proportional"])
def test_numbers_of_hugging_face(case):
    spec, width = of_hugging_face(case)
    seq_len = case["seq_len"] or case["max_position_embeddings"]
    found = spec.frequencies(width, case["rope_parameters"]["rope_theta"], seq_len)
    np.testing.assert_allclose(found.inv_freq, case["inv_freq"], rtol=1e-6, atol=0)  # theirs are float32
    exact(found.attention_factor, case["attention_factor"])


def test_hugging_face_agrees_with_the_oracle_of_partial_rotation():
    found = [c for c in CASES if c["rope_parameters"]["rope_type"] == "proportional"]
    assert len(found) == 4
    for case in found:
        given = case["rope_parameters"]
        wanted = position_oracle.p_rope_inv_freq(case["head_dim"], given["rope_theta"], given["partial_rotary_factor"])
        np.testing.assert_allclose(case["inv_freq"], wanted, rtol=1e-6, atol=0)


def counted(spec, theta=10000.0):
    """Of 64 pairs: kept, between, divided."""
    return oracle.kept_between_divided(spec.frequencies(128, theta).inv_freq, oracle.unscaled(128, theta), spec.factor)


def test_the_two_ramps_of_yarn():
    assert YaRN(4.0, 4096).ramp(128, 10000.0) == (20, 46)
    assert counted(YaRN(4.0, 4096)) == (21, 25, 18)
    assert counted(NTKByParts(4.0, 4096)) == (21, 25, 18)
    plain = oracle.unscaled(128, 10000.0)
    kept = [
        (spec.frequencies(128, 10000.0).inv_freq / plain - 1 / 4) / (1 - 1 / 4)
        for spec in (YaRN(4.0, 4096), NTKByParts(4.0, 4096))
    ]
    assert np.abs(kept[0] - kept[1]).max() == pytest.approx(0.37, abs=0.005)


def test_llama_checkpoints():
    assert counted(Llama3(8.0, 8192), theta=500000.0) == (29, 6, 29)  # 3.1
    with np.errstate(all="raise"):
        assert counted(Llama3(16.0, 8192, 1.0, 1.0), theta=500000.0) == (35, 0, 29)  # Llama 4 Scout: a hard step


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest_by_the_factor():
    found, plain = NTK(8.0).frequencies(128, 10000.0).inv_freq, oracle.unscaled(128, 10000.0)
    assert found[0] == 1.0
    assert found[-1] == pytest.approx(plain[-1] / 8, rel=1e-14)


def test_attention_factors_of_checkpoints():
    phi3 = LongRoPE(4096, 131072 / 4096, (1.0,)).frequencies(2, 10000.0)
    assert phi3.attention_factor == pytest.approx(1.190, abs=5e-4)
    deepseek_v3 = YaRN(40.0, 4096, mscale=1.0, mscale_all_dim=1.0).frequencies(64, 10000.0)
    assert deepseek_v3.attention_factor == 1.0
    assert deepseek_v3.logit_factor == pytest.approx(1.36889**2, rel=1e-5)


def test_critical_pair_is_the_first_that_never_finishes_a_turn():
    assert 2 * scaling.critical_pair(96, 10000.0, 2048) == 62
    assert 2 * scaling.critical_pair(128, 500000.0, 8192) == 70  # Llama 3
    for head_dim, theta in HEADS:
        for length in (4, 7, 100, 4096, 10**6, 10**9):
            turns = oracle.rotations(head_dim, theta, length)
            assert scaling.critical_pair(head_dim, theta, length) == np.sum(turns >= 1), (head_dim, theta, length)


# ----------------------------------------------------------------------------------------------- what holds of any


@pytest.mark.parametrize("head_dim, theta", HEADS)
def test_a_factor_of_one_changes_nothing(head_dim, theta):
    ones = (1.0,) * (head_dim // 2)
    unscaled = Unscaled().frequencies(head_dim, theta).inv_freq
    for spec in (
        Linear(1.0),
        NTK(1.0),
        NTKByParts(1.0, 4096),
        YaRN(1.0, 4096),
        YaRN(1.0, 4096, mscale_all_dim=1.0),
        Llama3(1.0, 8192),
        Llama3(1.0, 8192, 1.0, 1.0),
        LongRoPE(4096, 1.0, ones),
        LongRoPE(4096, 1.0, ones, ones),
        DynamicNTK(8.0, 8192),
    ):
        found = spec.frequencies(head_dim, theta, 8192)
        np.testing.assert_array_equal(found.inv_freq, unscaled, err_msg=str(spec))
        for _, inv_freq in found.shorter:
            np.testing.assert_array_equal(inv_freq, unscaled, err_msg=str(spec))
        assert (found.attention_factor, found.logit_factor) == (1.0, 1.0), spec


@pytest.mark.parametrize("head_dim, theta", HEADS)
@pytest.mark.parametrize(
    "spec",
    [Linear(6.0), NTK(6.0), DynamicNTK(6.0, 1024), NTKByParts(6.0, 1024), YaRN(6.0, 1024), Llama3(6.0, 1024)],
    ids=lambda spec: spec.kind,
)
def test_every_pair_stays_or_slows_down_by_at_most_the_factor(spec, head_dim, theta):
    found = spec.frequencies(head_dim, theta, 2048).inv_freq  # DynamicNTK's factor is 7 there
    slower = oracle.unscaled(head_dim, theta) / found
    assert slower.min() >= 1 - 1e-12 and slower.max() <= (7 if spec.kind == "dynamic_ntk" else 6) + 1e-9
    assert (np.diff(slower) >= -1e-9).all() and (np.diff(found) < 0).all()


@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=lambda spec: spec.kind)
def test_every_member_is_configuration(spec):
    assert from_dict(RopeScaling, json.loads(json.dumps(to_dict(spec)))) == spec
    assert to_dict(spec)["kind"] == spec.kind
    assert hash(spec) == hash(from_dict(RopeScaling, to_dict(spec)))


def test_one_of_each_is_all_there_are():
    assert {type(spec) for spec in ONE_OF_EACH} == set(RopeScaling.__args__)
    assert len({spec.kind for spec in ONE_OF_EACH}) == len(ONE_OF_EACH)


# ------------------------------------------------------------------------------------------------------- refusals

BASE = {
    Linear: {"factor": 2.0},
    NTK: {"factor": 2.0},
    DynamicNTK: {"factor": 2.0, "original_length": 512},
    NTKByParts: {"factor": 2.0, "original_length": 512},
    YaRN: {"factor": 2.0, "original_length": 512},
    Llama3: {"factor": 2.0, "original_length": 512},
    LongRoPE: {"factor": 2.0, "original_length": 512, "long_factor": (1.0, 2.0)},
}


@pytest.mark.parametrize("cls", BASE, ids=lambda cls: cls.kind)
@pytest.mark.parametrize("factor", [0.5, 0.0, -2.0, math.inf, math.nan])
def test_impossible_factors_are_refused(cls, factor):
    with pytest.raises(ConfigError) as refusal:
        cls(**BASE[cls] | {"factor": factor})
    assert refusal.value.field == "factor"


@pytest.mark.parametrize("cls", [cls for cls in BASE if "original_length" in BASE[cls]], ids=lambda cls: cls.kind)
@pytest.mark.parametrize("length", [0, -5])
def test_impossible_lengths_are_refused(cls, length):
    with pytest.raises(ConfigError) as refusal:
        cls(**BASE[cls] | {"original_length": length})
    assert refusal.value.field == "original_length"


@pytest.mark.parametrize(
    "cls, field, value",
    [
        (DynamicNTK, "step", 0),
        (NTKByParts, "low_rotations", 32.0),  # not below high_rotations
        (NTKByParts, "low_rotations", -1.0),
        (YaRN, "beta_slow", 0.0),
        (YaRN, "beta_slow", 33.0),
        (YaRN, "attention_factor", 0.0),
        (YaRN, "mscale", -1.0),
        (YaRN, "mscale_all_dim", -1.0),
        (Llama3, "low_freq_factor", 0.0),
        (Llama3, "low_freq_factor", 5.0),
        (LongRoPE, "long_factor", (1.0, 0.0)),
        (LongRoPE, "long_factor", (1.0, -2.0)),
        (LongRoPE, "long_factor", (math.inf, 2.0)),
        (LongRoPE, "long_factor", ()),
        (LongRoPE, "short_factor", (1.0, math.nan)),
        (LongRoPE, "first_tokens", -1),
        (LongRoPE, "attention_factor", -1.0),
        (LongRoPE, "attention_policy", "other"),
    ],
)
def test_impossible_fields_are_refused(cls, field, value):
    with pytest.raises(ConfigError) as refusal:
        cls(**BASE[cls] | {field: value})
    assert refusal.value.field == field


@pytest.mark.parametrize("field", ["long_factor", "short_factor"])
def test_factors_that_do_not_fit_the_head_are_counted(field):
    given = {"long_factor": (1.0, 2.0, 3.0, 4.0), "short_factor": (1.0,) * 4} | {field: (1.0, 2.0, 3.0)}
    for seq_len in (10, 10**5):  # whichever is used
        with pytest.raises(ConfigError) as refusal:
            LongRoPE(4096, 4.0, **given).frequencies(8, 10000.0, seq_len)
        assert refusal.value.field.endswith(field)
        assert "3 factors" in str(refusal.value) and "4 pairs" in str(refusal.value)


@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=lambda spec: spec.kind)
def test_odd_head_width_is_refused(spec):
    with pytest.raises(ConfigError, match="head_dim=5"):
        spec.frequencies(5, 10000.0, 100)
