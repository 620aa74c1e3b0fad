"""Can a model that knows language find a number that it was told in words? By context length and by depth.

Needs no tokens of its own, so that it can be asked of any pretrained model; `retrieval` speaks in symbols that a model
was trained on. The words are `data.text_needle`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.core.hosts import is_main_process
from irope_jax.core.progress import ProgressBar
from irope_jax.data.documents import Document
from irope_jax.data.haystacks import TextHaystack
from irope_jax.data.packing import batch_of
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.text_needle import text_needle
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.evals.evaluator import Measurement
from irope_jax.evals.forward import Scorer, rows_per_batch
from irope_jax.evals.perplexity import check_lengths
from irope_jax.model.config import ModelConfig


@dataclass(frozen=True)
class Passkey:
    """One number of seven digits in a text, asked for at its end.

    Measures, per length and depth: `accuracy` (each token of the right answer is the most likely one after those before
    it) and `answer_nll` (nats per answer token).

    Attributes:
      name: label in the records.
      source: the text around it; held out from training.
      lengths: context lengths in tokens.
      samples: texts of each length, spread evenly over the depths.
      depth_bins: depths are reported in this many equal bins.
      seed: of the samples.
      batch_tokens: tokens of one forward pass; longer texts are read in pieces of so many with a KV cache.
    """

    kind: ClassVar[str] = "passkey"
    name: str = "passkey"
    source: SourceSpec = Corpus("validation")
    lengths: tuple[int, ...] = (1024,)
    samples: int = 32
    depth_bins: int = 8
    seed: int = 1
    batch_tokens: int = 16_384

    def __post_init__(self):
        check_lengths(self.lengths)
        for field in ("samples", "depth_bins", "batch_tokens"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "must be at least 1")

    def check(self, tokenizer: TokenizerSpec) -> None:
        """Nothing that can be known without encoding text."""

    def build(self, model: ModelConfig, tokenizer: TokenizerSpec) -> PasskeyEvaluator:
        return PasskeyEvaluator(self, model, tokenizer)


class PasskeyEvaluator:
    """`Passkey` built for one model and tokenizer."""

    def __init__(self, spec: Passkey, model: ModelConfig, tokenizer: TokenizerSpec):
        self.spec, self.name, self._tokenizer = spec, spec.name, tokenizer
        self._haystack, self._scorer = TextHaystack(spec.source), Scorer(model, spec.batch_tokens)
        self._sample(np.random.default_rng(0), min(spec.lengths), 0.0)  # too short is said before a run

    def run(self, params: Any) -> Iterator[Measurement]:
        spec = self.spec
        with ProgressBar(self.name, spec.samples * len(spec.lengths), quiet=not is_main_process()) as bar:
            for length in spec.lengths:
                yield from self._at_length(params, length, bar)

    def _at_length(self, params: Any, length: int, bar: ProgressBar) -> Iterator[Measurement]:
        spec, rng = self.spec, np.random.default_rng([self.spec.seed, length])
        depths = (np.arange(spec.samples) + rng.random(spec.samples)) / spec.samples
        right, nll = defaultdict(list), defaultdict(list)
        rows = rows_per_batch(spec.batch_tokens, length)
        for first in range(0, spec.samples, rows):
            here = depths[first : first + rows]
            group = [self._sample(rng, length, depth) for depth in here]
            # The last token is only a target, so a context of `length` inputs is a document of length + 1 tokens.
            batch = batch_of(group, length, self._tokenizer.pad_id, rows=rows)
            answers = [int((document.weights > 0).sum()) for document in group]
            places = np.full((rows, max(answers)), length - 1)
            for row, count in enumerate(answers):
                places[row, :count] = np.arange(length - count, length)  # a shorter answer ends with its last token
            wanted = np.take_along_axis(np.asarray(batch.targets), places, axis=1)
            best_BQ, nll_BQ = self._scorer.predictions(params, batch, places, wanted)
            for row, count in enumerate(answers):
                bin = min(int(here[row] * spec.depth_bins), spec.depth_bins - 1)
                right[bin].append(bool((best_BQ[row, :count] == wanted[row, :count]).all()))
                nll[bin].append(float(nll_BQ[row, :count].mean()))
            bar.advance(len(group), length=f"{length:,}")
        for bin in sorted(right):
            where = {"length": length, "depth": (bin + 0.5) / spec.depth_bins}
            yield Measurement("accuracy", float(np.mean(right[bin])), len(right[bin]), where)
            yield Measurement("answer_nll", float(np.mean(nll[bin])), len(nll[bin]), where)

    def _sample(self, rng: np.random.Generator, length: int, depth: float) -> Document:
        haystack = self._haystack.fill(rng, length, self._tokenizer)
        return text_needle(rng, haystack, length + 1, self._tokenizer, depth)
