"""What a synthetic sample is, what every task must offer, and how events are let into a haystack.

The tasks themselves are `synthetic`; the filler is `haystacks`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.data.documents import Document
from irope_jax.data.tokenizer import TokenizerSpec


@dataclass(frozen=True)
class Sample:
    """One generated sequence.

    Attributes:
      tokens: int32 `[n]`, bos first.
      weights: float32 `[n]`, loss weight of predicting each token; entry 0 is 0.
      answers: bool `[n]`, tokens that are answers.
      meta: per question (arrays of one length): `answer_start`, `answer_end`, `fact_start`, `fact_end` (token indices,
        ends included) and `depth` (0 = the fact stands first, 1 = last in the filler); plus scalars of the task. A fact
        straddles a border of chunks of size c when `fact_start // c != fact_end // c`.
    """

    tokens: np.ndarray
    weights: np.ndarray
    answers: np.ndarray
    meta: dict[str, Any]

    @property
    def document(self) -> Document:
        return Document(self.tokens, self.weights)


@dataclass(frozen=True)
class Task:
    """What every task of `synthetic` shares; not a task itself."""

    def sample(self, rng: np.random.Generator, length: int, tokenizer: TokenizerSpec, **overrides) -> Sample:
        """A sequence of exactly `length` tokens.

        Raises:
          ConfigError: the tokenizer has too few symbols, or the task does not fit into `length`.
        """
        task = dataclasses.replace(self, **overrides) if overrides else self
        task.check(tokenizer, length)
        return task._sample(rng, length, tokenizer)

    @property
    def symbols_needed(self) -> int:
        raise NotImplementedError

    @property
    def shortest(self) -> int:
        """Fewest tokens a sample of this task always fits into."""
        raise NotImplementedError

    def at_end(self, facts: int) -> Task:
        """This task with that many facts (strings, chains, lists), all of them asked for at the end of the sample.

        Raises:
          ConfigError: it cannot have as many, or always asks before the end.
        """
        raise ConfigError("kind", self.kind, "this task asks all along its sample; choose another for an evaluation")

    def placed(self, depths: tuple[float, ...]) -> dict[str, Any]:
        """Overrides of `sample` that put the facts at these depths, as far as the task can say where they stand."""
        return {}

    def check(self, tokenizer: TokenizerSpec, length: int) -> None:
        """Raises `ConfigError` if samples of `length` tokens cannot be made with this tokenizer."""
        if tokenizer.num_symbols < self.symbols_needed:
            fix = f"the task {self.kind!r} needs {self.symbols_needed} symbols; set it to at least that"
            raise ConfigError("tokenizer.num_symbols", tokenizer.num_symbols, fix)
        haystack = getattr(self, "haystack", None)
        if haystack is not None:
            haystack.check(tokenizer)
        if length < self.shortest:
            raise ConfigError("length", length, f"the task {self.kind!r} as set needs at least {self.shortest} tokens")

    def check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")

    def check_ranges(self, *names: str) -> None:
        for name in names:
            low_high = getattr(self, name)
            if len(low_high) != 2 or not 1 <= low_high[0] <= low_high[1]:
                raise ConfigError(name, low_high, "give (least, most) with 1 <= least <= most")

    def check_weights(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must not be negative")


def draw_between(rng: np.random.Generator, low_high: tuple[int, int]) -> int:
    return int(rng.integers(low_high[0], low_high[1] + 1))


def draw_distinct(rng: np.random.Generator, base: int, digits: int, count: int) -> np.ndarray:
    """int `[count, digits]`: different digit strings, every set equally likely."""
    total = base**digits
    if total <= 4 * count or total < 1 << 12:
        codes = rng.permutation(total)[:count].tolist()
    else:
        seen: dict[int, None] = {}  # keeps order; few collisions since at most a quarter of all codes is drawn
        while len(seen) < count:
            code = 0
            for digit in rng.integers(base, size=digits).tolist():
                code = code * base + digit
            seen[code] = None
        codes = list(seen)
    return np.array([[code // base**place % base for place in range(digits)] for code in codes], np.int64)


def scatter(
    filler: np.ndarray, events: np.ndarray, at: np.ndarray, bos_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bos, then the filler with events let in.

    Args:
      filler: int32 `[f]`.
      events: int32 `[e, w]`, all of one width.
      at: float `[e]` in 0 … 1, how much of the filler stands before each event; equal ones keep their order.

    Returns:
      tokens int32 `[1 + f + e * w]`; first token index of each event `[e]`; filler tokens before each event `[e]`.
    """
    count, width = events.shape
    order = np.argsort(at, kind="stable")
    gaps = np.minimum((at * (len(filler) + 1)).astype(np.int64), len(filler))
    starts = np.empty(count, np.int64)
    starts[order] = 1 + gaps[order] + width * np.arange(count)
    tokens = np.empty(1 + len(filler) + events.size, np.int32)
    is_filler = np.ones(len(tokens), bool)
    places = starts[:, None] + np.arange(width)
    is_filler[places] = False
    is_filler[0] = False
    tokens[is_filler] = filler
    tokens[places] = events
    tokens[0] = bos_id
    return tokens, starts, gaps
