"""Questions about documents, for RULER's question answering: sets that ship, and readers of those that do not.

SQuAD and HotpotQA may not be shipped. `Gaps` and `Presidents` make questions of the same shape (one document answers,
two documents answer together) from what is here; `SquadFile` and `HotpotFile` read the published files where a user has
them, and then the tasks are RULER's own. `references` asks for verses and headwords.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.data.reading import SourceError
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.text_tasks.words import passages, sentences_in

GAP = "_____"
PRESIDENTS = (
    ("George Washington", 1789, 1797, "Virginia"), ("John Adams", 1797, 1801, "Massachusetts"),
    ("Thomas Jefferson", 1801, 1809, "Virginia"), ("James Madison", 1809, 1817, "Virginia"),
    ("James Monroe", 1817, 1825, "Virginia"), ("John Quincy Adams", 1825, 1829, "Massachusetts"),
    ("Martin Van Buren", 1837, 1841, "New York"), ("John Tyler", 1841, 1845, "Virginia"),
    ("James K. Polk", 1845, 1849, "North Carolina"), ("Millard Fillmore", 1850, 1853, "New York"),
    ("Franklin Pierce", 1853, 1857, "New Hampshire"), ("James Buchanan", 1857, 1861, "Pennsylvania"),
    ("Abraham Lincoln", 1861, 1865, "Kentucky"), ("Andrew Johnson", 1865, 1869, "North Carolina"),
    ("Ulysses S. Grant", 1869, 1877, "Ohio"), ("Rutherford B. Hayes", 1877, 1881, "Ohio"),
    ("Chester A. Arthur", 1881, 1885, "Vermont"), ("Grover Cleveland", 1885, 1889, "New Jersey"),
    ("Benjamin Harrison", 1889, 1893, "Ohio"), ("William McKinley", 1897, 1901, "Ohio"),
    ("Theodore Roosevelt", 1901, 1909, "New York"), ("William Howard Taft", 1909, 1913, "Ohio"),
    ("Woodrow Wilson", 1913, 1921, "Virginia"), ("Calvin Coolidge", 1923, 1929, "Vermont"),
    ("Herbert Hoover", 1929, 1933, "Iowa"), ("Franklin D. Roosevelt", 1933, 1945, "New York"),
    ("Harry S. Truman", 1945, 1953, "Missouri"), ("Dwight D. Eisenhower", 1953, 1961, "Texas"),
    ("John F. Kennedy", 1961, 1963, "Massachusetts"), ("Lyndon B. Johnson", 1963, 1969, "Texas"),
    ("Richard Nixon", 1969, 1974, "California"), ("Gerald Ford", 1974, 1977, "Nebraska"),
    ("Jimmy Carter", 1977, 1981, "Georgia"), ("Ronald Reagan", 1981, 1989, "Illinois"),
    ("George H. W. Bush", 1989, 1993, "Massachusetts"), ("Bill Clinton", 1993, 2001, "Arkansas"),
    ("George W. Bush", 2001, 2009, "Connecticut"), ("Barack Obama", 2009, 2017, "Hawaii"),
)  # fmt: skip
"""Presidents of the United States: first and last year of an unbroken time in office, state of birth."""


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and which documents of its set answer it.

    Attributes:
      query: the question.
      answers: any of them is right.
      gold: indices of the documents that are needed.
      near: indices of documents about the same, taken before others as distractors.
    """

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Questions over one collection of documents."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Gaps:
    """Which word stood in the gap of a sentence: one passage of a text says it.

    The sentence and its word occur once in the text; the neighbouring passages are the near documents.

    Attributes:
      source: the text, cut into passages of about 120 words.
    """

    source: SourceSpec = Corpus("test")
    kind: ClassVar[str] = "gaps"

    def load(self) -> QuestionSet:
        return _gaps(self.source)


@functools.lru_cache(maxsize=4)
def _gaps(source: SourceSpec) -> QuestionSet:
    documents = passages(source)
    split = [sentences_in(document) for document in documents]
    counts = Counter(word for document in documents for word in re.findall(r"[A-Za-z]+", document))
    seen = Counter(sentence for sentences in split for sentence in sentences)
    questions = []
    for number, sentences in enumerate(split):
        usable = [s for s in sentences if 8 <= s.count(" ") + 1 <= 30 and seen[s] == 1]
        if not usable:
            continue
        sentence = max(usable, key=lambda s: (s.count(" "), s))
        rare = [w for w in re.findall(r"\b[a-z]{5,12}\b", sentence) if 2 <= counts[w] <= 30]
        rare = [w for w in rare if len(re.findall(rf"\b{w}\b", sentence)) == 1]
        if not rare:
            continue
        word = min(rare, key=lambda w: (counts[w], w))
        gapped = re.sub(rf"\b{word}\b", GAP, sentence)
        near = tuple(i for i in range(max(0, number - 4), min(len(documents), number + 5)) if i != number)
        query = f'Which word stands in place of the gap in this sentence of the documents: "{gapped}"?'
        questions.append(Question(query, (word,), (number,), near))
    return QuestionSet(tuple(questions), documents)


