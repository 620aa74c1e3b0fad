"""Can the model still find a fact, by context length and by how deep the fact lies?

Samples come from `data.synthetic`, so that training and evaluation speak of the same task. A fact whose tokens lie on
both sides of a chunk border cannot be put together by the layers that stop there; such facts are reported apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from irope_jax.attention.mask import Chunked
from irope_jax.core.config import ConfigError, to_dict
from irope_jax.core.hosts import is_main_process
from irope_jax.core.progress import ProgressBar
from irope_jax.data.documents import Document
from irope_jax.data.packing import batch_of
from irope_jax.data.samples import Sample, Task
from irope_jax.data.synthetic import Needle, TaskSpec
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.evals.cells import Cells, decided_by
from irope_jax.evals.evaluator import Measurement
from irope_jax.evals.forward import Scorer, rows_per_batch
from irope_jax.evals.perplexity import check_lengths
from irope_jax.model.config import ModelConfig


@dataclass(frozen=True)
class Retrieval:
    """Facts in a haystack, all asked for at the end.

    Measures, per length, depth of the fact and whether it straddles a chunk border: `accuracy` (the whole value is the
    most likely continuation, token by token) and `answer_nll` (nats per answer token).

    Attributes:
      name: label in the records.
      task: what the samples are, asked at their end. The fact of an answer that is put together from several is the
        first of them.
      lengths: context lengths in tokens.
      queries: how many questions to ask at each length, at least one sample's.
      facts: facts in a context (strings, chains, lists, as the task has them), all of them asked for; spread evenly
        over the depths where the task can say where they stand.
      depth_bins: depths are reported in this many equal bins.
      seed: of the samples.
      batch_tokens: tokens of one forward pass; longer texts are read in pieces of so many with a KV cache.
    """

    kind: ClassVar[str] = "retrieval"
    name: str = "retrieval"
    task: TaskSpec = Needle()
    lengths: tuple[int, ...] = (1024,)
    queries: int = 256
    facts: int = 8
    depth_bins: int = 8
    seed: int = 1
    batch_tokens: int = 16_384

    def __post_init__(self):
        check_lengths(self.lengths)
        for field in ("queries", "facts", "depth_bins", "batch_tokens"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "must be at least 1")

    def check(self, tokenizer: TokenizerSpec) -> None:
        """Raises `ConfigError` if samples of some length cannot be made; better now than after the training."""
        for length in self.lengths:
            task = self.task_at_end
            try:
                task.check(tokenizer, length + 1)
            except ConfigError as error:
                if error.field == "length":
                    raise ConfigError("lengths", self.lengths, f"{error.fix}; {length} is too short") from None
                raise error if error.field.startswith("tokenizer") else error.within("task") from None

    @property
    def task_at_end(self) -> Task:
        """The task with `facts` facts, all of them asked for at the end.

        Raises:
          ConfigError: the task cannot have that many.
        """
        try:
            return self.task.at_end(self.facts)
        except ConfigError as error:
            raise ConfigError("facts", self.facts, f"the task cannot have that many: {error.fix}") from None

    def build(self, model: ModelConfig, tokenizer: TokenizerSpec, directory: Path | None = None) -> RetrievalEvaluator:
        return RetrievalEvaluator(self, model, tokenizer, directory)


class Answer(NamedTuple):
    """What became of one question: whether it was right, nats per token of its answer, where its fact stood."""

    right: float
    nll: float
    depth: float
    straddles: float


class RetrievalEvaluator:
    """`Retrieval` built for one model and tokenizer.

    Finished samples are kept in `directory`, if there is one: a run that was cut short goes on after them.
    """

    def __init__(self, spec: Retrieval, model: ModelConfig, tokenizer: TokenizerSpec, directory: Path | None = None):
        self.spec, self.name, self._tokenizer = spec, spec.name, tokenizer
        self._model, self._directory = model, directory
        self._chunks = {layer.mask for layer in model.layers if isinstance(layer.mask, Chunked)}
        self._scorer = Scorer(model, spec.batch_tokens)

    def run(self, params: Any) -> Iterator[Measurement]:
        samples = {length: -(-self.spec.queries // self.spec.facts) for length in self.spec.lengths}
        cells = [(length, number) for length, count in samples.items() for number in range(count)]
        with Cells(self._directory, self._about(params)) as kept:
            done = sum(kept.get(_cell(*cell)) is not None for cell in cells)
            with ProgressBar(self.name, len(cells), done=done, quiet=not is_main_process()) as bar:
                for length, count in samples.items():
                    yield from self._at_length(params, length, count, kept, bar)

    def _at_length(self, params: Any, length: int, count: int, kept: Cells, bar: ProgressBar) -> Iterator[Measurement]:
        spec = self.spec
        rng = np.random.default_rng([spec.seed, length])
        answers: list[Answer] = []
        rows = rows_per_batch(spec.batch_tokens, length)
        for first in range(0, count, rows):
            numbers = range(first, min(first + rows, count))
            group = [self._sample(rng, length) for _ in numbers]  # drawn one after the other, so also those known
            missing = [number for number in numbers if kept.get(_cell(length, number)) is None]
            if missing:
                for number, own in zip(numbers, self._answers(params, group, length, rows), strict=True):
                    if number in missing:
                        kept.add(_cell(length, number), {"scores": np.ravel(own).tolist()})
            for number in numbers:
                scores = np.reshape(kept.get(_cell(length, number))["scores"], (-1, len(Answer._fields)))
                answers += [Answer(*own) for own in scores]
            if missing:
                so_far = np.mean([one.right for one in answers])
                bar.advance(len(missing), length=f"{length:,}", accuracy=f"{so_far:.3f}")
        cells = defaultdict(list)
        for answer in answers:
            cells[self._depth_bin(answer.depth), bool(answer.straddles)].append(answer)
        for cell in sorted(cells):
            where, own = {"length": length, "depth": cell[0], "straddle": cell[1]}, cells[cell]
            yield Measurement("accuracy", float(np.mean([one.right for one in own])), len(own), where)
            yield Measurement("answer_nll", float(np.mean([one.nll for one in own])), len(own), where)

    def _answers(self, params: Any, group: list[Sample], length: int, rows: int) -> list[list[Answer]]:
        """What the model makes of the questions of each sample."""
        # The last token is only a target, so a context of `length` inputs is a sample of length + 1 tokens.
        batch = batch_of([Document(s.tokens, s.weights) for s in group], length, self._tokenizer.pad_id, rows=rows)
        # Per sample, per question: the places that predict its answer.
        asked = [[np.arange(a, b + 1) - 1 for a, b in zip(s.meta["answer_start"], s.meta["answer_end"])] for s in group]
        flat = [np.concatenate(questions) for questions in asked]
        places = np.zeros((rows, max(map(len, flat))), np.int64)
        for row, own in enumerate(flat):
            places[row, : len(own)] = own
            places[row, len(own) :] = own[-1]
        wanted = np.take_along_axis(np.asarray(batch.targets), places, axis=1)
        best_BQ, nll_BQ = self._scorer.predictions(params, batch, places, wanted)
        found = []
        for row, sample in enumerate(group):
            borders = np.cumsum([len(own) for own in asked[row]])[:-1]
            hits = np.split((best_BQ[row] == wanted[row])[: len(flat[row])], borders)
            losses = np.split(nll_BQ[row][: len(flat[row])], borders)
            found.append(
                [
                    Answer(hit.all(), loss.mean(), sample.meta["depth"][q], self._straddles(sample.meta, q))
                    for q, (hit, loss) in enumerate(zip(hits, losses))
                ]
            )
        return found

    def _about(self, params: Any) -> dict[str, Any]:
        """What decides the answers to a sample beside its length and number."""
        if self._directory is None:
            return {}
        asked = {"task": to_dict(self.spec.task), "facts": self.spec.facts, "seed": self.spec.seed}
        return asked | decided_by(self._model, self._tokenizer, params)

    def _sample(self, rng: np.random.Generator, length: int) -> Sample:
        """One context, its facts spread over all depths where they can be, each in its own part, at random within."""
        facts = self.spec.facts
        depths = tuple((np.arange(facts) + rng.random(facts)) / facts)
        task = self.spec.task_at_end
        return task.sample(rng, length + 1, self._tokenizer, **task.placed(depths))

    def _depth_bin(self, depth: float) -> float:
        bins = self.spec.depth_bins
        return (min(int(depth * bins), bins - 1) + 0.5) / bins

    def _straddles(self, meta: dict, question: int) -> bool:
        start, end = int(meta["fact_start"][question]), int(meta["fact_end"][question])
        return any((start + c.shift) // c.size != (end + c.shift) // c.size for c in self._chunks)


def _cell(length: int, number: int) -> dict[str, int]:
    return {"length": length, "sample": number}
