"""LongPPL: perplexity over the few tokens that long context decides (arXiv 2410.23771).

A token is a *key token* if a judge predicts it much better with the whole context than with a short one, and well.
The judge is the model itself, or whoever wrote a file of key tokens, so that several models are measured on the same.
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
from irope_jax.data.documents import Document, tokenized
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.evals.cropped_perplexity import whole_windows
from irope_jax.evals.evaluator import Measurement
from irope_jax.evals.forward import Scorer, document_losses
from irope_jax.evals.perplexity import check_lengths
from irope_jax.model.config import ModelConfig


@dataclass(frozen=True)
class OwnKeys:
    """The model measured chooses the key tokens.

    Attributes:
      gain: least fall of the loss from short to whole context, in nats (the paper's alpha).
      loss: most loss with the whole context, in nats (the paper's -beta).
      short: tokens of the short context, at least.
      stride: targets that share one short context; a target has up to `stride - 1` tokens more.
      save: a file to write the key tokens to, for `KeysFrom`; it is replaced at every run.
    """

    gain: float = 2.0
    loss: float = 2.0
    short: int = 4096
    stride: int = 1024
    save: str = ""
    kind: ClassVar[str] = "own"

    def __post_init__(self):
        for field in ("short", "stride"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "must be at least 1")


@dataclass(frozen=True)
class KeysFrom:
    """Key tokens that another model chose and `OwnKeys.save` wrote, for the same windows of the same text.

    Attributes:
      path: the file.
    """

    path: str
    kind: ClassVar[str] = "file"


@dataclass(frozen=True)
class LongPerplexity:
    """Loss of key tokens with the whole context.

    Measures, per length: `long_nll` (nats per key token, count = key tokens; LongPPL is its exponential; nothing where
    there are none) and `key_share` (of the targets that could be one).

    Attributes:
      name: label in the records.
      source: the text; held out from training.
      lengths: window lengths in tokens.
      windows: how many windows of each length.
      keys: who chooses the key tokens.
      batch_tokens: tokens of one forward pass; longer texts are read in pieces of so many with a KV cache.
    """

    kind: ClassVar[str] = "long_perplexity"
    name: str = "long_perplexity"
    source: SourceSpec = Corpus("validation")
    lengths: tuple[int, ...] = (16_384,)
    windows: int = 4
    keys: OwnKeys | KeysFrom = OwnKeys()
    batch_tokens: int = 16_384

    def __post_init__(self):
        check_lengths(self.lengths)
        for field in ("windows", "batch_tokens"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "must be at least 1")
        if isinstance(self.keys, OwnKeys) and min(self.lengths) <= self.keys.short:
            raise ConfigError("lengths", self.lengths, f"each must exceed keys.short={self.keys.short}")

    def check(self, tokenizer: TokenizerSpec) -> None:
        """Nothing that can be known without reading the text."""

    def build(self, model: ModelConfig, tokenizer: TokenizerSpec) -> LongPerplexityEvaluator:
        return LongPerplexityEvaluator(self, model, tokenizer)


class LongPerplexityEvaluator:
    """`LongPerplexity` built for one model and tokenizer."""

    def __init__(self, spec: LongPerplexity, model: ModelConfig, tokenizer: TokenizerSpec):
        self.spec, self.name, self._pad_id = spec, spec.name, tokenizer.pad_id
        self._scorer = Scorer(model, spec.batch_tokens)
        self._windows = {n: whole_windows(spec.name, spec.source, tokenizer, n, spec.windows) for n in spec.lengths}
        self._text = tokenized(spec.source, tokenizer).fingerprint
        self._given = self._read(spec.keys.path) if isinstance(spec.keys, KeysFrom) else None

    def run(self, params: Any) -> Iterator[Measurement]:
        chosen, spec = {}, self.spec
        with ProgressBar(self.name, spec.windows * len(spec.lengths), quiet=not is_main_process()) as bar:
            for length, windows in self._windows.items():
                keys, candidates, total, count = [], 0, 0.0, 0
                for number, tokens in enumerate(windows):
                    full = self._losses(params, [tokens], length)[0]
                    if self._given is None:
                        found, possible = self._choose(params, tokens, full, length)
                    else:
                        found, possible = self._given[str(length)]["keys"][number], self._given[str(length)]["possible"]
                    keys.append(found)
                    candidates, total, count = candidates + possible, total + full[found].sum(), count + len(found)
                    bar.advance(1, length=f"{length:,}", key_tokens=f"{count:,}")
                chosen[str(length)] = {"keys": keys, "possible": candidates // len(windows)}
                if count:
                    yield Measurement("long_nll", float(total / count), count, {"length": length})
                yield Measurement("key_share", count / candidates, candidates, {"length": length})
        if isinstance(spec.keys, OwnKeys) and spec.keys.save and is_main_process():
            Path(spec.keys.save).write_text(json.dumps({"text": self._text, "lengths": chosen}) + "\n")

    def _choose(self, params: Any, tokens: np.ndarray, full: np.ndarray, length: int) -> tuple[list[int], int]:
        """Target indices of key tokens (target t is token t + 1), and how many targets could be one."""
        keys = self.spec.keys
        begins = range(keys.short, length, keys.stride)
        pieces = [tokens[begin - keys.short : min(length, begin + keys.stride) + 1] for begin in begins]
        short = np.full(length, -np.inf)
        for begin, nll in zip(begins, self._losses(params, pieces, keys.short + keys.stride), strict=True):
            short[begin : begin + keys.stride] = nll[keys.short :]
        is_key = (short - full > keys.gain) & (full < keys.loss)
        return np.flatnonzero(is_key).tolist(), length - keys.short

    def _losses(self, params: Any, rows: list[np.ndarray], width: int) -> list[np.ndarray]:
        documents = [Document(row, np.ones(len(row), np.float32)) for row in rows]
        return list(document_losses(self._scorer, params, documents, width, self._pad_id, self.spec.batch_tokens))

    def _read(self, path: str) -> dict[str, Any]:
        field = f"config.evals.{self.name}.keys.path"
        try:
            saved = json.loads(Path(path).expanduser().read_text())
            text, lengths = saved["text"], saved["lengths"]
        except OSError as error:
            raise ConfigError(field, path, f"cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError):
            raise ConfigError(field, path, "is not a file that keys.save wrote") from None
        missing = [n for n in self.spec.lengths if len(lengths.get(str(n), {}).get("keys", ())) < self.spec.windows]
        if text != self._text or missing:
            fix = (
                "was made from another text or tokenizer" if text != self._text else f"has too few windows of {missing}"
            )
            raise ConfigError(field, path, f"{fix}; write it anew with keys.save")
        return lengths