@dataclass(frozen=True)
class Presidents:
    """Where the president of a year was born: one document has the years, another the place.

    A model may know these by heart; ask without documents to see how much of a score is memory.

    Attributes:
      source: passages of this text are further documents.
    """

    source: SourceSpec = Corpus("test")
    kind: ClassVar[str] = "presidents"

    def load(self) -> QuestionSet:
        return _presidents(self.source)


@functools.lru_cache(maxsize=4)
def _presidents(source: SourceSpec) -> QuestionSet:
    office = [
        f"{name} in office\n{name} was president of the United States from {first} to {last}."
        for name, first, last, _ in PRESIDENTS
    ]
    birth = [f"The birthplace of {name}\n{name} was born in {state}." for name, _, _, state in PRESIDENTS]
    others = tuple(range(2 * len(office)))
    questions = []
    for i, (_, first, last, state) in enumerate(PRESIDENTS):
        gold = (i, len(office) + i)
        near = tuple(n for n in others if n not in gold)
        for year in range(first + 1, last):  # in the years at either end there were two presidents
            query = f"In which state was the man born who was president of the United States in {year}?"
            questions.append(Question(query, (state,), gold, near))
    return QuestionSet(tuple(questions), (*office, *birth, *passages(source)))


@dataclass(frozen=True)
class SquadFile:
    """A file of SQuAD 2.0 (`dev-v2.0.json`), as RULER's first question task reads it: answerable questions only.

    Attributes:
      path: the file.
    """

    path: str
    kind: ClassVar[str] = "squad"

    def load(self) -> QuestionSet:
        return _squad(self.path)


@functools.lru_cache(maxsize=2)
def _squad(path: str) -> QuestionSet:
    with _reading(path, "a SQuAD 2.0 file"):
        articles = [article["paragraphs"] for article in _json(path)["data"]]
        documents = tuple(sorted({p["context"] for paragraphs in articles for p in paragraphs}))
        place = {document: i for i, document in enumerate(documents)}
        questions = []
        for paragraphs in articles:
            own = [place[p["context"]] for p in paragraphs]
            for paragraph in paragraphs:
                gold = place[paragraph["context"]]
                near = tuple(i for i in own if i != gold)
                for asked in paragraph["qas"]:
                    if not asked["is_impossible"]:
                        answers = tuple(answer["text"] for answer in asked["answers"])
                        questions.append(Question(asked["question"], answers, (gold,), near))
    return QuestionSet(tuple(questions), documents)


@dataclass(frozen=True)
class HotpotFile:
    """A file of HotpotQA (`hotpot_dev_distractor_v1.json`), as RULER's second question task reads it: the ten documents
    of a question are kept together.

    Attributes:
      path: the file.
    """

    path: str
    kind: ClassVar[str] = "hotpot"

    def load(self) -> QuestionSet:
        return _hotpot(self.path)


@functools.lru_cache(maxsize=2)
def _hotpot(path: str) -> QuestionSet:
    with _reading(path, "a HotpotQA file with distractors"):
        rows = [(row, [f"{title}\n{''.join(lines)}" for title, lines in row["context"]]) for row in _json(path)]
        documents = tuple(sorted({document for _, own in rows for document in own}))
        place = {document: i for i, document in enumerate(documents)}
        questions = tuple(
            Question(row["question"], (row["answer"],), tuple(place[d] for d in own)) for row, own in rows
        )
    return QuestionSet(questions, documents)


class _reading:
    """Turns what can be wrong inside a question file into an error that names it."""

    def __init__(self, path: str, what: str):
        self.path, self.what = path, what

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (KeyError, TypeError, IndexError)):
            raise SourceError(self.path, None, f"is not {self.what} (has no {error})") from None


def _json(path: str):
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(path, None, f"cannot be read as JSON ({' '.join(str(error).split())[:120]})") from None


def chosen_documents(rng: np.random.Generator, question: Question, count: int, total: int) -> list[int]:
    """The documents a question is shown with: its own, then near ones, then any, in random order.

    The choice for a smaller `count` is part of the choice for a larger one.

    Args:
      rng: decides.
      question: whose documents.
      count: how many, at least those it needs.
      total: documents of the set.

    Raises:
      ConfigError: fewer than the question needs, or more than there are.
    """
    if not len(question.gold) <= count <= total:
        raise ConfigError("documents", count, f"the question needs {len(question.gold)} of {total}")
    near = [question.near[i] for i in rng.permutation(len(question.near))]
    own = {*question.gold, *near}
    others: Sequence[int] = [i for i in rng.permutation(total).tolist() if i not in own]
    order = rng.random(total)
    found = [*question.gold, *near, *others][:count]
    return sorted(found, key=lambda i: order[i])
