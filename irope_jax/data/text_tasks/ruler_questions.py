"""RULER's question answering (arXiv 2404.06654), worded as lm-evaluation-harness 0.4.13 words it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from irope_jax.data.text_tasks.questions import Gaps, HotpotFile, Presidents, SquadFile, chosen_documents
from irope_jax.data.text_tasks.references import Dictionary, Verses
from irope_jax.data.text_tasks.sample import Metric, TextSample, TextTask
from irope_jax.data.tokenizer import TokenizerSpec

ANSWERING = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{documents}\n\nAnswer the question based on the given documents. Only give "
    "me the answer and do not output any other words.\n\nQuestion: {query} Answer:"
)


def answering_prompt(documents: Sequence[str], query: str) -> str:
    numbered = [f"Document {i}:\n{document}" for i, document in enumerate(documents, 1)]
    return ANSWERING.format(documents="\n\n".join(numbered), query=query)


QuestionSpec = Gaps | Presidents | Verses | Dictionary | SquadFile | HotpotFile


@dataclass(frozen=True)
class QuestionTask(TextTask):
    """A question whose answer stands in one or more of many documents. Units are documents.

    Attributes:
      name: label.
      questions: what is asked.
    """

    name: str = "ruler_qa_squad"
    questions: QuestionSpec = Gaps()

    new_tokens: ClassVar[int] = 32
    metric: ClassVar[Metric] = "any"

    def most(self, length: int) -> int:
        return len(self.questions.load().documents)

    def fewest(self, length: int) -> int:
        return max(len(question.gold) for question in self.questions.load().questions)

    def make(
        self, rng: np.random.Generator, units: int, length: int, depth: float | None, tokenizer: TokenizerSpec
    ) -> TextSample:
        loaded = self.questions.load()
        question = loaded.questions[rng.integers(len(loaded.questions))]
        shown = chosen_documents(rng, question, units, len(loaded.documents))
        return TextSample(answering_prompt([loaded.documents[i] for i in shown], question.query), question.answers)
