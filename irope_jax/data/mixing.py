"""Which document comes next: the order of each ingredient, epoch by epoch, and the shares of the ingredients.

Documents are named here, not loaded together: rows are `packing`, batches and resuming are `pipeline`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.data.config import DataConfig, Ingredient, LengthBuckets
from irope_jax.data.documents import Document, Pieces, Windows, tokenized
from irope_jax.data.haystacks import TextHaystack
from irope_jax.data.packing import BestFit

Ref = tuple[int, int, int]
"""`(ingredient, epoch, index)`: names a document of the stream."""

_ORDER, _CUTS, _LENGTHS, _CONTENT, POSITIONS, _TIMES = range(6)
"""Last words of the seeds of random streams, so that no two streams of an ingredient are the same."""


class TextDocuments:
    """Pieces of a source's documents."""

    def __init__(self, config: DataConfig, place: int):
        ingredient = config.mixture[place]
        self.store = tokenized(ingredient.source, config.tokenizer)
        cut = Pieces if isinstance(config.packing, BestFit) else Windows
        self.pieces = cut(self.store.targets, config.seq_len, (config.seed, place, _CUTS))
        self.fingerprint = self.store.fingerprint
        self._times = None
        if ingredient.by_length is not None:
            lengths, key = self.store.targets + 1, (config.seed, place, _TIMES)
            try:
                self._times = Times(lengths, ingredient.by_length, key)
            except ConfigError as error:
                raise error.within(f"mixture.{place}.by_length") from None
        self._key = (config.seed, place, _ORDER)
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def after(self, epoch: int, drawn: int) -> tuple[int, int]:
        """`(epoch, index)` of the piece that follows `drawn` others of an epoch; the epoch may be a later one.

        Each epoch has an order of its own.
        """
        while drawn >= len(self._order(epoch)):
            epoch, drawn = epoch + 1, 0
        return epoch, int(self._order(epoch)[drawn])

    def _draw_order(self, epoch: int) -> np.ndarray:
        # not grain's shuffle: a look-up in it takes milliseconds when there are only a few pieces
        rng = np.random.default_rng([*self._key, epoch])
        if self._times is None:
            return rng.permutation(len(self.pieces))
        return rng.permutation(
            np.repeat(np.arange(len(self.pieces)), np.repeat(self._times(epoch), self.pieces.counts))
        )

    def length(self, epoch: int, index: int) -> int:
        return self.pieces.span(epoch, index)[2]

    def start(self, epoch: int, index: int) -> Callable[[], Document]:
        """Begin to load a piece; what is returned waits for it and gives it."""
        document, first, targets = self.pieces.span(epoch, index)
        begin = int(self.store.starts[document]) + first
        reading = self.store.start(begin, begin + targets + 1)
        return lambda: Document(reading(), np.ones(targets + 1, np.float32))


class Times:
    """How many times each document comes in an epoch.

    Over any number of epochs in a row, a document of weight w comes w times an epoch, rounded up or down; of a bucket
    of n documents each epoch shows w n, rounded up or down. Where w is no whole number, chance decides in which epochs
    a document comes.

    Args:
      lengths: int `[D]`, tokens.
      buckets: weights by length.
      key: integers that seed the chance.
    """

    def __init__(self, lengths: np.ndarray, buckets: LengthBuckets, key: tuple[int, ...]):
        bucket = np.searchsorted(buckets.edges, lengths, side="right")
        self._weights = np.asarray(buckets.weights, np.float64)[bucket]
        if not self._weights.any():
            fix = "no document falls into a bucket with a weight; documents have "
            raise ConfigError("weights", buckets.weights, f"{fix}{lengths.min()} to {lengths.max()} tokens")
        self._phases = np.empty(len(lengths))
        rng = np.random.default_rng(key)
        for b in range(len(buckets.weights)):
            members = np.flatnonzero(bucket == b)
            self._phases[members] = (rng.permutation(len(members)) + 0.5) / max(1, len(members))

    def __call__(self, epoch: int) -> np.ndarray:
        """int64 `[D]`."""
        until = [np.floor(count * self._weights + self._phases) for count in (epoch, epoch + 1)]
        return (until[1] - until[0]).astype(np.int64)


class Samples:
    """Samples of a task; index i is always the same sample."""

    def __init__(self, config: DataConfig, place: int):
        ingredient: Ingredient = config.mixture[place]
        self.task, self.tokenizer = ingredient.source, config.tokenizer
        self.low, self.high = ingredient.sample_lengths(config.seq_len)
        self.key = (config.seed, place)
        haystack = getattr(self.task, "haystack", None)
        reads = isinstance(haystack, TextHaystack)
        self.fingerprint = tokenized(haystack.source, config.tokenizer).fingerprint if reads else ""

    def after(self, epoch: int, drawn: int) -> tuple[int, int]:
        """`(0, drawn)`: samples never repeat."""
        return epoch, drawn

    def length(self, epoch: int, index: int) -> int:
        if self.low == self.high:
            return self.low - 1
        return int(np.random.default_rng([*self.key, _LENGTHS, index]).integers(self.low, self.high + 1)) - 1

    def start(self, epoch: int, index: int) -> Callable[[], Document]:
        """What makes a sample."""
        rng, length = np.random.default_rng([*self.key, _CONTENT, index]), self.length(epoch, index) + 1
        return lambda: self.task.sample(rng, length, self.tokenizer).document


class Mixer:
    """Draws from the ingredients so that their predicted tokens are as their weights.

    The next document comes from the ingredient that is furthest behind; what counts is what was drawn since the weights
    changed last. So each share is exact but for one document, whatever the lengths are.
    """

    def __init__(self, documents: Sequence[TextDocuments | Samples]):
        self._documents = documents
        self._drawn = [[0, 0] for _ in documents]  # (epoch, documents drawn in it)
        self._served = [0] * len(documents)
        self._weights: tuple[float, ...] | None = None

    def set_weights(self, weights: tuple[float, ...]) -> None:
        """Weights from here on; the same ones again change nothing."""
        if self._weights is not None and list(weights) != list(self._weights):
            self._served = [0] * len(weights)
        self._weights = weights

    def draw(self) -> tuple[Ref, int]:
        """The next document and how many tokens it predicts."""
        place = min(
            (place for place, weight in enumerate(self._weights) if weight),
            key=lambda place: self._served[place] / self._weights[place],
        )
        before, drawn = self._drawn[place]
        epoch, index = self._documents[place].after(before, drawn)
        self._drawn[place] = [epoch, drawn + 1 if epoch == before else 1]
        length = self._documents[place].length(epoch, index)
        self._served[place] += length
        return (place, epoch, index), length

    def get_state(self) -> dict[str, Any]:
        return {
            "drawn": [list(drawn) for drawn in self._drawn],
            "served": list(self._served),
            "weights": self._weights and list(self._weights),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._drawn = [[int(number) for number in drawn] for drawn in state["drawn"]]
        self._served = [int(tokens) for tokens in state["served"]]
        self._weights = state["weights"] and tuple(state["weights"])
