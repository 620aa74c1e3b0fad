"""The two needles that papers on length extension report, in the words of their first authors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.text_tasks.ruler_needles import NOISE
from irope_jax.data.text_tasks.sample import Metric, TextSample, TextTask
from irope_jax.data.text_tasks.words import running_words, sentences_in
from irope_jax.data.tokenizer import TokenizerSpec

PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there.\n{before}\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    "{after}\nWhat is the pass key? The pass key is"
)
SANDWICH = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
SANDWICH_ANSWER = "eat a sandwich and sit in Dolores Park"


@dataclass(frozen=True)
class PasskeyTask(TextTask):
    """A number told twice among repeated sentences (Mohtashami and Jaggi, arXiv 2305.16300). Units are letters of them.

    Both stretches of noise begin at its beginning and may stop within a word, as in the original; the length of the
    first is uniform where no depth is given.

    Attributes:
      name: label.
    """

    name: str = "passkey_noise"

    new_tokens: ClassVar[int] = 10
    metric: ClassVar[Metric] = "first_number"
    has_depth: ClassVar[bool] = True

    def fewest(self, length: int) -> int:
        return 0

    def make(
        self, rng: np.random.Generator, units: int, length: int, depth: float | None, tokenizer: TokenizerSpec
    ) -> TextSample:
        key, share = str(rng.integers(1, 50_001)), rng.random() if depth is None else depth
        noise, before = (NOISE + " ") * (units // len(NOISE) + 1), round(share * units)
        prompt = PASSKEY.format(before=noise[:before], key=key, after=noise[: units - before])
        return TextSample(prompt, (key,))


@dataclass(frozen=True)
class SandwichTask(TextTask):
    """The sandwich in Dolores Park, in a text (Kamradt, LLMTest_NeedleInAHaystack, 2023). Units are words of the text.

    The original has a language model grade the answer; here the score is the share of the needle's words in it. Its
    text is Paul Graham's essays, which may not be shipped; give them as `source` to compare.

    Attributes:
      name: label.
      source: the text; each question takes a part of it that begins anywhere.
    """

    name: str = "sandwich"
    source: SourceSpec = Corpus("test")

    new_tokens: ClassVar[int] = 48
    metric: ClassVar[Metric] = "word_recall"
    has_depth: ClassVar[bool] = True

    def make(
        self, rng: np.random.Generator, units: int, length: int, depth: float | None, tokenizer: TokenizerSpec
    ) -> TextSample:
        words, share = running_words(self.source), rng.random() if depth is None else depth
        begin = int(rng.integers(len(words)))
        rounds = -(-(begin + units) // len(words))
        text = sentences_in(" ".join((words * rounds)[begin : begin + units]))
        place = round(share * len(text))
        context = " ".join([*text[:place], SANDWICH, *text[place:]])
        ask = "What is the best thing to do in San Francisco?"
        prompt = f"{context}\n\nQuestion: {ask}\nAnswer: The best thing to do in San Francisco is"
        return TextSample(prompt, (SANDWICH_ANSWER,))
