"""Questions from works of reference that a user has: verses and dictionaries in the formats they are packaged in."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from irope_jax.data.reading import SourceError, read_bytes, read_lines
from irope_jax.data.text_tasks.questions import GAP, Question, QuestionSet

NEAR = 4
"""Entries on each side that are near documents."""

# ---- verses ---------------------------------------------------------------------------------------------------------

VERSE = re.compile(r"(\S.*?)\s*(\d+):(\d+)\s+(\S.*)")


@dataclass(frozen=True)
class Verses:
    """Which verse says these words, answered by its reference; the neighbouring verses are the near documents.

    Verses of the same words, and references that are part of others (John 3:1 of John 3:16, and of 1 John 3:1), are
    documents but are not asked for: scores look for the answer anywhere in what a model says.

    Attributes:
      path: a text of one verse per line, `Genesis 1:1 In the beginning …`; may be compressed (.gz, .xz, .bz2, .zst).
    """

    path: str
    kind: ClassVar[str] = "verses"

    def load(self) -> QuestionSet:
        return _verses(self.path)


@functools.lru_cache(maxsize=2)
def _verses(path: str) -> QuestionSet:
    found = []
    for number, line in read_lines(Path(path).expanduser()):
        if line.strip():
            match = VERSE.fullmatch(line.strip())
            if match is None:
                raise SourceError(path, number, 'is not a verse such as "Genesis 1:1 In the beginning …"')
            found.append(match.groups())
    said, parts = Counter(text for *_, text in found), _parts(found)
    verses = [(f"{book} {chapter}:{verse}", text) for book, chapter, verse, text in found]
    questions = [
        Question(f'Which verse says "{text}"?', (reference,), (i,), _around(i, len(verses)))
        for i, (reference, text) in enumerate(verses)
        if said[text] == 1 and reference not in parts
    ]
    return _questions(path, questions, tuple(map(" ".join, verses)))


def _parts(verses: list[tuple[str, ...]]) -> set[str]:
    """What may stand for a reference and is part of another one."""
    found = set()
    for book, chapter, verse, _ in verses:
        words = book.split()
        for first in range(len(words)):
            end = len(verse) + (first > 0)  # the whole reference is no part of itself
            found |= {f"{' '.join(words[first:])} {chapter}:{verse[:digits]}" for digits in range(1, end)}
    return found


# ---- dictionaries ---------------------------------------------------------------------------------------------------

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
LONGEST = 120
"""Words of an entry that are shown."""


@dataclass(frozen=True)
class Dictionary:
    """Which headword has this definition; the entries before and after it in the index are the near documents.

    Only single words of five letters and more are asked for that no other headword begins with; where the definition
    uses the word itself, the question has a gap. A model may know these by heart; ask without documents to see how much
    of a score is memory.

    Attributes:
      path: a dictionary of the dict server (dictd(8)): `foldoc.dict` or `foldoc.dict.dz`, beside `foldoc.index`.
    """

    path: str
    kind: ClassVar[str] = "dictionary"

    def load(self) -> QuestionSet:
        return _dictionary(self.path)


@functools.lru_cache(maxsize=2)
def _dictionary(path: str) -> QuestionSet:
    entries = sorted(set(_entries(path)))
    heads = {head.lower() for head, _ in entries}
    begun = {head[:end] for head in heads for end in range(5, len(head))}
    times, said = Counter(head.lower() for head, _ in entries), Counter(text for _, text in entries)
    questions = []
    for i, (head, text) in enumerate(entries):
        low = head.lower()
        if not re.fullmatch(r"[A-Za-z]{5,}", head) or low in begun or times[low] > 1 or said[text] > 1:
            continue
        asked = re.sub(re.escape(head), GAP, text, flags=re.IGNORECASE)
        query = f'Which headword of the dictionary is defined as "{asked}"?'
        questions.append(Question(query, (head,), (i,), _around(i, len(entries))))
    return _questions(path, questions, tuple(f"{head}: {text}" for head, text in entries))


def _entries(path: str) -> Iterator[tuple[str, str]]:
    """Headwords and their definitions as one line; entries too short to be one, and those about the file, left out."""
    place = Path(path).expanduser()
    if not place.name.endswith((".dict", ".dict.dz")):
        raise SourceError(path, None, "is not named NAME.dict or NAME.dict.dz, as dictionaries of the dict server are")
    index = place.with_name(place.name.removesuffix(".dz").removesuffix(".dict") + ".index")
    body = read_bytes(place)
    for number, line in read_lines(index):
        try:
            head, begin, size = line.split("\t")[:3]
            begin, size = _number(begin), _number(size)
        except ValueError:
            raise SourceError(
                index, number, "is not `headword<TAB>offset<TAB>length` of a dictionary's index"
            ) from None
        if begin + size > len(body):
            raise SourceError(index, number, f"points behind the end of {path}; the two files do not belong together")
        entry = body[begin : begin + size].decode("utf-8", "replace")  # old dictionaries have a few bytes that are not
        _, _, text = entry.partition("\n")
        words = re.sub(r"[{}]", "", text).split()
        if len(words) >= 8 and not head.startswith(("00database", "00-database")):
            yield head, " ".join(words[:LONGEST]) + (" …" if len(words) > LONGEST else "")


def _number(digits: str) -> int:
    total = 0
    for digit in digits:
        total = 64 * total + DIGITS.index(digit)
    return total


# ---- both -----------------------------------------------------------------------------------------------------------


def _around(i: int, total: int) -> tuple[int, ...]:
    return tuple(n for n in range(max(0, i - NEAR), min(total, i + NEAR + 1)) if n != i)


def _questions(path: str, questions: list[Question], documents: tuple[str, ...]) -> QuestionSet:
    if not questions:
        raise SourceError(path, None, f"has {len(documents)} entries and none that can be asked for")
    return QuestionSet(tuple(questions), documents)
