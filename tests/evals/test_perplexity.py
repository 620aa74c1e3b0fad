"""Perplexity against windows cut by hand and logits looked at one by one."""

import jax
import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.core.types import TokenInfo
from irope_jax.data.sources import TextFile
from irope_jax.data.tokenizer import ByteTokenizer
from irope_jax.evals.forward import rows_per_batch
from irope_jax.evals.perplexity import Perplexity, position_buckets
from irope_jax.model.decoder import logits
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.optimizer import make_optimizer
from irope_jax.train.state import init_state
from tests import tiny

TOKENIZER = ByteTokenizer(num_symbols=16)
LENGTHS = (4, 24)


@pytest.fixture(scope="module")
def model():
    return tiny.experiment(("model.init_std", "0.5")).model  # large weights: losses far from those of guessing


@pytest.fixture(scope="module")
def params(model):
    experiment = tiny.experiment()
    optimizer = make_optimizer(experiment.train.optimizer, experiment.train.steps)
    return jax.device_get(init_state(model, optimizer, make_mesh(MeshConfig(), jax.devices()[:1]), 0).params)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), size=size)) for size in (70, 10, 58)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n@@@\n".join(texts))
    return TextFile(str(path), separator="@@@"), path


def spec(texts, **changes):
    return Perplexity(**(dict(source=texts[0], lengths=LENGTHS, tokens=96, batch_tokens=72) | changes))


def measure(spec, model, params):
    return {(m.name, *m.where.values()): (m.value, m.count) for m in spec.build(model, TOKENIZER).run(params)}


@pytest.fixture(scope="module")
def measured(texts, model, params):
    return measure(spec(texts), model, params)


def by_hand(texts, length, count, model, params):
    """float64 `[count, length]`: losses of the first `count` windows, each a batch of its own."""
    from irope_jax.data.sources import open_source

    documents = [[256, *text.encode(), 257] for text in open_source(texts[0])]
    windows = [d[k : k + length + 1] for d in documents for k in range(0, len(d), length) if k + length + 1 <= len(d)]
    score = jax.jit(lambda tokens: logits(model, params, tokens, TokenInfo.single(1, length)))
    found = []
    for window in windows[:count]:
        logits_TV = np.asarray(score(np.array([window[:-1]], np.int32))[0], np.float64)
        log_z = np.log(np.exp(logits_TV - logits_TV.max(-1, keepdims=True)).sum(-1)) + logits_TV.max(-1)
        found.append(log_z - logits_TV[np.arange(length), window[1:]])
    return np.array(found)


@pytest.mark.parametrize("length", LENGTHS)
def test_losses_by_length_and_position_are_those_of_windows_scored_one_by_one(texts, measured, model, params, length):
    nll = by_hand(texts, length, 96 // length, model, params)
    assert nll.shape == (96 // length, length) and nll.std() > 0.5
    value, count = measured["nll_by_length", length]
    assert count == nll.size and value == pytest.approx(nll.mean(), rel=2e-6)
    for low, high in position_buckets(length):
        value, count = measured["nll_by_position", length, low, high]
        assert count == nll[:, low:high].size and value == pytest.approx(nll[:, low:high].mean(), rel=2e-6)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_mean_over_positions_is_the_mean_by_length(measured, length):
    cells = [found for key, found in measured.items() if key[:2] == ("nll_by_position", length)]
    total, count = sum(value * n for value, n in cells), sum(n for _, n in cells)
    assert measured["nll_by_length", length] == (pytest.approx(total / count), count)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 63, 64, 65, 1000, 8192])
def test_buckets_cut_the_positions_into_doubling_parts(length):
    buckets = position_buckets(length)
    assert [p for low, high in buckets for p in range(low, high)] == list(range(length))
    assert all(high == 2 * low for low, high in buckets[1:-1])
    assert buckets[:2] == [(0, 1), (1, 2)]


def test_a_mesh_measures_the_same(texts, measured, model, params):
    with jax.set_mesh(make_mesh(MeshConfig(data=8))):
        found = measure(spec(texts), model, params)
    assert {key: count for key, (_, count) in found.items()} == {key: count for key, (_, count) in measured.items()}
    assert all(found[key][0] == pytest.approx(value, rel=2e-6) for key, (value, _) in measured.items())


def test_rows_fill_a_batch_and_divide_over_the_mesh():
    assert [rows_per_batch(96, length) for length in (8, 96, 97, 500)] == [12, 1, 1, 1]
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, context=2))):
        assert [rows_per_batch(96, length) for length in (8, 12, 96, 500)] == [12, 8, 4, 4]


def test_mistakes_are_found_before_anything_runs(texts, model):
    with pytest.raises(ConfigError, match=r"config.evals.perplexity.tokens=4800: the source has 5 windows of 24"):
        spec(texts, tokens=4800, lengths=(24,)).build(model, TOKENIZER)
    for wrong in (dict(lengths=()), dict(lengths=(1,)), dict(tokens=0), dict(batch_tokens=0)):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            spec(texts, **wrong)
