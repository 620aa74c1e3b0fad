"""Families of tasks as a config names them; each gives its members. A new family is a row of the union."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from irope_jax.core.config import ConfigError, nearest
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.text_tasks.questions import Gaps, Presidents, QuestionSpec
from irope_jax.data.text_tasks.ruler_lists import CommonWordsTask, FrequentWordsTask, VariableTask
from irope_jax.data.text_tasks.ruler_needles import needle_tasks
from irope_jax.data.text_tasks.ruler_questions import QuestionTask
from irope_jax.data.text_tasks.sample import TextTask


def _check_names(only: tuple[str, ...], names: list[str]) -> None:
    for name in only:
        if name not in names:
            raise ConfigError("only", name, f"no such task; {nearest(name, names)}")


@dataclass(frozen=True)
class Ruler:
    """RULER's 13 tasks (arXiv 2404.06654), by the names they have in lm-evaluation-harness.

    Attributes:
      only: names of some; empty is all.
      essays: text around the needles of `essay` tasks, from its first word.
      words: where common words come from.
      one_document: questions of `ruler_qa_squad`.
      two_documents: questions of `ruler_qa_hotpot`.
    """

    only: tuple[str, ...] = ()
    essays: SourceSpec = Corpus("test")
    words: SourceSpec = Corpus("train")
    one_document: QuestionSpec = Gaps()
    two_documents: QuestionSpec = Presidents()
    kind: ClassVar[str] = "ruler"

    def __post_init__(self):
        _check_names(self.only, [task.name for task in self._all()])

    def _all(self) -> tuple[TextTask, ...]:
        return (
            *needle_tasks(self.essays),
            VariableTask(),
            CommonWordsTask(source=self.words),
            FrequentWordsTask(),
            QuestionTask("ruler_qa_squad", self.one_document),
            QuestionTask("ruler_qa_hotpot", self.two_documents),
        )

    def members(self) -> tuple[TextTask, ...]:
        return tuple(task for task in self._all() if not self.only or task.name in self.only)


RULER_TASKS = tuple(task.name for task in Ruler().members())
