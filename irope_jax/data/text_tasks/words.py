"""Where the words of the tasks come from: names, numbers, and the words and sentences of a text source.

What is said with them belongs to the tasks.
"""

from __future__ import annotations

import functools
import re
import string
import uuid
from collections import Counter

import numpy as np

from irope_jax.data.sources import SourceSpec, open_source
from irope_jax.data.text_tasks.word_lists import ADJECTIVES, NOUNS

Kind = str
"""`words`, `numbers` or `uuids`, as RULER calls what keys and values are made of."""

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])")
_SPACES = re.compile(r"\s+")


def number(rng: np.random.Generator, digits: int = 7) -> str:
    """A decimal number that does not begin with 0."""
    return str(int(rng.integers(10 ** (digits - 1), 10**digits)))


def word_pair(rng: np.random.Generator) -> str:
    """Such as `quiet-harbour`; there are about 76,000."""
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"


def uuid4(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def letters(rng: np.random.Generator, count: int, alphabet: str = string.ascii_uppercase) -> str:
    return "".join(alphabet[i] for i in rng.integers(len(alphabet), size=count))


def draw(rng: np.random.Generator, kind: Kind) -> str:
    return {"words": word_pair, "numbers": number, "uuids": uuid4}[kind](rng)


def distinct(rng: np.random.Generator, make, count: int, taken: set[str] = frozenset()) -> list[str]:
    """`count` different results of `make(rng)`, none of them in `taken`."""
    found: dict[str, None] = {}
    while len(found) < count:
        word = make(rng)
        if word not in taken:
            found[word] = None
    return list(found)


@functools.lru_cache(maxsize=8)
def running_words(source: SourceSpec) -> tuple[str, ...]:
    """All words of a source in their order, with their punctuation, split at white space."""
    return tuple(" ".join(open_source(source)).split())


def words_of_text(source: SourceSpec, count: int) -> str:
    """The first `count` words of a source, from its beginning again when it ends."""
    words = running_words(source)
    rounds, rest = divmod(count, len(words))
    return " ".join(words * rounds + words[:rest])


def sentences_in(text: str) -> list[str]:
    """Cut after `.`, `!` or `?` before a capital or a digit; white space within a sentence becomes one space."""
    ends, found, begin = [*_SENTENCE_END.finditer(text)], [], 0
    for end in ends:
        found.append(text[begin : end.end()].strip())
        begin = end.end()
    found.append(text[begin:].strip())
    return [_SPACES.sub(" ", sentence) for sentence in found if sentence]


@functools.lru_cache(maxsize=8)
def sentences(source: SourceSpec) -> tuple[str, ...]:
    """The sentences of a source in their order."""
    return tuple(sentence for text in open_source(source) for sentence in sentences_in(text))


@functools.lru_cache(maxsize=8)
def vocabulary(source: SourceSpec) -> tuple[str, ...]:
    """Words of 3 to 10 small letters that a source writes at least twice, in alphabetical order."""
    counts = Counter(word for word in running_words(source) if 3 <= len(word) <= 10)
    return tuple(sorted(w for w, n in counts.items() if n >= 2 and w.isascii() and w.isalpha() and w.islower()))


@functools.lru_cache(maxsize=8)
def passages(source: SourceSpec, most_words: int = 120) -> tuple[str, ...]:
    """Paragraphs of a source joined or cut at sentences to about `most_words` words."""
    found: list[str] = []
    for text in open_source(source):
        now: list[str] = []
        size = 0
        for sentence in sentences_in(text):
            words = sentence.count(" ") + 1
            if size and size + words > most_words:
                found.append(" ".join(now))
                now, size = [], 0
            now.append(sentence)
            size += words
        if now:
            found.append(" ".join(now))
    return tuple(found)
