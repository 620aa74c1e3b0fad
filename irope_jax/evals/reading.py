"""Long rows read piece by piece with a KV cache: memory of a piece and of what layers keep, not of a forward pass.

The last layer attends only where something is asked, so a question at the end of a long text costs the text once. What
is found is what a forward pass finds, up to rounding; which of the two is used is `forward.Scorer`'s business.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from irope_jax.core.hosts import to_host
from irope_jax.core.types import PAD_SEGMENT, Batch
from irope_jax.decode.prefill import pieces
from irope_jax.decode.stepping import stepping
from irope_jax.losses import predictions_at, token_losses
from irope_jax.model.cache import CacheSpec, KVCache, fitting_capacity, new_cache
from irope_jax.model.config import ModelConfig
from irope_jax.model.decodable import check_decodable
from irope_jax.model.decoder import cached_hidden_states
from irope_jax.sharding.rules import token_parts


class Reader:
    """Reads batches of one document a row in pieces of `piece` tokens.

    Raises:
      ConfigError: a model whose keys, once kept, would not be those of one forward pass.
    """

    def __init__(self, model: ModelConfig, piece: int):
        check_decodable(model)
        self._model, self._piece = model, piece

    def token_losses(self, params: Any, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """As `Scorer.token_losses`; 0 and False for padding."""
        targets = np.asarray(batch.targets)
        nll_BT, correct_BT = np.zeros(targets.shape, np.float32), np.zeros(targets.shape, bool)
        step, cache = _losses_step(self._model), self._cache(batch)
        for start, tokens, real in self._pieces(batch):
            there = slice(start, start + tokens.shape[1])
            near = np.zeros_like(tokens)
            near[:, : targets[:, there].shape[1]] = targets[:, there]
            cache, nll, correct = step(params, cache, tokens, real, near)
            width = targets[:, there].shape[1]
            nll_BT[:, there] = np.where(real, to_host(nll), 0)[:, :width]
            correct_BT[:, there] = (real & to_host(correct))[:, :width]
        return nll_BT, correct_BT

    def predictions(self, params: Any, batch: Batch, places_BQ: np.ndarray, wanted_BQ: np.ndarray):
        """As `Scorer.predictions`."""
        best_BQ, nll_BQ = np.zeros(places_BQ.shape, np.int64), np.zeros(places_BQ.shape, np.float32)
        read, ask, cache = _read_step(self._model), _ask_step(self._model), self._cache(batch)
        for start, tokens, real in self._pieces(batch):
            here = (places_BQ >= start) & (places_BQ < start + tokens.shape[1])
            if not here.any():
                (cache,) = read(params, cache, tokens, real)
                continue
            near = np.where(here, places_BQ - start, -1)
            cache, best, nll = ask(params, cache, tokens, real, near, wanted_BQ)
            best_BQ, nll_BQ = np.where(here, to_host(best), best_BQ), np.where(here, to_host(nll), nll_BQ)
        return best_BQ, nll_BQ

    def _cache(self, batch: Batch) -> KVCache:
        rows, length = np.shape(batch.tokens)
        compute = self._model.precision.compute
        return new_cache(self._model, CacheSpec(rows, fitting_capacity(length, token_parts()[1]), compute))

    def _pieces(self, batch: Batch) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """`(first place, tokens_BT, real_BT)` of pieces."""
        segments = np.asarray(batch.info.segments)
        lengths = np.sum(segments != PAD_SEGMENT, axis=-1)
        rows = [row[:length] for row, length in zip(np.asarray(batch.tokens), lengths)]
        start = 0
        for tokens, real in pieces(rows, self._piece):
            yield start, tokens, real
            start += tokens.shape[1]


def one_document_a_row(batch: Batch) -> bool:
    """Whether each row is one document from its first place on, as a cache reads it."""
    segments, positions = np.asarray(batch.info.segments), np.asarray(batch.info.positions)
    real, places = segments != PAD_SEGMENT, np.arange(segments.shape[1])
    first = np.all(np.where(real, segments == segments[:, :1], True))
    return bool(first and np.all(np.diff(real.astype(np.int8)) <= 0) and np.all(~real | (positions == places)))


@functools.lru_cache(maxsize=8)
def _read_step(model: ModelConfig) -> Callable:
    def step(params, cache, tokens_BT, real_BT):
        nobody = jnp.zeros(real_BT.shape, bool)
        _, _, cache = cached_hidden_states(model, params, tokens_BT, cache.next_info(real_BT), cache, nobody)
        return (cache,)

    return stepping(step)


@functools.lru_cache(maxsize=8)
def _ask_step(model: ModelConfig) -> Callable:
    def step(params, cache, tokens_BT, real_BT, places_BQ, wanted_BQ):
        asked_BT = jnp.any(places_BQ[:, :, None] == jnp.arange(tokens_BT.shape[1]), axis=1)
        info = cache.next_info(real_BT)
        hidden_BTD, w_DV, cache = cached_hidden_states(model, params, tokens_BT, info, cache, asked_BT)
        return cache, *predictions_at(hidden_BTD, w_DV, jnp.maximum(places_BQ, 0), wanted_BQ)

    return stepping(step)


@functools.lru_cache(maxsize=8)
def _losses_step(model: ModelConfig) -> Callable:
    def step(params, cache, tokens_BT, real_BT, targets_BT):
        hidden_BTD, w_DV, cache = cached_hidden_states(model, params, tokens_BT, cache.next_info(real_BT), cache)
        return cache, *token_losses(hidden_BTD, w_DV, targets_BT, shards=token_parts())

    return stepping(step)
