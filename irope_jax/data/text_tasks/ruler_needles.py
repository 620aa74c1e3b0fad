"""RULER's eight needle tasks (arXiv 2404.06654, appendix B), worded as lm-evaluation-harness 0.4.13 words them.

`compose` and the `join` functions are the words; `NeedleTask` draws what is said. What differs from the harness: the
essays are a source of ours (Paul Graham's may not be shipped), cut into sentences by a rule instead of NLTK's model;
words are lists of ours; a needle in the haystack never has the key that is asked for; and the text is the longest that
fits with bos and answer prefix counted, where the harness steps by 500 words or 25 lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.text_tasks.sample import Metric, TextSample, TextTask
from irope_jax.data.text_tasks.words import Kind, distinct, draw, sentences_in, words_of_text
from irope_jax.data.tokenizer import TokenizerSpec

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type} for {key} is: {value}."
ONE = (
    "A special magic {type} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{type} afterwards.\n{context}\nWhat is the special magic {type} for {query} mentioned in the provided text? "
    "The special magic {type} for {query} mentioned in the provided text is"
)
SEVERAL = (
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {type} afterwards.\n{context}\nWhat are all the special magic {type} for {query} mentioned in the provided "
    "text? The special magic {type} for {query} mentioned in the provided text are"
)
DEPTHS = np.round(np.linspace(0, 100, 40)) / 100
"""Where RULER puts needles among sentences."""


def compose(context: str, kind: Kind, queries: Sequence[str], answers: int) -> str:
    """The whole prompt: text, question and the beginning of the answer, as one text without chat turns.

    Args:
      context: the text with its needles.
      kind: what the values are, a plural.
      queries: the keys asked for.
      answers: how many values that makes; one is asked for in the singular.
    """
    query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
    template, kind = (ONE, kind[:-1]) if answers == 1 else (SEVERAL, kind)
    return template.format(type=kind, context=context, query=query)


def join_sentences(sentences: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """Needles between sentences; `depths` are sorted shares of the sentences that stand before."""
    parts, last = [], 0
    for needle, depth in zip(needles, depths, strict=True):
        place = int(len(sentences) * depth)
        parts += [" ".join(sentences[last:place]), needle]
        last = place
    return " ".join([*parts, " ".join(sentences[last:])])


def join_lines(lines: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> str:
    """Needles between lines, each before the line of its place; `places` are sorted."""
    parts, last = [], 0
    for needle, place in zip(needles, places, strict=True):
        parts += [*lines[last:place], needle]
        last = place
    return "\n".join([*parts, *lines[last:]])


@dataclass(frozen=True)
class NeedleTask(TextTask):
    """Values of keys hidden in a haystack; keys are asked for, all their values are the answer.

    Attributes:
      name: label.
      haystack: `noise` repeats one line, `essay` is text, `needles` is lines that are all needles.
      key, value: what they are made of.
      keys: how many keys are hidden (with `needles`, beside the haystack).
      values: values of each key.
      queries: keys asked for.
      source: the text of `essay`, from its first word.
    """

    name: str
    haystack: Literal["noise", "essay", "needles"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    source: SourceSpec = Corpus("test")

    new_tokens: ClassVar[int] = 128
    metric: ClassVar[Metric] = "all"
    has_depth: ClassVar[bool] = True

    def fewest(self, length: int) -> int:
        return self.keys * self.values

    def make(
        self, rng: np.random.Generator, units: int, length: int, depth: float | None, tokenizer: TokenizerSpec
    ) -> TextSample:
        keys = distinct(rng, lambda r: draw(r, self.key), self.keys)
        values = distinct(rng, lambda r: draw(r, self.value), self.keys * self.values)
        pairs = [(key, values[i * self.values + j]) for i, key in enumerate(keys) for j in range(self.values)]
        asked = [keys[i] for i in rng.permutation(self.keys)[: self.queries]]
        pairs = [pairs[i] for i in rng.permutation(len(pairs))]
        at = np.sort(rng.choice(DEPTHS, len(pairs), replace=False)) if self.haystack == "essay" else None
        shares = np.sort(rng.random(len(pairs)))
        if depth is not None:
            pairs, at, shares = _asked_at(pairs, asked[0], depth, at, shares)
        needles = [NEEDLE.format(type=self.value, key=key, value=value) for key, value in pairs]
        if at is not None:
            context = join_sentences(sentences_in(words_of_text(self.source, units)), needles, at)
        else:
            lines = [NOISE] * units if self.haystack == "noise" else self._needles(rng, units, keys)
            context = join_lines(lines, needles, (shares * units).astype(int))
        answers = tuple(value for key in asked for value in values[keys.index(key) * self.values :][: self.values])
        return TextSample(compose(context, self.value, asked, len(answers)), answers)

    def _needles(self, rng: np.random.Generator, count: int, keys: list[str]) -> list[str]:
        lines = []
        while len(lines) < count:
            key, value = draw(rng, self.key), draw(rng, self.value)
            if key not in keys:
                lines.append(NEEDLE.format(type=self.value, key=key, value=value))
        return lines


def _asked_at(pairs, asked: str, depth: float, at, shares):
    """The same needles, with the first one asked for moved to a depth and its neighbours on their sides of it."""
    chosen = next(i for i, (key, _) in enumerate(pairs) if key == asked)
    rest = [pair for i, pair in enumerate(pairs) if i != chosen]
    moved = lambda places: np.delete(places, chosen)
    others = moved(shares) if at is None else moved(at)
    before = int((others <= depth).sum())
    places = np.insert(others, before, depth)
    pairs = [*rest[:before], pairs[chosen], *rest[before:]]
    return (pairs, None, places) if at is None else (pairs, places, shares)


def needle_tasks(source: SourceSpec) -> tuple[NeedleTask, ...]:
    """The eight, in RULER's order."""
    return (
        NeedleTask("niah_single_1", "noise"),
        NeedleTask("niah_single_2", "essay", source=source),
        NeedleTask("niah_single_3", "essay", value="uuids", source=source),
        NeedleTask("niah_multikey_1", "essay", keys=4, source=source),
        NeedleTask("niah_multikey_2", "needles"),
        NeedleTask("niah_multikey_3", "needles", key="uuids", value="uuids"),
        NeedleTask("niah_multivalue", "essay", values=4, source=source),
        NeedleTask("niah_multiquery", "essay", keys=4, queries=4, source=source),
    )
