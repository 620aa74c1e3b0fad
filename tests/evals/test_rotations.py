"""Scores of frequencies: the loss of the model that has them in its config; one compilation; gradients that help."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from irope_jax.attention.mask import Chunked, Global
from irope_jax.core.config import ConfigError
from irope_jax.data.sources import Corpus
from irope_jax.data.tokenizer import ByteTokenizer
from irope_jax.evals.perplexity import Perplexity, position_buckets
from irope_jax.evals.rotations import (
    Gradient,
    NeedleLoss,
    RotationScorer,
    TextLoss,
    searched_rotation,
    train_factors,
    with_scaling,
)
from irope_jax.model.config import LayerSpec, ModelConfig
from irope_jax.model.decoder import init_params
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.position.encoding import NoPE, RoPE
from irope_jax.position.scaling import LongRoPE, YaRN

FFN = SwiGLU(16)
LOCAL = LayerSpec(RoPE(), Chunked(8), FFN)
MODEL = ModelConfig(
    vocab_size=272, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, init_std=0.4,
    pattern=(LOCAL, LayerSpec(RoPE(theta=100.0), Global(), FFN)),
)  # fmt: skip
TOKENIZER = ByteTokenizer()
LENGTH = 96


@pytest.fixture(scope="module")
def params():
    return nn.meta.unbox(jax.jit(lambda: init_params(MODEL, jax.random.key(0)))())


@pytest.fixture(scope="module")
def scorer():
    objective = TextLoss(Corpus("validation"), documents=3)
    return RotationScorer(MODEL, TOKENIZER, objective, LENGTH, magnitude=1.1, batch_tokens=2 * LENGTH, at_once=2)


CANDIDATES = [((1.0, 1.0, 1.0, 1.0), 0), ((1.0, 1.5, 2.0, 3.0), 0), ((1.0, 1.5, 2.0, 3.0), 17)]


def test_a_score_is_the_loss_of_the_model_with_those_factors(params, scorer):
    found = scorer.score(params, CANDIDATES[:2]) + scorer.score(params, CANDIDATES[2:])
    assert len(set(found)) == 3 and scorer._sums._cache_size() == 1  # any factors, one compiled program
    spec = Perplexity(source=Corpus("validation"), lengths=(LENGTH,), tokens=3 * LENGTH, batch_tokens=4 * LENGTH)
    for (factors, first), score in zip(CANDIDATES, found):
        scaling = LongRoPE(2, 1.0, factors, first_tokens=first, attention_factor=1.1)
        evaluator = spec.build(with_scaling(MODEL, scaling), TOKENIZER)
        assert next(iter(evaluator.run(params))).value == pytest.approx(score, abs=2e-6)
    with pytest.raises(ValueError, match="1 to 2"):
        scorer.score(params, CANDIDATES)


def test_positions_before_the_first_are_read_and_not_scored(params):
    sizes = dict(batch_tokens=LENGTH, at_once=1)
    whole = RotationScorer(MODEL, TOKENIZER, TextLoss(documents=1), LENGTH, **sizes)
    late = RotationScorer(MODEL, TOKENIZER, TextLoss(documents=1, first_position=90), LENGTH, **sizes)
    weights = [sum(float(b.weights.sum()) for b in s.documents) for s in (whole, late)]
    assert weights == [LENGTH, 6]
    with pytest.raises(ConfigError, match=r"objective.first_position=96.*less"):
        RotationScorer(MODEL, TOKENIZER, TextLoss(documents=1, first_position=96), LENGTH, **sizes)


def test_needles_weigh_their_answers_alone():
    needles = list(NeedleLoss(documents=3).batches(TOKENIZER, 400, 2))
    assert [int((b.weights > 0).sum()) for b in needles] == [16, 8]  # a space and seven digits each
    again = list(NeedleLoss(documents=3).batches(TOKENIZER, 400, 2))
    np.testing.assert_array_equal(needles[0].tokens, again[0].tokens)
    with pytest.raises(ConfigError, match=r"length=100000000"):
        next(NeedleLoss().batches(TOKENIZER, 10**8, 1))


def test_trained_factors_lower_the_loss_and_keep_the_rules(params, scorer):
    start = CANDIDATES[1][0]
    steps = list(train_factors(scorer, params, Gradient(steps=8, learning_rate=0.05), start, highest=4.0))
    losses = [loss for _, loss in steps]
    assert len(steps) == 9 and losses[0] == pytest.approx(scorer.score(params, [CANDIDATES[1]])[0], abs=1e-5)
    assert min(losses) < losses[0] - 1e-5
    for factors, _ in steps:
        assert factors == sorted(factors) and factors[0] >= 1.0 and factors[-1] <= 4.0


def test_only_layers_that_rotate_over_a_global_mask_are_searched():
    scaled = with_scaling(MODEL, YaRN(2.0, 64))
    assert scaled.pattern[0] == LOCAL and scaled.pattern[1].position == RoPE(100.0, YaRN(2.0, 64))
    assert searched_rotation(scaled) == RoPE(100.0)
    with pytest.raises(ConfigError, match="no layer rotates"):
        with_scaling(dataclasses.replace(MODEL, pattern=(LOCAL, LayerSpec(NoPE(), Global(), FFN))), YaRN(2.0, 64))
    other = LayerSpec(RoPE(theta=50.0), Global(), FFN)
    with pytest.raises(ConfigError, match="differ in theta"):
        searched_rotation(dataclasses.replace(MODEL, pattern=(MODEL.pattern[1], other)))


def test_buckets_of_one_width_cover_every_position():
    assert position_buckets(10, 4) == [(0, 4), (4, 8), (8, 10)] and position_buckets(8, 4) == [(0, 4), (4, 8)]
    with pytest.raises(ConfigError, match="bucket=0"):
        Perplexity(bucket=0)
