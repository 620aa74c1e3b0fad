"""Which of several endings does a model find most likely: what is left of short-context ability after an extension.

Questions are local JSON lines; nothing is generated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.core.hosts import is_main_process
from irope_jax.core.progress import ProgressBar
from irope_jax.data.documents import Document
from irope_jax.data.reading import SourceError, read_lines
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.evals.evaluator import Measurement
from irope_jax.evals.forward import Scorer, document_losses
from irope_jax.evals.perplexity import check_lengths
from irope_jax.model.config import ModelConfig


@dataclass(frozen=True)
class MultipleChoice:
    """Accuracy over questions with given choices.

    Measures `acc` (the right choice has the greatest log-likelihood), `acc_norm` (per byte of the choice), and
    `chance`, the accuracy of guessing.

    Each line is an object with `context` (text that a choice goes on with) or `question` (asked as
    `Question: …\\nAnswer:`), `choices` (a list of texts) and `answer` (an index from 0, or the text of a choice). A
    space stands before a choice unless the context ends with white space.

    Attributes:
      name: label in the records.
      path: the file, possibly compressed.
      lengths: rows are padded to the shortest of these that holds them; what holds none of them is an error.
      limit: the first so many questions; None is all.
      batch_tokens: tokens of one forward pass.
    """

    path: str
    kind: ClassVar[str] = "multiple_choice"
    name: str = "multiple_choice"
    lengths: tuple[int, ...] = (128, 512, 2048)
    limit: int | None = None
    batch_tokens: int = 16_384

    def __post_init__(self):
        check_lengths(self.lengths)
        if not self.path:
            raise ConfigError("path", self.path, "give the path of a JSON lines file")
        if self.batch_tokens < 1:
            raise ConfigError("batch_tokens", self.batch_tokens, "must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ConfigError("limit", self.limit, "use 1 or more, or None for all")

    def check(self, tokenizer: TokenizerSpec) -> None:
        """Nothing that can be known without reading the file."""

    def build(self, model: ModelConfig, tokenizer: TokenizerSpec) -> MultipleChoiceEvaluator:
        return MultipleChoiceEvaluator(self, model, tokenizer)


@dataclass(frozen=True)
class ChoiceQuestion:
    """A context, what may follow it, and which of these is right."""

    context: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: str, limit: int | None = None) -> list[ChoiceQuestion]:
    """The questions of a file.

    Raises:
      SourceError: it cannot be read; the message names the line.
    """
    found = []
    for number, line in read_lines(Path(path).expanduser()):
        if limit is not None and len(found) == limit:
            break
        if line.strip():
            try:
                found.append(_question(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:120]
                raise SourceError(path, number, f"not a question with context, choices and answer ({what})") from None
    if not found:
        raise SourceError(path, None, "holds no question")
    return found


def _question(record: dict) -> ChoiceQuestion:
    context = record["context"] if "context" in record else f"Question: {record['question']}\nAnswer:"
    choices, answer = tuple(record["choices"]), record["answer"]
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("choices are two texts or more")
    if isinstance(answer, str):
        if answer not in choices:
            raise ValueError("the answer is none of the choices")
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError("the answer is an index from 0 or the text of a choice")
    return ChoiceQuestion(str(context), choices, answer)


class MultipleChoiceEvaluator:
    """`MultipleChoice` built for one model and tokenizer."""

    def __init__(self, spec: MultipleChoice, model: ModelConfig, tokenizer: TokenizerSpec):
        self.spec, self.name, self._tokenizer = spec, spec.name, tokenizer
        self._scorer, self._questions = Scorer(model), read_questions(spec.path, spec.limit)
        self._rows = [self._row(q, choice) for q in self._questions for choice in q.choices]
        longest = max(len(row.tokens) - 1 for row in self._rows)
        if longest > max(spec.lengths):
            fix = f"a question takes {longest} tokens; add a length that holds it"
            raise ConfigError(f"config.evals.{spec.name}.lengths", spec.lengths, fix)

    def _row(self, question: ChoiceQuestion, choice: str) -> Document:
        """bos, context, choice; only the choice has weight. Context and choice are encoded together."""
        space = "" if not question.context or question.context[-1].isspace() else " "
        # White space at the end of a context would be a token that text does not have: it goes to the choice.
        bare = question.context.rstrip()
        whole = self._tokenizer.encode(question.context + space + choice)
        begin = min(len(self._tokenizer.encode(bare)), len(whole) - 1)
        tokens = np.append(self._tokenizer.bos_id, whole).astype(np.int32)
        return Document(tokens, (np.arange(len(tokens)) > begin).astype(np.float32))

    def run(self, params: Any) -> Iterator[Measurement]:
        spec, likelihood = self.spec, np.zeros(len(self._rows))
        with ProgressBar(self.name, len(self._rows), quiet=not is_main_process()) as bar:
            shorter = 0
            for length in sorted(spec.lengths):
                here = [i for i, row in enumerate(self._rows) if shorter < len(row.tokens) - 1 <= length]
                rows, shorter = [self._rows[i] for i in here], length
                losses = document_losses(self._scorer, params, rows, length, self._tokenizer.pad_id, spec.batch_tokens)
                for i, row, nll in zip(here, rows, losses):
                    likelihood[i] = -(nll * row.weights[1:]).sum()
                    bar.advance(1, length=f"{length:,}")
        right, right_norm, chance, first = [], [], [], 0
        for question in self._questions:
            own = likelihood[first : first + len(question.choices)]
            sizes = [len(choice.encode("utf-8")) for choice in question.choices]
            right.append(int(own.argmax()) == question.answer)
            right_norm.append(int((own / sizes).argmax()) == question.answer)
            chance.append(1 / len(question.choices))
            first += len(question.choices)
        for name, values in (("acc", right), ("acc_norm", right_norm), ("chance", chance)):
            yield Measurement(name, float(np.mean(values)), len(values), {})
