"""Where layers look: a whole iRoPE model against one in float64, and what is measured of it on text."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from irope_jax.attention.statistics import attention_statistics
from irope_jax.core.config import ConfigError
from irope_jax.data.tokenizer import ByteTokenizer
from irope_jax.evals.attention_reach import MEASURES, AttentionReach
from irope_jax.model.config import ModelConfig, irope_layers
from irope_jax.model.decoder import observed_attention
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.position.temperature import LogFloor
from tests import tiny
from tests.model.test_decoder import packed, params_of
from tests.oracles.decoder import attention_of_layers

MODEL = ModelConfig(
    vocab_size=288, d_model=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.4,
    pattern=irope_layers(4, SwiGLU(16), theta=100.0, interval=2, temperature=LogFloor(4, 0.5), qk_norm="rms"),
)  # fmt: skip
RULES = (
    dict(mask=dict(kind="chunked", size=4), theta=100.0, norm=True, temperature=None),
    dict(mask=dict(kind="global"), theta=None, norm=False, temperature=(4, 0.5)),
)


@pytest.fixture(scope="module")
def params():
    return params_of(MODEL)


@pytest.fixture(scope="module")
def measured(params):
    spec = AttentionReach(lengths=(32,), windows=3, sinks=2, recent=3, block=8, batch_tokens=64, by_position="heads")
    return list(spec.build(MODEL, ByteTokenizer()).run(params))


def test_every_layer_of_a_model_looks_where_float64_says(params):
    """Packed documents; probabilities are made from weights, so what the model hands out is judged too."""
    info, lengths = packed(11, 6, total=19), (11, 6)
    tokens = np.random.default_rng(0).integers(0, 288, (1, 19))
    observe = lambda of: attention_statistics(of, sinks=2, recent=3, block=8)
    found = jax.jit(lambda p: observed_attention(MODEL, p, tokens, info, observe))(params)
    starts = (0, 11)
    for start, length in zip(starts, lengths):
        wanted = attention_of_layers(params, tokens[0, start : start + length], RULES)
        for layer, p_NTS in enumerate(wanted):
            here = jax.tree.map(lambda x: np.asarray(x[layer // 2, 0, start : start + length]), found[layer % 2])  # noqa: B023
            rows = np.arange(length)
            back = np.maximum(rows[:, None] - rows, 0)
            first = np.isin(rows if layer % 2 else rows % 4, (0, 1))
            same = lambda got, want: np.testing.assert_allclose(got, want.T, rtol=2e-4, atol=2e-5)
            same(here.distance, np.einsum("nts,ts->nt", p_NTS, back))
            same(here.sink_mass, np.einsum("nts,s->nt", p_NTS, first.astype(float)))
            same(here.recent_mass, np.where(back < 3, p_NTS, 0).sum(-1))
            same(here.entropy, -(p_NTS * np.log(np.where(p_NTS > 0, p_NTS, 1))).sum(-1))


def test_heads_layers_and_positions_agree_with_each_other(measured):
    by = {}
    for m in measured:
        by.setdefault(m.name, []).append(m)
    assert {m.where["layer"]: (m.where["mask"], m.where["position"]) for m in by["distance"]} == {
        0: ("chunked", "rope"), 1: ("global", "nope"), 2: ("chunked", "rope"), 3: ("global", "nope"),
    }  # fmt: skip
    for name in MEASURES:
        for m in by[name]:
            same = [
                c
                for c in by[f"{name}_by_position"]
                if (c.where["layer"], c.where["head"]) == (m.where["layer"], m.where["head"])
            ]
            assert sum(c.count for c in same) == m.count
            assert math.isclose(sum(c.count * c.value for c in same) / m.count, m.value, rel_tol=1e-6)
    assert all(m.value <= 3 for m in by["distance"] if m.where["mask"] == "chunked")
    assert all(m.count == 3 * 32 for m in by["distance"])
    assert {m.where["layer"]: m.count for m in by["sink_mass"]} == {0: 48, 1: 90, 2: 48, 3: 90}
    assert all(0 <= m.value <= 1 + 1e-6 for name in MEASURES if name not in ("distance", "entropy") for m in by[name])


def test_curves_of_layers_are_means_over_heads(params, measured):
    spec = AttentionReach(lengths=(32,), windows=3, sinks=2, recent=3, block=32, batch_tokens=32)
    heads, layers = {}, {}
    for m in measured:
        if m.name == "entropy_by_position":
            heads.setdefault((m.where["layer"], m.where["from"]), []).append(m.value)
    for m in spec.build(MODEL, ByteTokenizer()).run(params):
        if m.name == "entropy_by_position":
            layers[m.where["layer"], m.where["from"]] = m.value
    assert layers.keys() == heads.keys() and len(layers) == 4 * 6
    for key, value in layers.items():
        assert math.isclose(value, np.mean(heads[key]), rel_tol=1e-5, abs_tol=1e-6)


def test_a_model_that_attends_evenly_says_so(params):
    even = jax.tree_util.tree_map_with_path(lambda path, x: x * 0 if "query" in str(path) else x, params)
    model = dataclasses.replace(MODEL, pattern=MODEL.pattern[1:])
    even = {**even, "periods": {"layer_0": even["periods"]["layer_1"]}}
    model = dataclasses.replace(model, num_layers=2)
    spec = AttentionReach(lengths=(32,), windows=1, sinks=2, recent=3, block=8)
    found = {(m.name, m.where.get("head")): m.value for m in spec.build(model, ByteTokenizer()).run(even)}
    for name in MEASURES[:3]:
        assert math.isclose(found[name, 3], found[f"even_{name}", None], rel_tol=1e-5)
    assert math.isclose(found["entropy_share", 0], 1.0, rel_tol=1e-5)
    assert math.isclose(found["distance", 0], 31 / 4, rel_tol=1e-5)
    assert math.isclose(found["entropy", 0], np.log(np.arange(1, 33)).mean(), rel_tol=1e-5)


def test_mistakes_are_said_before_a_run():
    with pytest.raises(ConfigError, match="windows"):
        AttentionReach(windows=10**9).build(MODEL, ByteTokenizer())
    with pytest.raises(ConfigError, match="sinks"):
        AttentionReach(sinks=0)
    assert tiny.experiment(("evals", "({'kind': 'attention_reach', 'lengths': (32,)},)")).evals[0].sinks == 4
