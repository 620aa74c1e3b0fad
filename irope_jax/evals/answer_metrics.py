"""What an answer in words is worth, 0 to 1. The questions are `data.text_tasks`'."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence

from irope_jax.data.text_tasks.sample import Metric, TextSample

_UNPRINTABLE = re.compile(r"[\x00-\x1f]")


def cleaned(said: str) -> str:
    """As RULER compares it: control characters are line breaks, and the ends are cut."""
    return _UNPRINTABLE.sub("\n", said.strip()).strip()


def string_match_all(said: str, answers: Sequence[str]) -> float:
    """The share of the answers that occur in what was said, in either case (RULER)."""
    said = cleaned(said).lower()
    return sum(answer.lower() in said for answer in answers) / len(answers)


def string_match_part(said: str, answers: Sequence[str]) -> float:
    """1 if one of the answers occurs in what was said (RULER's question answering).

    lm-evaluation-harness 0.4.13 takes a mean over the answers there; RULER's own code takes the largest, as here.
    """
    said = cleaned(said).lower()
    return float(any(answer.lower() in said for answer in answers))


def labels_match(said: str, answers: Sequence[str], labels: Sequence[str], question: str) -> float:
    """1 if the first sentence says the right labels and no others, but for those of the question (BABILong)."""
    first = re.split(r"[.\n]", cleaned(said).lower(), maxsplit=1)[0]
    found = {label for label in labels if _says(first, label)}
    found -= {label for label in labels if _says(question.lower(), label)} - set(answers)
    return float(found == set(answers))


def _says(text: str, label: str) -> bool:
    return re.search(rf"\b{re.escape(label.lower())}\b", text) is not None


def after_mark(said: str, answer: str, mark: str) -> float:
    """How much of a text is repeated after its mark, by `difflib`'s ratio; 0 without the mark (OpenAI's MRCR)."""
    said = said.strip()
    if not said.startswith(mark):
        return 0.0
    return difflib.SequenceMatcher(None, said.removeprefix(mark).strip(), answer.strip(), autojunk=False).ratio()


def exact_start(said: str, answer: str) -> float:
    """1 if what was said begins with the answer, white space aside."""
    return float(" ".join(said.split()).startswith(" ".join(answer.split())))


def first_number(said: str, answer: str) -> float:
    """1 if the first run of digits is the answer (Landmark attention's passkeys)."""
    found = re.search(r"\d+", said)
    return float(found is not None and found[0] == answer)


def word_recall(said: str, answer: str) -> float:
    """The share of the answer's different words that were said, in either case."""
    words = lambda text: set(re.findall(r"\w+", text.lower()))
    return len(words(answer) & words(said)) / len(words(answer))


METRICS: dict[Metric, Callable[[str, TextSample], float]] = {
    "all": lambda said, sample: string_match_all(said, sample.answers),
    "any": lambda said, sample: string_match_part(said, sample.answers),
    "labels": lambda said, sample: labels_match(said, sample.answers, sample.labels, sample.question),
    "after_mark": lambda said, sample: after_mark(said, sample.answers[0], sample.mark),
    "exact_start": lambda said, sample: exact_start(said, sample.answers[0]),
    "first_number": lambda said, sample: first_number(said, sample.answers[0]),
    "word_recall": lambda said, sample: word_recall(said, sample.answers[0]),
}
