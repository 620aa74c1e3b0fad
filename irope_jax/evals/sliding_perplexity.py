"""Perplexity with a sliding window (Baevski and Auli; Press et al., arXiv 2108.12409): nearly full context for all.

Where `perplexity` starts each window anew, here windows overlap: a target has at least `length - stride` tokens of
context. It is what papers on length extension report, with a stride of 256.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.core.hosts import is_main_process
from irope_jax.core.progress import ProgressBar
from irope_jax.data.documents import Document, tokenized
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.evals.evaluator import Measurement
from irope_jax.evals.forward import Scorer, document_losses
from irope_jax.evals.perplexity import check_lengths
from irope_jax.model.config import ModelConfig


@dataclass(frozen=True)
class SlidingPerplexity:
    """Mean loss over the first tokens of a source, each predicted once, from windows that move by a stride.

    Measures `nll_sliding` (nats per token, over all tokens alike; `where`: `length`, `stride`). The first window of a
    document scores all its targets, later ones the last `stride`.

    Attributes:
      name: label in the records.
      source: the text; held out from training.
      lengths: window lengths in tokens.
      stride: tokens a window moves by; lengths shorter than it move by themselves.
      tokens: how many targets to score, from the beginnings of as many documents as it takes.
      batch_tokens: tokens of one forward pass; longer texts are read in pieces of so many with a KV cache.
    """

    kind: ClassVar[str] = "sliding_perplexity"
    name: str = "sliding_perplexity"
    source: SourceSpec = Corpus("validation")
    lengths: tuple[int, ...] = (1024,)
    stride: int = 256
    tokens: int = 16_384
    batch_tokens: int = 16_384

    def __post_init__(self):
        check_lengths(self.lengths)
        for field in ("stride", "tokens", "batch_tokens"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "must be at least 1")

    def check(self, tokenizer: TokenizerSpec) -> None:
        """Nothing that can be known without reading the text."""

    def build(self, model: ModelConfig, tokenizer: TokenizerSpec) -> SlidingPerplexityEvaluator:
        return SlidingPerplexityEvaluator(self, model, tokenizer)


def sliding_windows(targets: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """`(begin, first, end)` of every window over a document: it reads tokens `begin … end`, scores `first … end`.

    Token 0 is never scored; each of tokens 1 … targets is, exactly once.
    """
    found, done = [], 0
    while done < targets:
        end = min(targets, length if not found else done + stride)
        found.append((max(0, end - length), done + 1, end))
        done = end
    return found


class SlidingPerplexityEvaluator:
    """`SlidingPerplexity` built for one model and tokenizer."""

    def __init__(self, spec: SlidingPerplexity, model: ModelConfig, tokenizer: TokenizerSpec):
        self.spec, self.name, self._tokenizer = spec, spec.name, tokenizer
        self._scorer = Scorer(model, spec.batch_tokens)
        there = int(tokenized(spec.source, tokenizer).targets.sum())
        if there < spec.tokens:
            fix = f"the source has {there}; lower it"
            raise ConfigError(f"config.evals.{spec.name}.tokens", spec.tokens, fix)

    def _windows(self, length: int) -> Iterator[Document]:
        store, left = tokenized(self.spec.source, self._tokenizer), self.spec.tokens
        for number in range(len(store)):
            if left == 0:
                return
            targets = min(left, int(store.targets[number]))
            left -= targets
            tokens = store[number]
            for begin, first, end in sliding_windows(targets, length, min(length, self.spec.stride)):
                weights = np.zeros(end + 1 - begin, np.float32)
                weights[first - begin :] = 1
                yield Document(tokens[begin : end + 1], weights)

    def run(self, params: Any) -> Iterator[Measurement]:
        spec = self.spec
        with ProgressBar(self.name, spec.tokens * len(spec.lengths), quiet=not is_main_process()) as bar:
            for length in spec.lengths:
                windows, total, count = list(self._windows(length)), 0.0, 0
                losses = document_losses(
                    self._scorer, params, windows, length, self._tokenizer.pad_id, spec.batch_tokens
                )
                for window, nll in zip(windows, losses, strict=True):
                    scored = window.weights[1:] > 0
                    total, count = total + nll[scored].sum(), count + int(scored.sum())
                    bar.advance(int(scored.sum()), length=f"{length:,}", nll=f"{total / count:.3f}")
                where = {"length": length, "stride": min(length, spec.stride)}
                yield Measurement("nll_sliding", float(total / count), count, where)
