"""How well text is predicted, by context length and by position: the honest curve of an extrapolating model.

Windows do not overlap and each starts a document, so a token at position p has exactly p tokens of context. A model
that uses its context has a curve that does not rise. Perplexity is no evidence of retrieval: read it beside
`retrieval`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.data.pipeline import eval_text
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.evals.evaluator import Measurement
from irope_jax.evals.forward import Scorer, rows_per_batch
from irope_jax.model.config import ModelConfig


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood in nats per token (perplexity is its exponential).

    Measures `nll_by_length` (`where`: `length`) and `nll_by_position` (`length`, and positions `from` … `to - 1` in
    buckets) at each length.

    Attributes:
      name: label in the records.
      source: the text; held out from training.
      lengths: window lengths in tokens.
      tokens: how many tokens to score at each length, at least one window.
      batch_tokens: tokens of one forward pass; longer texts are read in pieces of so many with a KV cache.
      bucket: width of the position buckets; None lets them double: 1, 1, 2, 4, 8 …
    """

    kind: ClassVar[str] = "perplexity"
    name: str = "perplexity"
    source: SourceSpec = Corpus("validation")
    lengths: tuple[int, ...] = (1024,)
    tokens: int = 65_536
    batch_tokens: int = 16_384
    bucket: int | None = None

    def __post_init__(self):
        check_lengths(self.lengths)
        for field in ("tokens", "batch_tokens"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "must be at least 1")
        if self.bucket is not None and self.bucket < 1:
            raise ConfigError("bucket", self.bucket, "positions of a bucket; use 1 or more, or None")

    def check(self, tokenizer: TokenizerSpec) -> None:
        """Nothing that can be known without reading the text."""

    def windows(self, length: int) -> int:
        """How many windows of a length to score."""
        return max(1, self.tokens // length)

    def build(self, model: ModelConfig, tokenizer: TokenizerSpec) -> PerplexityEvaluator:
        return PerplexityEvaluator(self, model, tokenizer)


def check_lengths(lengths: tuple[int, ...]) -> None:
    if not lengths or min(lengths) < 2:
        raise ConfigError("lengths", lengths, "give at least one length, each of 2 tokens or more")


def position_buckets(length: int, width: int | None = None) -> list[tuple[int, int]]:
    """`[0, 1), [1, 2), [2, 4), [4, 8) …` or, given a width, `[0, width), [width, 2 width) …`, cut off at `length`."""
    if width is None:
        edges = [0, *(2**k for k in range(length.bit_length()) if 2**k < length), length]
    else:
        edges = [*range(0, length, width), length]
    return list(itertools.pairwise(edges))


class PerplexityEvaluator:
    """`Perplexity` built for one model and tokenizer."""

    def __init__(self, spec: Perplexity, model: ModelConfig, tokenizer: TokenizerSpec):
        self.spec, self.name, self._tokenizer = spec, spec.name, tokenizer
        self._scorer = Scorer(model, spec.batch_tokens)
        for length in spec.lengths:  # too little text is said before a run, not in the middle of it
            try:
                eval_text(spec.source, tokenizer, length, spec.windows(length))
            except ConfigError as error:
                if error.field != "count":
                    raise
                raise ConfigError(f"config.evals.{spec.name}.tokens", spec.tokens, error.fix) from None

    def run(self, params: Any) -> Iterator[Measurement]:
        for length in self.spec.lengths:
            windows, rows = self.spec.windows(length), rows_per_batch(self.spec.batch_tokens, length)
            total_T, count_T = np.zeros(length), np.zeros(length, np.int64)
            for batch in eval_text(self.spec.source, self._tokenizer, length, windows, batch_size=rows):
                nll_BT, _ = self._scorer.token_losses(params, batch)
                real_BT = np.asarray(batch.weights) > 0
                total_T += np.where(real_BT, nll_BT, 0.0).sum(axis=0, dtype=np.float64)
                count_T += real_BT.sum(axis=0)
            count = int(count_T.sum())
            yield Measurement("nll_by_length", float(total_T.sum() / count), count, {"length": length})
            for low, high in position_buckets(length, self.spec.bucket):
                here = int(count_T[low:high].sum())
                value = float(total_T[low:high].sum() / here)
                yield Measurement("nll_by_position", value, here, {"length": length, "from": low, "to": high})
