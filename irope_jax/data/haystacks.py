"""What synthetic facts are hidden in: windows of real text, or Markov noise of known entropy.

A haystack gives exactly as many tokens as asked for and knows nothing of facts; scattering them is `synthetic`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.data.documents import tokenized
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.tokenizer import TokenizerSpec


@dataclass(frozen=True)
class TextHaystack:
    """A window of real text: a document drawn by its length, every window of it equally likely.

    When more tokens are needed than a document holds, several follow each other, whole but for the last.
    """

    source: SourceSpec = field(default_factory=Corpus)
    kind: ClassVar[str] = "text"

    def check(self, tokenizer: TokenizerSpec) -> None:
        """Nothing to check: every tokenizer encodes text."""

    def fill(self, rng: np.random.Generator, count: int, tokenizer: TokenizerSpec) -> np.ndarray:
        """int32 `[count]` tokens of text, without bos and eos."""
        store = tokenized(self.source, tokenizer)
        firsts, ends = store.starts[:-1] + 1, store.starts[1:] - 1
        parts, missing = [], count
        while missing > 0:
            place = int(rng.integers(len(store.flat)))
            document = int(np.searchsorted(store.starts, place, side="right")) - 1
            first, end = int(firsts[document]), int(ends[document])
            begin = first + int(rng.integers(max(0, end - first - missing) + 1))
            part = store.flat[begin : min(end, begin + missing)]
            parts.append(part)
            missing -= len(part)
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)


@dataclass(frozen=True)
class MarkovHaystack:
    """Order-2 Markov noise: four successors, chosen by the last token and the parity of the one before it.

    The parity makes local order matter: a model that sees only the last token cannot reach the entropy.

    Attributes:
      states: how many tokens occur.
      first_id: id of the first of them; the others follow. 65 is the byte `A`.
      probabilities: of the successors, most likely first.
      table_seed: which successors; part of the task, not of a sample.
    """

    states: int = 32
    first_id: int = 65
    probabilities: tuple[float, ...] = (0.55, 0.25, 0.15, 0.05)
    table_seed: int = 0
    kind: ClassVar[str] = "markov"

    def __post_init__(self):
        if self.first_id < 0:
            raise ConfigError("first_id", self.first_id, "must be 0 or more")
        if not 0.999999 < sum(self.probabilities) < 1.000001 or min(self.probabilities) <= 0:
            raise ConfigError("probabilities", self.probabilities, "must be positive and sum to 1")
        if self.states < max(2, len(self.probabilities)):
            raise ConfigError("states", self.states, f"must be at least {max(2, len(self.probabilities))}")

    @property
    def entropy(self) -> float:
        """Nats per token that no model can predict better than; successors are distinct, so it is exact."""
        return -sum(p * math.log(p) for p in self.probabilities)

    def check(self, tokenizer: TokenizerSpec) -> None:
        if self.first_id + self.states > tokenizer.text_vocab_size:
            limit = tokenizer.text_vocab_size - self.states
            raise ConfigError("first_id", self.first_id, f"must be at most {limit} to stay among the text tokens")

    @functools.cached_property
    def successors(self) -> np.ndarray:
        """int64 `[2, states, choices]`: next state, by parity of the state before the last and by the last state."""
        rng = np.random.default_rng([self.table_seed, self.states])
        order = rng.permuted(np.tile(np.arange(self.states), (2 * self.states, 1)), axis=1)
        return order[:, : len(self.probabilities)].reshape(2, self.states, len(self.probabilities))

    @functools.cached_property
    def _next(self) -> list[int]:
        """Row `2 * last + parity` of the table, flat and already scaled: the walk below is one add and one look-up."""
        choices, table = len(self.probabilities), []
        for last in range(self.states):
            for parity in range(2):
                table += [(2 * int(s) + last % 2) * choices for s in self.successors[parity, last]]
        return table

    def fill(self, rng: np.random.Generator, count: int, tokenizer: TokenizerSpec) -> np.ndarray:
        """int32 `[count]` tokens of one walk from a random start."""
        choices = len(self.probabilities)
        picks = np.searchsorted(np.cumsum(self.probabilities)[:-1], rng.random(count), side="right").tolist()
        place, table, walk = int(rng.integers(2 * self.states)) * choices, self._next, []
        for pick in picks:
            place = table[place + pick]
            walk.append(place)
        return (np.array(walk, np.int32) // (2 * choices) + self.first_id).astype(np.int32)


HaystackSpec = TextHaystack | MarkovHaystack
