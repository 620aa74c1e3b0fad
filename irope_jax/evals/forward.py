"""Forward passes that evaluations share: losses of every token, predictions at a few places. Nothing is scored here."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.core.hosts import to_host
from irope_jax.core.types import Batch
from irope_jax.data.documents import Document
from irope_jax.data.packing import batch_of
from irope_jax.evals.reading import Reader, one_document_a_row
from irope_jax.losses import predictions_at, token_losses
from irope_jax.model.config import ModelConfig
from irope_jax.model.decoder import hidden_states
from irope_jax.sharding.feed import global_array
from irope_jax.sharding.rules import batch_sharding, token_parts

log = logging.getLogger(__name__)


def rows_per_batch(batch_tokens: int, length: int) -> int:
    """Rows of `length` that make about `batch_tokens`, a multiple of what the mesh in force cuts a batch into."""
    parts, _ = token_parts()
    return max(1, batch_tokens // (length * parts)) * parts


@functools.lru_cache(maxsize=8)
def _forward(model: ModelConfig) -> Callable:
    """The decoder, jitted: evaluations of one model that agree in shape share what takes long to compile."""
    return jax.jit(lambda params, batch: hidden_states(model, params, batch.tokens, batch.info))


@jax.jit
def _losses(hidden_BTD, w_DV, targets_BT):
    return token_losses(hidden_BTD, w_DV, targets_BT, shards=token_parts())


_predictions = jax.jit(predictions_at)


class Scorer:
    """Forward passes of one model; compiled once per shape, whatever the parameters.

    Of several processes all call the same with the same batch, and all get the whole answer.

    Args:
      model: of the parameters that will come.
      longest: rows of more tokens are read in pieces of so many with a KV cache, if the model can be read so and they
        are one document each: memory is then that of a piece and of what layers keep. None: never.
    """

    def __init__(self, model: ModelConfig, longest: int | None = None):
        self._forward, self._longest, self._reader = _forward(model), longest, None
        if longest is not None:
            try:
                self._reader = Reader(model, longest)
            except ConfigError as error:
                log.debug("rows of any length are one forward pass: %s", error)

    def _by_pieces(self, batch: Batch) -> bool:
        return self._reader is not None and batch.tokens.shape[1] > self._longest and one_document_a_row(batch)

    def token_losses(self, params: Any, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """`(nll_BT, correct_BT)` of every target, in nats."""
        if self._by_pieces(batch):
            return self._reader.token_losses(params, batch)
        batch = on_mesh(batch)
        nll_BT, correct_BT = _losses(*self._forward(params, batch), batch.targets)
        return to_host(nll_BT), to_host(correct_BT)

    def predictions(self, params: Any, batch: Batch, places_BQ: np.ndarray, wanted_BQ: np.ndarray):
        """Most likely next token at `places_BQ`, and the loss in nats of `wanted_BQ` there."""
        if self._by_pieces(batch):
            return self._reader.predictions(params, batch, places_BQ, wanted_BQ)
        best_BQ, nll_BQ = _predictions(*self._forward(params, on_mesh(batch)), places_BQ, wanted_BQ)
        return to_host(best_BQ), to_host(nll_BQ)


def document_losses(
    scorer: Scorer, params: Any, documents: Iterable[Document], length: int, pad_id: int, batch_tokens: int
) -> Iterator[np.ndarray]:
    """Loss in nats of every target of each document, float64 `[n - 1]`, in their order.

    Args:
      scorer, params: the model.
      documents: of at most `length + 1` tokens; each is a row of its own.
      length: what rows are padded to.
      pad_id: token of padding.
      batch_tokens: tokens of one forward pass, about.
    """
    waiting, rows = iter(documents), rows_per_batch(batch_tokens, length)
    while group := list(itertools.islice(waiting, rows)):
        nll_BT, _ = scorer.token_losses(params, batch_of(group, length, pad_id, rows=rows))
        for row, document in enumerate(group):
            yield nll_BT[row, : len(document.tokens) - 1].astype(np.float64)


def on_mesh(batch: Batch) -> Batch:
    """A batch that every process holds whole, laid out on the mesh in force."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.size == 1:
        return batch
    return jax.tree.map(lambda x: global_array(np.asarray(x), batch_sharding(mesh)), batch)
