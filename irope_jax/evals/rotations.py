"""How well a frozen model predicts when its rotations turn by other frequencies: the score of a search for them.

Frequencies are arguments of one compiled call, so a candidate costs a forward pass and no compilation. The search is
`position.longrope_search`; the gradient arm, which trains the factors, is here because it needs the model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from irope_jax.attention.mask import Global
from irope_jax.core.config import ConfigError
from irope_jax.core.hosts import to_host
from irope_jax.core.types import Batch
from irope_jax.data.documents import tokenized
from irope_jax.data.packing import batch_of
from irope_jax.data.pipeline import eval_text
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.text_needle import text_needle
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.evals.forward import on_mesh, rows_per_batch
from irope_jax.losses import chunked_cross_entropy
from irope_jax.model.config import LayerSpec, ModelConfig
from irope_jax.model.decoder import PeriodTurns, hidden_states
from irope_jax.position.rope import Turns, fixed_point
from irope_jax.position.rotary import RoPE
from irope_jax.position.scaling import LongRoPE, RopeScaling, Unscaled
from irope_jax.sharding.rules import token_parts


@dataclass(frozen=True)
class TextLoss:
    """Mean loss of the tokens of long documents (LongRoPE).

    Attributes:
      source: text that is not what the result is judged on.
      documents: windows of the target length to score.
      first_position: tokens at earlier positions are read and not scored; the trained length here judges the extension
        alone.
    """

    source: SourceSpec = Corpus("validation")
    documents: int = 4
    first_position: int = 0
    kind: ClassVar[str] = "text"

    def __post_init__(self):
        if self.documents < 1:
            raise ConfigError("documents", self.documents, "windows to score; use 1 or more")
        if self.first_position < 0:
            raise ConfigError("first_position", self.first_position, "use 0 or more")

    def batches(self, tokenizer: TokenizerSpec, length: int, rows: int) -> Iterator[Batch]:
        if self.first_position >= length:
            fix = f"nothing is left of {length} positions; use less"
            raise ConfigError("objective.first_position", self.first_position, fix)
        try:
            found = list(eval_text(self.source, tokenizer, length, self.documents, batch_size=rows))
        except ConfigError as error:
            if error.field != "count":
                raise
            raise ConfigError("objective.documents", self.documents, error.fix) from None
        for batch in found:
            yield batch.replace(weights=batch.weights * (batch.info.positions >= self.first_position))


@dataclass(frozen=True)
class NeedleLoss:
    """Loss of the answer to a question about the start of the document, and of nothing else (LongRoPE2).

    Attributes:
      source: text of the haystack.
      documents: questions, each in a haystack of its own.
      seed: of keys, values and haystacks.
    """

    source: SourceSpec = Corpus("validation")
    documents: int = 8
    seed: int = 0
    kind: ClassVar[str] = "needle"

    def __post_init__(self):
        if self.documents < 1:
            raise ConfigError("documents", self.documents, "questions to ask; use 1 or more")

    def batches(self, tokenizer: TokenizerSpec, length: int, rows: int) -> Iterator[Batch]:
        store, rng = tokenized(self.source, tokenizer), np.random.default_rng(self.seed)
        long_enough = [d for d in range(len(store)) if store.targets[d] > length]
        if not long_enough:
            raise ConfigError("length", length, "no document of objective.source is that long; use a shorter length")
        documents = []
        for _ in range(self.documents):
            text = store[long_enough[rng.integers(len(long_enough))]]
            begin = int(rng.integers(1, len(text) - length + 1))
            documents.append(text_needle(rng, text[begin : begin + length], length + 1, tokenizer))
        for first in range(0, len(documents), rows):
            yield batch_of(documents[first : first + rows], length, tokenizer.pad_id, rows=rows)


ObjectiveSpec = TextLoss | NeedleLoss


def is_searched(layer: LayerSpec) -> bool:
    """Whether a layer is what scalings are for: it rotates, and sees farther than a chunk or window."""
    return isinstance(layer.position, RoPE) and isinstance(layer.mask, Global)


def with_scaling(model: ModelConfig, scaling: RopeScaling) -> ModelConfig:
    """The model with the scaling of every layer that `is_searched` replaced.

    Raises:
      ConfigError: there is no such layer.
    """
    changed = lambda layer: replace(layer, position=replace(layer.position, scaling=scaling))
    pattern = tuple(changed(layer) if is_searched(layer) else layer for layer in model.pattern)
    if not any(map(is_searched, model.pattern)):
        fix = "no layer rotates over a global mask; local layers never leave the distances they were trained on"
        raise ConfigError("model.pattern", ConfigError.ABSENT, fix)
    return replace(model, pattern=pattern)


def searched_rotation(model: ModelConfig) -> RoPE:
    """The rotation that factors are searched for, unscaled.

    Raises:
      ConfigError: searched layers differ in how they rotate, so no factors could be shared.
    """
    model = with_scaling(model, Unscaled())
    found = {layer.position for layer in model.pattern if is_searched(layer)}
    if len(found) > 1:
        fix = "layers that rotate over a global mask differ in theta or pairing; one set of factors cannot serve both"
        raise ConfigError("model.pattern", ConfigError.ABSENT, fix)
    return found.pop()


class RotationScorer:
    """Scores sets of factors for one model; compiled once.

    Args:
      model: the model whose parameters are scored; its own scaling of the layers concerned plays no part.
      tokenizer: of the text.
      objective: what is predicted.
      length: tokens of a document, the target of the extension.
      magnitude: attention factor on queries and keys that goes with the factors.
      batch_tokens: tokens of one forward pass.
      at_once: candidates of one compiled call.

    Attributes:
      documents: batches that are scored.
    """

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: TokenizerSpec,
        objective: ObjectiveSpec,
        length: int,
        *,
        magnitude: float = 1.0,
        batch_tokens: int,
        at_once: int,
    ):
        self.rotation = searched_rotation(model)
        self.theta_P = self.rotation.frequencies(model.head_dim).inv_freq
        ones = (1.0,) * len(self.theta_P)
        self.model = with_scaling(model, LongRoPE(2, 1.0, ones, attention_factor=magnitude))
        self.documents = list(objective.batches(tokenizer, length, rows_per_batch(batch_tokens, length)))
        self.at_once = at_once
        self._searched = [is_searched(layer) for layer in self.model.period]
        self._sums = jax.jit(self._sums_of)

    def turns(self, factors: Sequence[float], first_tokens: int) -> Turns:
        """Frequencies of a candidate, exact to float64."""
        inv_freq = self.theta_P / np.asarray(factors, np.float64)
        first = np.asarray(first_tokens, np.int32)
        return Turns(fixed_point(inv_freq)[None], first_units=fixed_point(self.theta_P), first_tokens=first)

    def _per_layer(self, turns: Turns) -> PeriodTurns:
        return tuple(turns if searched else None for searched in self._searched)

    def _loss_sums(self, params: Any, turns: Turns, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden_BTD, w_DV = hidden_states(self.model, params, batch.tokens, batch.info, self._per_layer(turns))
        sums = chunked_cross_entropy(hidden_BTD, w_DV, batch.targets, batch.weights, shards=token_parts())
        return sums.loss_sum, sums.weight_sum

    def _sums_of(self, params: Any, stacked: Turns, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return jax.lax.map(lambda turns: self._loss_sums(params, turns, batch), stacked)

    def score(self, params: Any, candidates: Sequence[tuple[Sequence[float], int]]) -> list[float]:
        """Mean loss in nats of `(factors, first_tokens)` pairs, at most `at_once` of them."""
        if not 1 <= len(candidates) <= self.at_once:
            raise ValueError(f"{len(candidates)} candidates; one call takes 1 to {self.at_once}")
        filled = [*candidates, *[candidates[-1]] * (self.at_once - len(candidates))]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(self.turns(*candidate) for candidate in filled))
        loss_C, weight = np.zeros(self.at_once), 0.0
        for batch in self.documents:
            sums_C, weights_C = self._sums(params, stacked, on_mesh(batch))
            loss_C += to_host(sums_C).astype(np.float64)
            weight += float(to_host(weights_C)[0])
        return [float(loss) for loss in loss_C[: len(candidates)] / weight]


@dataclass(frozen=True)
class Gradient:
    """Factors as parameters that Adam trains on the frozen model: the arm a search is compared with.

    Attributes:
      steps: updates; each sees all documents.
      learning_rate: of the logarithms of the factors.
    """

    steps: int = 30
    learning_rate: float = 0.02
    kind: ClassVar[str] = "gradient"

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError("steps", self.steps, "updates of the factors; use 1 or more")
        if self.learning_rate <= 0:
            raise ConfigError("learning_rate", self.learning_rate, "must be positive")


def train_factors(
    scorer: RotationScorer, params: Any, spec: Gradient, start: Sequence[float], highest: float
) -> Iterator[tuple[list[float], float]]:
    """Factors and their mean loss after 0, 1 … `spec.steps` updates.

    Factors stay in [1, highest] and do not fall with the pair's number: they are the running maximum of free ones.
    """
    theta_P = jnp.asarray(scorer.theta_P, jnp.float32)
    bounded = lambda x_P: jnp.clip(jax.lax.cummax(jnp.exp(x_P)), 1.0, highest)
    optimizer = optax.adam(spec.learning_rate)

    @jax.jit
    def gradient(x_P, params, batch):
        loss = lambda x_P: scorer._loss_sums(params, Turns.learned(theta_P / bounded(x_P)), batch)
        (loss_sum, weight), slope_P = jax.value_and_grad(loss, has_aux=True)(x_P)
        return loss_sum, weight, slope_P

    x_P = jnp.log(jnp.asarray(start, jnp.float32))
    state = optimizer.init(x_P)
    for step in range(spec.steps + 1):
        found = [gradient(x_P, params, on_mesh(batch)) for batch in scorer.documents]
        loss, weight, slope_P = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), found)
        yield [float(factor) for factor in bounded(x_P)], float(loss / weight)
        if step < spec.steps:
            updates, state = optimizer.update(slope_P / weight, state)
            x_P = optax.apply_updates(x_P, updates)
