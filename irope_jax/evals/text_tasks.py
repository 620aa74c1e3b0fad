"""Questions about long texts, answered in words: a grid of tasks, lengths and depths, RULER's among them.

The questions are `data.text_tasks`', who answers is `answering`, what an answer is worth `answer_metrics`.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from irope_jax.attention.stored import Numbers
from irope_jax.core.config import ConfigError, fingerprint
from irope_jax.core.hosts import is_main_process
from irope_jax.core.progress import ProgressBar
from irope_jax.data.text_tasks.registry import Ruler, TextTaskSpec
from irope_jax.data.text_tasks.sample import TextSample, TextTask
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.evals.answer_metrics import METRICS, cleaned
from irope_jax.evals.answering import Answerer, Answering, by_decoding, by_forward
from irope_jax.evals.cells import Cells, decided_by
from irope_jax.evals.evaluator import Measurement
from irope_jax.evals.perplexity import check_lengths
from irope_jax.model.config import ModelConfig

RULER_THRESHOLD = 0.856
"""Llama-2-7B-chat's score at 4,096 tokens: what RULER calls satisfactory (arXiv 2404.06654)."""


@dataclass(frozen=True)
class TextTasks:
    """Tasks in words by context length, and by depth where a task has one fact to place.

    Measures `score` (0 to 1, mean over the samples; `where`: `task`, `length`, `depth` where there is one); per family
    of tasks with several members `suite_score` (mean of its tasks; `suite`, `tasks`, `length`) and `effective_length`
    (the greatest length whose suite score exceeds the threshold, 0 if none does; `suite`, `tasks`, `threshold`).

    Attributes:
      name: label in the records.
      tasks: families of tasks; all of RULER's by default.
      lengths: context lengths in tokens, the room for the answer included.
      depths: where the fact asked for stands, for tasks that can place it; empty leaves it to chance.
      samples: questions of each cell (RULER asks 500).
      seed: of the questions; a cell's do not depend on the other cells.
      prompts_at_once: prompts answered together.
      threshold: of the effective length.
      cache: number format of the KV cache that answers are decoded with; None takes a whole forward pass for each
        token, which is right for models that cannot be decoded, and slow.
    """

    kind: ClassVar[str] = "text_tasks"
    name: str = "text_tasks"
    tasks: tuple[TextTaskSpec, ...] = (Ruler(),)
    lengths: tuple[int, ...] = (4096,)
    depths: tuple[float, ...] = ()
    samples: int = 20
    seed: int = 1
    prompts_at_once: int = 4
    threshold: float = RULER_THRESHOLD
    cache: Numbers | None = "bfloat16"

    def __post_init__(self):
        check_lengths(self.lengths)
        for field in ("samples", "prompts_at_once"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "must be at least 1")
        if any(not 0 <= depth <= 1 for depth in self.depths):
            raise ConfigError("depths", self.depths, "depths lie between 0 and 1")
        if not 0 <= self.threshold <= 1:
            raise ConfigError("threshold", self.threshold, "scores lie between 0 and 1; RULER's is 0.856")
        names = [task.name for family in self.tasks for task in family.members()]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ConfigError("tasks", name, "this task is named twice")
        if not names:
            raise ConfigError("tasks", self.tasks, "name at least one, such as dict(kind='ruler')")

    def check(self, tokenizer: TokenizerSpec) -> None:
        """Nothing that can be known without encoding text."""

    def build(
        self,
        model: ModelConfig,
        tokenizer: TokenizerSpec,
        answering: Answering | None = None,
        directory: Path | None = None,
    ) -> TextTasksEvaluator:
        """See `TextTasksEvaluator`; without a way of answering, as `cache` says."""
        if answering is None:
            decodes = self.cache is not None
            answering = by_decoding(model, self.cache) if decodes else by_forward(model, tokenizer)
        return TextTasksEvaluator(self, model, tokenizer, answering, directory)


