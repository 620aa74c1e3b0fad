"""Finding what was asked for in a long list or talk: key-value pairs, numbers in a text, lines, rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.text_tasks.ruler_needles import join_sentences
from irope_jax.data.text_tasks.sample import Metric, TextSample, TextTask
from irope_jax.data.text_tasks.word_lists import ADJECTIVES, NOUNS
from irope_jax.data.text_tasks.words import (
    distinct,
    letters,
    number,
    passages,
    sentences_in,
    uuid4,
    word_pair,
    words_of_text,
)
from irope_jax.data.tokenizer import TokenizerSpec

KEY_VALUE = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{pairs}\n\n"
    'Key: "{key}"\nCorresponding value:'
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
FORMS = ("note", "letter", "speech", "tale", "sketch", "report", "prayer", "song")


@dataclass(frozen=True)
class KeyValueTask(TextTask):
    """A JSON object of random identifiers, one of which is asked for (Liu et al., arXiv 2307.03172). Units are pairs.

    Attributes:
      name: label.
    """

    name: str = "key_value"

    new_tokens: ClassVar[int] = 48
    metric: ClassVar[Metric] = "all"
    has_depth: ClassVar[bool] = True

    def fewest(self, length: int) -> int:
        return 2

    def make(
        self, rng: np.random.Generator, units: int, length: int, depth: float | None, tokenizer: TokenizerSpec
    ) -> TextSample:
        share = rng.random() if depth is None else depth
        pairs = [(uuid4(rng), uuid4(rng)) for _ in range(units)]
        key, value = pairs[min(int(share * units), units - 1)]
        listed = "{" + ",\n ".join(f'"{k}": "{v}"' for k, v in pairs) + "}"
        return TextSample(KEY_VALUE.format(pairs=listed, key=key), (value,))


@dataclass(frozen=True)
class NumbersTask(TextTask):
    """Secret numbers told somewhere in a text; some of them are asked for at its end. Units are words of the text.

    Attributes:
      name: label.
      told: how many numbers there are.
      asked: how many are asked for; with a depth, the first of them stands there.
      source: the text, from its first word.
    """

    name: str = "numbers"
    told: int = 1
    asked: int = 1
    source: SourceSpec = Corpus("test")

    new_tokens: ClassVar[int] = 64
    metric: ClassVar[Metric] = "all"
    has_depth: ClassVar[bool] = True

    def __post_init__(self):
        if not 1 <= self.asked <= self.told:
            raise ConfigError("asked", self.asked, f"ask for 1 to told={self.told} of them")

    def make(
        self, rng: np.random.Generator, units: int, length: int, depth: float | None, tokenizer: TokenizerSpec
    ) -> TextSample:
        keys, values = distinct(rng, word_pair, self.told), distinct(rng, number, self.told)
        at = rng.random(self.told)
        at = at if depth is None else np.array([depth, *at[1:]])
        told = [f"The secret number of the {k.replace('-', ' ')} is {v}." for k, v in zip(keys, values)]
        order = np.argsort(at, kind="stable")
        text = sentences_in(words_of_text(self.source, units))
        context = join_sentences(text, [told[i] for i in order], at[order]).strip()
        asked = [f"the {key.replace('-', ' ')}" for key in keys[: self.asked]]
        which = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + " and " + asked[-1]
        what, are = ("secret number", "is") if len(asked) == 1 else ("secret numbers", "are")
        ask = f"Question: What {are} the {what} of {which}?\nAnswer: The {what} of {which} {are}"
        prompt = f"{context}\n\n{ask}"
        return TextSample(prompt, tuple(values[: self.asked]))


@dataclass(frozen=True)
class LinesTask(TextTask):
    """Numbered lines of words, one of which is to be copied exactly. Units are lines.

    Attributes:
      name: label.
      words: words of a line.
    """

    name: str = "copy_line"
    words: int = 6

    new_tokens: ClassVar[int] = 32
    metric: ClassVar[Metric] = "exact_start"
    has_depth: ClassVar[bool] = True

    def __post_init__(self):
        if not 1 <= self.words <= 12:
            raise ConfigError("words", self.words, "use 1 to 12, which fit into the room for the answer")

    def make(
        self, rng: np.random.Generator, units: int, length: int, depth: float | None, tokenizer: TokenizerSpec
    ) -> TextSample:
        share = rng.random() if depth is None else depth
        everything = ADJECTIVES + NOUNS
        lines = [" ".join(everything[i] for i in rng.integers(len(everything), size=self.words)) for _ in range(units)]
        chosen = min(int(share * units), units - 1)
        listed = "\n".join(f"Line {i}: {line}" for i, line in enumerate(lines, 1))
        ask = f"Copy line {chosen + 1} word for word.\nLine {chosen + 1}:"
        return TextSample(f"Remember the lines below.\n\n{listed}\n\n{ask}", (lines[chosen],))


@dataclass(frozen=True)
class RoundsTask(TextTask):
    """A long talk in which the same thing was asked for several times; one of the replies is to be repeated.

    After Michelangelo's and OpenAI's multi-round coreference (arXiv 2409.12640); the replies are passages of a text.
    Units are rounds of the talk.

    Attributes:
      name: label.
      same: how often the same is asked for, 2 to 8.
      source: where replies come from, passages of about 30 words, each used once.
    """

    name: str = "rounds"
    same: int = 4
    source: SourceSpec = Corpus("test")

    new_tokens: ClassVar[int] = 96
    metric: ClassVar[Metric] = "after_mark"
    has_depth: ClassVar[bool] = True

    def __post_init__(self):
        if not 2 <= self.same <= len(ORDINALS):
            raise ConfigError("same", self.same, f"use 2 to {len(ORDINALS)}")

    def fewest(self, length: int) -> int:
        return self.same + 1

    def most(self, length: int) -> int:
        return len(self._replies())

    def _replies(self) -> tuple[str, ...]:
        return tuple(p for p in passages(self.source, 30) if 10 <= p.count(" ") < 40)

    def make(
        self, rng: np.random.Generator, units: int, length: int, depth: float | None, tokenizer: TokenizerSpec
    ) -> TextSample:
        mark = letters(rng, 10)
        topic, other = NOUNS[rng.integers(len(NOUNS))], [*FORMS]
        form = other.pop(rng.integers(len(other)))
        which = int(rng.integers(self.same))
        at = np.sort(rng.random(self.same))
        if depth is not None:
            before, after = rng.random(which), rng.random(self.same - which - 1)
            at = np.concatenate([np.sort(before) * depth, [depth], depth + np.sort(after) * (1 - depth)])
        # Different places below the number of rounds, in order.
        places = (at * (units - self.same + 1)).astype(int).clip(0, units - self.same) + np.arange(self.same)
        replies = self._replies()
        chosen = [replies[i] for i in rng.permutation(len(replies))[:units]]
        asked = [f"a {FORMS[rng.integers(len(FORMS))]} about a {NOUNS[rng.integers(len(NOUNS))]}" for _ in range(units)]
        same = f"a {form} about a {topic}"
        asked = [ask if ask != same else f"a {other[0]} about a {topic}" for ask in asked]
        for place in places:
            asked[place] = same
        talk = "\n\n".join(f"User: Write {ask}.\nAssistant: {reply}" for ask, reply in zip(asked, chosen))
        prompt = (
            f"{talk}\n\nUser: Begin with {mark} and repeat, word for word, the {ORDINALS[which]} {form} about a "
            f"{topic} that you wrote. Say nothing else.\nAssistant:"
        )
        return TextSample(prompt, (chosen[places[which]],), mark=mark)
