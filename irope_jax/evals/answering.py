"""Who answers: what an evaluation that needs generated text asks, by decoding, or by forward passes without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from irope_jax.attention.stored import Numbers
from irope_jax.data.documents import Document
from irope_jax.data.packing import batch_of
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.decode.generate import Generation, Generator
from irope_jax.evals.forward import Scorer
from irope_jax.model.config import ModelConfig
from irope_jax.sharding.rules import token_parts


class Answerer(Protocol):
    """Continues prompts with one set of weights."""

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int]) -> list[list[int]]:
        """New tokens of each prompt, at most `max_new_tokens`, ended by any of the `stop` ids (which may be included).

        Args:
          prompts: token ids, bos first; their lengths differ.
          max_new_tokens: most tokens of an answer.
          stop: ids that end one.
        """
        ...


@dataclass(frozen=True)
class Answering:
    """A way to answer, for any weights of one model.

    Attributes:
      of: weights to the one who answers with them.
      name: says how (greedy, which cache); results of another name are kept apart.
    """

    of: Callable[[Any], Answerer]
    name: str


def by_decoding(model: ModelConfig, numbers: Numbers = "bfloat16", piece: int = 2048) -> Answering:
    """Greedy, with a KV cache.

    Args:
      model: whose weights will come.
      numbers: format of the cache.
      piece: tokens of a prompt that are read at a time.
    """
    return Answering(lambda params: _ByDecoding(model, params, numbers, piece), f"greedy, {numbers} cache")


class _ByDecoding:
    def __init__(self, model: ModelConfig, params: Any, numbers: Numbers, piece: int):
        self._model, self._params, self._numbers, self._piece = model, params, numbers, piece

    def answer(self, prompts, max_new_tokens, stop):
        parts, _ = token_parts()  # of the mesh in force, that a batch is cut into
        rows = [np.asarray(prompt, np.int32) for prompt in prompts]
        rows += [rows[-1]] * (-len(rows) % parts)
        spec = Generation(
            tokens=max_new_tokens, stop_tokens=tuple(stop), numbers=self._numbers, piece=min(self._piece, len(rows[0]))
        )
        return [row.tokens for row in Generator(self._model, self._params, spec).generate(rows)[: len(prompts)]]


def by_forward(model: ModelConfig, tokenizer: TokenizerSpec, multiple: int = 256) -> Answering:
    """Greedy, by a whole forward pass for each token: right for any model, and as slow as that.

    Args:
      model: whose weights will come.
      tokenizer: has the padding.
      multiple: rows are padded to a multiple of it, so that few shapes are compiled.
    """
    return Answering(lambda params: _ByForward(Scorer(model), params, tokenizer.pad_id, multiple), "greedy, no cache")


class _ByForward:
    def __init__(self, scorer: Scorer, params: Any, pad_id: int, multiple: int):
        self._scorer, self._params, self._pad_id, self._multiple = scorer, params, pad_id, multiple

    def answer(self, prompts, max_new_tokens, stop):
        rows = [list(map(int, prompt)) for prompt in prompts]
        begins, open_rows = [len(row) for row in rows], set(range(len(rows)))
        width = -(-(max(begins) + max_new_tokens) // self._multiple) * self._multiple
        parts, _ = token_parts()  # of the mesh in force, that a batch is cut into
        for _ in range(max_new_tokens):
            # A document's last token is a target only, so one more stands behind what is read.
            read = [np.asarray([*row, self._pad_id], np.int32) for row in rows]
            documents = [Document(r, np.zeros(len(r), np.float32)) for r in read]
            batch = batch_of(documents, width, self._pad_id, rows=-(-len(rows) // parts) * parts)
            places = np.zeros((len(batch.tokens), 1), np.int64)
            places[: len(rows), 0] = [len(row) - 1 for row in rows]
            best, _ = self._scorer.predictions(self._params, batch, places, np.zeros_like(places))
            for row in sorted(open_rows):
                rows[row].append(int(best[row, 0]))
                if rows[row][-1] in stop:
                    open_rows.remove(row)
            if not open_rows:
                break
        return [row[begin:] for row, begin in zip(rows, begins, strict=True)]