class TextTasksEvaluator:
    """`TextTasks` built for one model and tokenizer.

    Args:
      spec: what to ask.
      model, tokenizer: whom.
      answering: how it answers.
      directory: finished cells are kept there, and a run that was cut short goes on after them; None keeps nothing.

    Raises:
      ConfigError: a length is too short for a task, or longer than its material.
    """

    def __init__(
        self,
        spec: TextTasks,
        model: ModelConfig,
        tokenizer: TokenizerSpec,
        answering: Answering,
        directory: Path | None = None,
    ):
        self.spec, self.name, self._tokenizer, self._answering = spec, spec.name, tokenizer, answering
        self._directory, self._model = directory, model
        for task in (task for family in spec.tasks for task in family.members()):
            # What cannot be asked is said before a run, not in the middle of it.
            ends = {min(spec.lengths)} | ({max(spec.lengths)} if task.most(max(spec.lengths)) is not None else set())
            for length in ends:
                try:
                    task.sample(np.random.default_rng(0), length, tokenizer)
                except ConfigError as error:
                    raise ConfigError(
                        f"config.evals.{spec.name}.lengths", length, f"{task.name}: {error.fix}"
                    ) from None

    def cells(self) -> list[tuple[TextTask, int, float | None]]:
        """The grid, task by task."""
        return [
            (task, length, depth)
            for family in self.spec.tasks
            for task in family.members()
            for length in self.spec.lengths
            for depth in (self.spec.depths if task.has_depth and self.spec.depths else (None,))
        ]

    def questions(self, task: TextTask, length: int, depth: float | None) -> list[TextSample]:
        """The samples of a cell; they depend on nothing but the cell and the seed."""
        place = -1 if depth is None else round(depth * 10**6)
        key = [self.spec.seed, zlib.crc32(task.name.encode()), length, place + 1]
        rngs = [np.random.default_rng([*key, number]) for number in range(self.spec.samples)]
        return [task.sample(rng, length, self._tokenizer, depth) for rng in rngs]

    def run(self, params: Any) -> Iterator[Measurement]:
        spec, answerer, grid = self.spec, self._answering.of(params), self.cells()
        scores: dict[tuple[str, int], list[float]] = defaultdict(list)
        with Cells(self._directory, self._about(params)) as kept:
            done = sum(kept.get(_cell_of(*cell)) is not None for cell in grid)
            total, before = len(grid) * spec.samples, done * spec.samples
            with ProgressBar(self.name, total, done=before, quiet=not is_main_process()) as bar:
                for task, length, depth in grid:
                    where = _where(task, length, depth)
                    cell = _cell_of(task, length, depth)
                    found = kept.get(cell)
                    if found is None:
                        found = self._answered(answerer, task, length, depth, bar)
                        kept.add(cell, found)
                    scores[task.name, length] += found["scores"]
                    yield Measurement("score", float(np.mean(found["scores"])), len(found["scores"]), where)
        for family in spec.tasks:
            yield from self._suite(family.kind, family.members(), scores)

    def _answered(self, answerer: Answerer, task: TextTask, length: int, depth: float | None, bar: ProgressBar) -> dict:
        samples = self.questions(task, length, depth)
        said: list[str] = []
        for first in range(0, len(samples), self.spec.prompts_at_once):
            group = samples[first : first + self.spec.prompts_at_once]
            prompts = [[self._tokenizer.bos_id, *self._tokenizer.encode(s.prompt).tolist()] for s in group]
            answers = answerer.answer(prompts, task.room(self._tokenizer), (self._tokenizer.eos_id,))
            said += [self._text(answer) for answer in answers]
            bar.advance(len(group), task=task.name, length=f"{length:,}")
        scores = [METRICS[task.metric](text, sample) for text, sample in zip(said, samples, strict=True)]
        return {"scores": scores, "said": list(map(cleaned, said)), "wanted": [list(s.answers) for s in samples]}

    def _text(self, answer: Sequence[int]) -> str:
        """An answer in words, up to where it ends."""
        answer = list(answer)
        if self._tokenizer.eos_id in answer:
            answer = answer[: answer.index(self._tokenizer.eos_id)]
        return self._tokenizer.decode(np.asarray(answer, np.int32))

    def _suite(self, suite: str, tasks: Sequence[TextTask], scores: dict) -> Iterator[Measurement]:
        if len(tasks) < 2:
            return
        effective = 0
        for length in self.spec.lengths:
            means = [float(np.mean(scores[task.name, length])) for task in tasks]
            count = sum(len(scores[task.name, length]) for task in tasks)
            mean = float(np.mean(means))
            effective = max(effective, length) if mean > self.spec.threshold else effective
            yield Measurement("suite_score", mean, count, {"suite": suite, "tasks": len(tasks), "length": length})
        where = {"suite": suite, "tasks": len(tasks), "threshold": self.spec.threshold}
        yield Measurement("effective_length", float(effective), len(self.spec.lengths), where)

    def _about(self, params: Any) -> dict[str, Any]:
        """What decides the scores of a cell beside the cell itself."""
        if self._directory is None:
            return {}
        asked = {"seed": self.spec.seed, "samples": self.spec.samples, "answering": self._answering.name}
        return asked | decided_by(self._model, self._tokenizer, params)


def _where(task: TextTask, length: int, depth: float | None) -> dict[str, Any]:
    return {"task": task.name, "length": length} | ({} if depth is None else {"depth": depth})


def _cell_of(task: TextTask, length: int, depth: float | None) -> dict[str, Any]:
    """A cell as it is kept: a task with other fields is another task, also under the same name."""
    return _where(task, length, depth) | {"fields": fingerprint(task)}
