"""What a question about a long text is, and how the text is grown until it fills the length asked for.

A task builds its text out of *units* (words, sentences, lines, documents); `fill` finds how many. The tasks are the
other files of this room, their union is `registry`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.data.tokenizer import TokenizerSpec

Metric = Literal["all", "any", "labels", "after_mark", "exact_start", "first_number", "word_recall"]
"""How an answer is judged (`evals.answer_metrics`): the share of the answers said; whether one of them is said; whether
the first sentence says the answer and no other label; how much of a text is repeated after the mark it must begin with;
whether it begins with the answer; whether its first number is the answer; the share of the answer's words in it."""


@dataclass(frozen=True)
class TextSample:
    """A question about a long text.

    Attributes:
      prompt: the text and the question, up to where the answer begins; without bos.
      answers: what the answer should say.
      labels: what else it could say (metric `labels`); their own words in the question do not count.
      question: the part of the prompt that asks, where the metric needs it.
      mark: what the answer must begin with (metric `after_mark`).
    """

    prompt: str
    answers: tuple[str, ...]
    labels: tuple[str, ...] = ()
    question: str = ""
    mark: str = ""


class TextTask:
    """What the evaluation asks of a task; not a task itself.

    Attributes:
      name: label in the records.
      new_tokens: room kept for the answer, part of the length as in RULER, in tokens of about four letters; see `room`.
      metric: how its answers are judged.
      has_depth: whether `depth` says where the fact asked for stands; else it must be None.
    """

    name: str
    new_tokens: int
    metric: Metric
    has_depth: ClassVar[bool] = False

    def sample(
        self, rng: np.random.Generator, length: int, tokenizer: TokenizerSpec, depth: float | None = None
    ) -> TextSample:
        """A question whose bos, prompt and room for the answer fill `length` tokens as far as whole units can.

        Args:
          rng: decides everything but the length of the text.
          length: tokens of the whole context, the answer included.
          tokenizer: counts.
          depth: where the fact asked for stands, 0 (first) to 1 (last); None is anywhere.

        Raises:
          ConfigError: the length is too short for the question alone, or longer than the material reaches.
        """
        if depth is not None and not self.has_depth:
            raise ConfigError("depth", depth, f"the task {self.name!r} has no single place; use None")
        seed, room = int(rng.integers(2**62)), self.room(tokenizer)
        made = lambda units: self.make(np.random.default_rng(seed), units, length, depth, tokenizer)
        tokens = lambda units: 1 + len(tokenizer.encode(made(units).prompt)) + room
        return made(fill(tokens, length, self.fewest(length), self.most(length)))

    def room(self, tokenizer: TokenizerSpec) -> int:
        """`new_tokens` in tokens of this tokenizer: as many times more as its tokens are shorter, rounded."""
        return self.new_tokens * _shortness(tokenizer)

    def fewest(self, length: int) -> int:
        """Units below which there is no question."""
        return 1

    def most(self, length: int) -> int | None:
        """Units there are; None is any number."""
        return None

    def make(
        self, rng: np.random.Generator, units: int, length: int, depth: float | None, tokenizer: TokenizerSpec
    ) -> TextSample:
        """The question with that many units of text. The same `rng` gives the same question in more or less text."""
        raise NotImplementedError


@functools.lru_cache(maxsize=8)
def _shortness(tokenizer: TokenizerSpec) -> int:
    """4 for bytes, 1 for the usual vocabularies."""
    typical = "The special numbers for quiet-harbour mentioned in the text are 4938888 and 5613196."
    return max(1, round(4 * len(tokenizer.encode(typical)) / len(typical)))


def fill(tokens: Callable[[int], int], length: int, fewest: int, most: int | None = None) -> int:
    """The number of units that fit: `tokens(units) <= length`, and one more does not.

    `tokens` is nearly linear, so a search by interpolation needs a handful of calls.

    Raises:
      ConfigError: `fewest` do not fit, or `most` leave room.
    """
    low, at_low = fewest, tokens(fewest)
    if at_low > length:
        raise ConfigError("length", length, f"the question with its shortest text takes {at_low} tokens; use more")
    step, high, at_high = 16, None, 0
    while high is None:
        if low == most:
            fix = f"there is material for {at_low} tokens; use a shorter length or a larger source"
            raise ConfigError("length", length, fix)
        probe = low + step if most is None else min(most, low + step)
        count = tokens(probe)
        if count > length:
            high, at_high = probe, count
        else:
            rate = max((count - at_low) / (probe - low), 1e-6)
            step = int(min((length - count) / rate + 1, 16 * (probe - fewest) + 16))
            low, at_low = probe, count
    tries = 0
    while high - low > 1:
        tries += 1
        guess = low + round((length - at_low) * (high - low) / (at_high - at_low))
        middle = (low + high) // 2 if tries % 4 == 0 else guess
        middle = min(max(middle, low + 1), high - 1)
        count = tokens(middle)
        if count > length:
            high, at_high = middle, count
        else:
            low, at_low = middle, count
    return low
