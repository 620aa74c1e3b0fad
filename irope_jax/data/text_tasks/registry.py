"""Families of tasks as a config names them; each gives its members. A new family is a row of the union."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from irope_jax.core.config import ConfigError, nearest
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.text_tasks.classics import PasskeyTask, SandwichTask
from irope_jax.data.text_tasks.facts import STORIES, FactsTask
from irope_jax.data.text_tasks.lookups import KeyValueTask, LinesTask, NumbersTask, RoundsTask
from irope_jax.data.text_tasks.questions import Gaps, Presidents
from irope_jax.data.text_tasks.ruler_lists import CommonWordsTask, FrequentWordsTask, VariableTask
from irope_jax.data.text_tasks.ruler_needles import needle_tasks
from irope_jax.data.text_tasks.ruler_questions import QuestionSpec, QuestionTask
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


@dataclass(frozen=True)
class Facts:
    """Facts of a small world in a long text, after BABILong (arXiv 2406.10149).

    Attributes:
      only: names of some stories of `facts.STORIES`; empty is all.
      facts: sentences of a story.
      source: the text around them.
    """

    only: tuple[str, ...] = ()
    facts: int = 10
    source: SourceSpec = Corpus("test")
    kind: ClassVar[str] = "facts"

    def __post_init__(self):
        _check_names(self.only, list(STORIES))
        self.members()  # what is wrong with `facts` is said now

    def members(self) -> tuple[TextTask, ...]:
        return tuple(FactsTask(name, self.facts, self.source) for name in STORIES if not self.only or name in self.only)


@dataclass(frozen=True)
class KeyValue:
    """One value of a JSON object of random identifiers (arXiv 2307.03172)."""

    kind: ClassVar[str] = "key_value"

    def members(self) -> tuple[TextTask, ...]:
        return (KeyValueTask(),)


@dataclass(frozen=True)
class Numbers:
    """Numbers told in a text: a needle in a haystack, or several.

    Attributes:
      told: how many there are.
      asked: how many are asked for.
      source: the text.
    """

    told: int = 1
    asked: int = 1
    source: SourceSpec = Corpus("test")
    kind: ClassVar[str] = "numbers"

    def __post_init__(self):
        self.members()

    def members(self) -> tuple[TextTask, ...]:
        name = "number" if self.told == 1 else f"numbers_{self.asked}_of_{self.told}"
        return (NumbersTask(name, self.told, self.asked, self.source),)


@dataclass(frozen=True)
class CopyLine:
    """One of many numbered lines, to be copied.

    Attributes:
      words: words of a line.
    """

    words: int = 6
    kind: ClassVar[str] = "copy_line"

    def __post_init__(self):
        self.members()

    def members(self) -> tuple[TextTask, ...]:
        return (LinesTask(words=self.words),)


@dataclass(frozen=True)
class Variables:
    """RULER's variable tracking with other chains.

    Attributes:
      chains, hops: how many chains of assignments, how many links after the first in each.
    """

    chains: int = 2
    hops: int = 2
    kind: ClassVar[str] = "variables"

    def __post_init__(self):
        self.members()

    def members(self) -> tuple[TextTask, ...]:
        return (VariableTask(f"variables_{self.chains}x{self.hops}", self.chains, self.hops),)


@dataclass(frozen=True)
class Rounds:
    """Multi-round coreference (arXiv 2409.12640): repeat one of several replies to the same request.

    Attributes:
      same: how many there are.
      source: where replies come from.
    """

    same: int = 4
    source: SourceSpec = Corpus("test")
    kind: ClassVar[str] = "rounds"

    def __post_init__(self):
        self.members()

    def members(self) -> tuple[TextTask, ...]:
        return (RoundsTask(f"rounds_{self.same}", self.same, self.source),)


@dataclass(frozen=True)
class PasskeyNoise:
    """Passkeys in repeated sentences, as in arXiv 2305.16300."""

    kind: ClassVar[str] = "passkey_noise"

    def members(self) -> tuple[TextTask, ...]:
        return (PasskeyTask(),)


@dataclass(frozen=True)
class Sandwich:
    """Kamradt's needle in a haystack.

    Attributes:
      source: the haystack.
    """

    source: SourceSpec = Corpus("test")
    kind: ClassVar[str] = "sandwich"

    def members(self) -> tuple[TextTask, ...]:
        return (SandwichTask(source=self.source),)


TextTaskSpec = Ruler | Facts | KeyValue | Numbers | CopyLine | Variables | Rounds | PasskeyNoise | Sandwich
RULER_TASKS = tuple(task.name for task in Ruler().members())
