"""What a text of some length costs: time to read it, time of each token that follows, memory. Nothing is scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import numpy as np

from irope_jax.attention.stored import Numbers
from irope_jax.core.config import ConfigError
from irope_jax.core.hosts import is_main_process
from irope_jax.core.numerics import tree_bytes
from irope_jax.core.peak import PeakMemory
from irope_jax.core.progress import ProgressBar
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.decode.prefill import piece_step, prefill
from irope_jax.evals.evaluator import Measurement
from irope_jax.evals.perplexity import check_lengths
from irope_jax.model.cache import CacheSpec, KVCache, fitting_capacity, new_cache
from irope_jax.model.config import LayerSpec, ModelConfig
from irope_jax.model.cost import abstract_params
from irope_jax.model.decodable import check_decodable
from irope_jax.model.decoder import restack
from irope_jax.sharding.rules import token_parts, tree_shardings


@dataclass(frozen=True)
class Cost:
    """Reading texts of random tokens and going on from them, by length.

    Measures, per length, medians over `repeats` without compilation: `prefill_seconds` of the whole text and
    `token_seconds` of one token after it; and `cache_bytes`, `peak_bytes` (`core.peak`: beyond what was held before).

    Attributes:
      name: label in the records; evaluations of other `pattern`s stand beside each other in reports.
      lengths: tokens of a text, from short to long.
      pattern: layers to measure instead of the model's, of the same parameters. None: the model's.
      tokens: that follow, one by one.
      repeats: texts at each length.
      piece: tokens that are read at a time.
      numbers: format of the KV cache.
    """

    kind: ClassVar[str] = "cost"
    name: str = "cost"
    lengths: tuple[int, ...] = (8192,)
    pattern: tuple[LayerSpec, ...] | None = None
    tokens: int = 16
    repeats: int = 1
    piece: int = 4096
    numbers: Numbers = "bfloat16"

    def __post_init__(self):
        check_lengths(self.lengths)
        if list(self.lengths) != sorted(set(self.lengths)):
            raise ConfigError("lengths", self.lengths, "give them from short to long, each once: peaks are remembered")
        for field in ("tokens", "repeats", "piece"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "must be at least 1")

    def check(self, tokenizer: TokenizerSpec) -> None:
        """Texts are random tokens."""

    def build(self, model: ModelConfig, tokenizer: TokenizerSpec) -> CostEvaluator:
        return CostEvaluator(self, model)


class CostEvaluator:
    """`Cost` built for one model.

    Raises:
      ConfigError: a model that cannot be decoded.
    """

    def __init__(self, spec: Cost, model: ModelConfig):
        self.spec, self.name, self._given = spec, spec.name, model
        self._model = model if spec.pattern is None else replace(model, pattern=spec.pattern)
        check_decodable(self._model)

    def run(self, params: Any) -> Iterator[Measurement]:
        spec, rng = self.spec, np.random.default_rng(0)
        params = self._restacked(params)
        with ProgressBar(self.name, sum(spec.lengths), quiet=not is_main_process()) as bar:
            for length in spec.lengths:
                text = rng.integers(0, self._model.vocab_size, length).astype(np.int32)
                yield from self._at_length(params, text, lambda done, n=length: bar.advance(done, length=f"{n:,}"))

    def _at_length(self, params: Any, text: np.ndarray, progress: Callable[[int], None]) -> Iterator[Measurement]:
        spec, step, where = self.spec, piece_step(self._model), {"length": len(text)}
        one = (np.zeros((1, 1), np.int32), np.ones((1, 1), bool))
        watch = PeakMemory()
        # Compiles both programs, and leaves a cache of this size in them.
        cache, logits = prefill(self._model, params, self._cache(len(text)), [text[: spec.piece]], size=spec.piece)
        jax.block_until_ready(step(params, cache, logits, *one))
        reading, following = [], []
        for number in range(spec.repeats):
            cache = self._cache(len(text))
            began = time.perf_counter()
            cache, logits = prefill(
                self._model, params, cache, [text], size=spec.piece, progress=progress if number == 0 else _silent
            )
            reading.append(time.perf_counter() - began)
            for _ in range(spec.tokens):
                began = time.perf_counter()
                cache, logits = step(params, cache, logits, *one)
                jax.block_until_ready(logits)
                following.append(time.perf_counter() - began)
        yield Measurement("prefill_seconds", float(np.median(reading)), len(reading), where)
        yield Measurement("token_seconds", float(np.median(following)), len(following), where)
        yield Measurement("cache_bytes", float(tree_bytes(cache)), 1, where)
        if (peak := watch.bytes_since()) is not None:
            yield Measurement("peak_bytes", float(peak), 1, where)

    def _cache(self, length: int) -> KVCache:
        capacity = fitting_capacity(length + self.spec.tokens, token_parts()[1])
        return new_cache(self._model, CacheSpec(1, capacity, self.spec.numbers))

    def _restacked(self, params: Any) -> Any:
        """Parameters as the model of `pattern` has them."""
        if len(self._given.period) == len(self._model.period):
            return params
        move = lambda p: restack(p, self._given, self._model)
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            return jax.jit(move)(params)
        return jax.jit(move, out_shardings=tree_shardings(abstract_params(self._model), mesh))(params)


def _silent(tokens: int) -> None:
    """No progress to report."""
