"""Does long context help? The same targets once more, with everything but the last tokens before them cut off.

A model whose perplexity is no better than this does not use its context, however low the perplexity is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.core.hosts import is_main_process
from irope_jax.core.progress import ProgressBar
from irope_jax.data.documents import Document
from irope_jax.data.pipeline import eval_text
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.evals.evaluator import Measurement
from irope_jax.evals.forward import Scorer, document_losses
from irope_jax.evals.perplexity import check_lengths
from irope_jax.model.config import ModelConfig


@dataclass(frozen=True)
class CroppedPerplexity:
    """Loss of the last targets of long windows, with the whole window and with only the last tokens of it.

    Measures, per length: `nll_full` (nats per token; `length`), and per crop `nll_cropped` and `context_gain`, the
    difference of the two (`length`, `crop`); positive means that what lies further back helps.

    Attributes:
      name: label in the records.
      source: the text; held out from training.
      lengths: window lengths in tokens.
      crops: how many of the last tokens are kept; those not shorter than a length are left out there.
      scored: targets at the end of a window; a crop is longer than that. A target has `crop - scored` tokens of context
        and more.
      windows: how many windows of each length.
      batch_tokens: tokens of one forward pass; longer texts are read in pieces of so many with a KV cache.
    """

    kind: ClassVar[str] = "cropped_perplexity"
    name: str = "cropped_perplexity"
    source: SourceSpec = Corpus("validation")
    lengths: tuple[int, ...] = (4096,)
    crops: tuple[int, ...] = (512,)
    scored: int = 128
    windows: int = 16
    batch_tokens: int = 16_384

    def __post_init__(self):
        check_lengths(self.lengths)
        for field in ("scored", "windows", "batch_tokens"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "must be at least 1")
        if not self.crops or min(self.crops) <= self.scored:
            raise ConfigError("crops", self.crops, f"give at least one, each more than scored={self.scored}")
        if min(self.lengths) <= min(self.crops):
            raise ConfigError("lengths", self.lengths, f"each must exceed a crop; the shortest is {min(self.crops)}")

    def check(self, tokenizer: TokenizerSpec) -> None:
        """Nothing that can be known without reading the text."""

    def build(self, model: ModelConfig, tokenizer: TokenizerSpec) -> CroppedPerplexityEvaluator:
        return CroppedPerplexityEvaluator(self, model, tokenizer)


def whole_windows(name: str, source: SourceSpec, tokenizer: TokenizerSpec, length: int, count: int) -> list[np.ndarray]:
    """`count` windows of `length` predictions, int32 `[length + 1]` each, where `pipeline.eval_text` cuts them.

    Raises:
      ConfigError: naming the field `windows` of evaluation `name`, when the source has fewer.
    """
    try:
        batches = list(eval_text(source, tokenizer, length, count))
    except ConfigError as error:
        if error.field != "count":
            raise
        raise ConfigError(f"config.evals.{name}.windows", count, error.fix) from None
    return [np.append(batch.tokens[0], batch.targets[0, -1]) for batch in batches]


class CroppedPerplexityEvaluator:
    """`CroppedPerplexity` built for one model and tokenizer."""

    def __init__(self, spec: CroppedPerplexity, model: ModelConfig, tokenizer: TokenizerSpec):
        self.spec, self.name, self._pad_id = spec, spec.name, tokenizer.pad_id
        self._scorer = Scorer(model, spec.batch_tokens)
        self._windows = {n: whole_windows(spec.name, spec.source, tokenizer, n, spec.windows) for n in spec.lengths}

    def run(self, params: Any) -> Iterator[Measurement]:
        spec = self.spec
        sizes = {length: [length, *(crop for crop in spec.crops if crop < length)] for length in spec.lengths}
        total = spec.windows * sum(map(len, sizes.values()))
        with ProgressBar(self.name, total, quiet=not is_main_process()) as bar:
            for length, kept in sizes.items():
                count = spec.windows * min(spec.scored, length)
                full = self._mean(params, length, length, bar)
                yield Measurement("nll_full", full, count, {"length": length})
                for crop in kept[1:]:
                    cropped, where = self._mean(params, length, crop, bar), {"length": length, "crop": crop}
                    yield Measurement("nll_cropped", cropped, count, where)
                    yield Measurement("context_gain", cropped - full, count, where)

    def _mean(self, params: Any, length: int, kept: int, bar: ProgressBar) -> float:
        """Loss of the last targets when `kept` tokens are read."""
        rows = [tokens[-kept - 1 :] for tokens in self._windows[length]]
        documents = [Document(row, np.ones(len(row), np.float32)) for row in rows]
        found = []
        for nll in document_losses(self._scorer, params, documents, kept, self._pad_id, self.spec.batch_tokens):
            found.append(nll[-self.spec.scored :])
            bar.advance(1, length=f"{length:,}", read=f"{kept:,}")
        return float(np.mean(np.concatenate(found)))
