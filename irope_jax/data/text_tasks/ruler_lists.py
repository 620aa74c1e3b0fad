"""RULER's tracing and counting tasks (arXiv 2404.06654), worded as lm-evaluation-harness 0.4.13 words them.

Variable tracking, common words, frequent (coded) words. The harness writes `assgined` in the variable question and
gives the common-words question no worked example; both are kept, so that scores compare. Words come from a source of
ours.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.text_tasks.ruler_needles import NOISE
from irope_jax.data.text_tasks.sample import Metric, TextSample, TextTask, fill
from irope_jax.data.text_tasks.words import distinct, letters, vocabulary, word_pair
from irope_jax.data.tokenizer import TokenizerSpec

TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {count} variables are assgined the value {value}, they are:"
)
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?\n\n"
    "Answer: The top 10 words that appear most often in the list are:"
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)
EXAMPLE_TOKENS = 500
"""The worked example before variable tracking fits these with its answer of 30 tokens, or is as short as it can."""


def assignments(chains: Sequence[Sequence[str]], values: Sequence[str]) -> list[list[str]]:
    """Per chain of variables its statements; a space ends each but the first, as the harness has it."""
    return [
        [f"VAR {names[0]} = {value}", *(f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names))]
        for names, value in zip(chains, values, strict=True)
    ]


def tracking_text(noises: int, statements: Sequence[Sequence[str]], places: Sequence[Sequence[int]]) -> str:
    """Noise lines with each chain let in, one chain after the other.

    Args:
      noises: lines of noise.
      statements: of each chain.
      places: per chain, sorted: statement j goes before line `place` of what was there before this chain.
    """
    lines = [NOISE + "\n"] * noises
    for chain, at in zip(statements, places, strict=True):
        for j, (statement, place) in enumerate(zip(chain, at, strict=True)):
            lines.insert(place + j, statement)
    return " ".join(lines).replace(". \n", ".\n")


def tracking_prompt(example: tuple[str, str, Sequence[str]], context: str, value: str, count: int) -> str:
    """`example` is text, value and variables of the worked example, whose answer stands after two spaces."""
    text, its_value, names = example
    shown = TRACKING.format(context=text, value=its_value, count=len(names)) + "  " + " ".join(names)
    return shown + "\n\n\n\n" + TRACKING.format(context=context, value=value, count=count)


def numbered(words: Sequence[str]) -> str:
    """`1. word 2. word …`"""
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def frequent_counts(words: int, vocabulary_size: int) -> np.ndarray:
    """How often the word of each rank is written: `words × rank^-2 / ζ(2)`, rounded down."""
    return (words * np.arange(1, vocabulary_size + 1) ** -2.0 / (np.pi**2 / 6)).astype(int)


@dataclass(frozen=True)
class VariableTask(TextTask):
    """Which variables hold a value, over chains of `VAR X = VAR Y` in repeated noise, after a worked example.

    Attributes:
      name: label.
      chains: chains of assignments; the value of the first is asked for.
      hops: assignments after the first of each chain.
    """

    name: str = "ruler_vt"
    chains: int = 1
    hops: int = 4

    new_tokens: ClassVar[int] = 30
    metric: ClassVar[Metric] = "all"

    def __post_init__(self):
        if self.chains < 1 or self.hops < 1:
            raise ConfigError("hops", self.hops, "give at least one chain of at least one hop")

    def fewest(self, length: int) -> int:
        return self.hops + 2

    def make(
        self, rng: np.random.Generator, units: int, length: int, depth: float | None, tokenizer: TokenizerSpec
    ) -> TextSample:
        example = self._example(rng, tokenizer)
        chains, values, statements = self._drawn(rng, 5)
        # Places are drawn as shares, so that more noise moves them apart and changes nothing else.
        shares = np.sort(rng.random((self.chains, self.hops + 1)), axis=1)
        sizes = units + (self.hops + 1) * np.arange(self.chains)
        places = [spread(share, size) for share, size in zip(shares, sizes)]
        context = tracking_text(units, statements, places)
        return TextSample(tracking_prompt(example, context, values[0], self.hops + 1), tuple(chains[0]))

    def _drawn(self, rng: np.random.Generator, width: int):
        names = distinct(rng, lambda r: letters(r, width), self.chains * (self.hops + 1))
        chains = [names[i * (self.hops + 1) :][: self.hops + 1] for i in range(self.chains)]
        values = distinct(rng, lambda r: str(r.integers(10000, 99999)), self.chains)
        return chains, values, assignments(chains, values)

    def _example(self, rng: np.random.Generator, tokenizer: TokenizerSpec) -> tuple[str, str, list[str]]:
        chains, values, statements = self._drawn(rng, 3)
        share = np.sort(rng.random((self.chains, self.hops + 1)), axis=1)

        def text(noises: int) -> str:
            sizes = noises + (self.hops + 1) * np.arange(self.chains)
            return tracking_text(noises, statements, [spread(s, size) for s, size in zip(share, sizes)])

        def tokens(noises: int) -> int:
            prompt = TRACKING.format(context=text(noises), value=values[0], count=self.hops + 1)
            return len(tokenizer.encode(prompt)) + self.room(tokenizer)

        fewest = self.fewest(0)
        noises = fewest if tokens(fewest) > EXAMPLE_TOKENS else fill(tokens, EXAMPLE_TOKENS, fewest)
        return text(noises), values[0], chains[0]


def spread(shares: np.ndarray, size: int) -> list[int]:
    """Sorted shares of 0 to 1 as different places below `size`."""
    places = (shares * (size - len(shares) + 1)).astype(int) + np.arange(len(shares))
    return places.tolist()


@dataclass(frozen=True)
class CommonWordsTask(TextTask):
    """The ten words of a numbered list that stand in it 30 times, where the others stand 3 times.

    Below 4,096 tokens it is 6 times and once, also where the tokenizer's tokens are so short (bytes) that ten words 30
    times and thirty words 3 times do not fit.

    Attributes:
      name: label.
      source: where words are taken from; compounds such as `quiet-harbour` follow when they are used up.
    """

    name: str = "ruler_cwe"
    source: SourceSpec = Corpus("train")

    new_tokens: ClassVar[int] = 120
    metric: ClassVar[Metric] = "all"
    common: ClassVar[int] = 10

    def fewest(self, length: int) -> int:
        return self.common + 1

    def make(
        self, rng: np.random.Generator, units: int, length: int, depth: float | None, tokenizer: TokenizerSpec
    ) -> TextSample:
        known = vocabulary(self.source)
        words = [known[i] for i in rng.permutation(len(known))[:units]]
        words += distinct(rng, word_pair, units - len(words), set(words))
        often, seldom = (30, 3) if length >= 4096 and self._is_roomy(length, tokenizer) else (6, 1)
        listed = words[: self.common] * often + words[self.common :] * seldom
        context = numbered([listed[i] for i in rng.permutation(len(listed))])
        return TextSample(COMMON.format(context=context), tuple(words[: self.common]))

    def _is_roomy(self, length: int, tokenizer: TokenizerSpec) -> bool:
        known, places = vocabulary(self.source), np.linspace(0, 0.999, 30 * self.common + 3 * 30)
        typical = numbered([known[int(place * len(known))] for place in places])
        return len(tokenizer.encode(COMMON.format(context=typical))) + self.room(tokenizer) < length


@dataclass(frozen=True)
class FrequentWordsTask(TextTask):
    """The three most frequent of coded words whose counts follow a power law; the very first rank is dots.

    Attributes:
      name: label.
    """

    name: str = "ruler_fwe"

    new_tokens: ClassVar[int] = 50
    metric: ClassVar[Metric] = "all"

    def fewest(self, length: int) -> int:
        return 100  # fewer, and the fourth rank is as frequent as the fifth

    def make(
        self, rng: np.random.Generator, units: int, length: int, depth: float | None, tokenizer: TokenizerSpec
    ) -> TextSample:
        ranks = distinct(rng, lambda r: letters(r, 6, string.ascii_lowercase), max(5, length // 50) - 1)
        counts = frequent_counts(units, len(ranks) + 1)
        coded = np.repeat(np.arange(len(ranks) + 1), counts)
        named = ["...", *ranks]
        context = " ".join(named[i] for i in coded[rng.permutation(len(coded))])
        return TextSample(FREQUENT.format(context=context), tuple(ranks[:3]))
