"""lm-evaluation-harness asks our models: every task of that library on a checkpoint of ours.

    python -m irope_jax.harness RUN --tasks=arc_easy,hellaswag      # the extra `hf` and `pip install lm_eval`

What is asked and how it is scored is that library's (lm_eval 0.4.13); here are the three things it asks of a model:
log-likelihoods of continuations, of whole texts, and text up to a stop string.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from irope_jax.attention.stored import Numbers
from irope_jax.core.config import ConfigError
from irope_jax.core.hosts import is_main_process
from irope_jax.core.progress import ProgressBar
from irope_jax.data.documents import Document
from irope_jax.data.packing import batch_of
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.decode.generate import Generation, Generator
from irope_jax.decode.sampling import Sampling
from irope_jax.decode.text import TextStream
from irope_jax.evals.forward import Scorer, rows_per_batch
from irope_jax.model.config import ModelConfig
from irope_jax.sharding.rules import token_parts

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:  # the message is all that a user needs
    raise ImportError("lm-evaluation-harness is not installed: pip install 'lm_eval>=0.4.9'") from error

MULTIPLE = 128
"""Rows are padded to a multiple of it, so that few shapes are compiled."""

Asked = tuple[Any, list[int], list[int]]
"""A request as `TemplateLM` gives it: what it was, tokens of the context, tokens to score."""


class HarnessModel(TemplateLM):
    """One set of weights as that library's model, on the mesh in force.

    Args:
      model, params, tokenizer: whom it asks.
      max_length: tokens that the model reads at most; longer contexts lose their beginning.
      add_bos: whether bos stands before every text, as models that were trained so need; transformers' class does it
        where the tokenizer does.
      batch_tokens: tokens of one forward pass, about.
      rows: prompts that are continued together.
      max_new_tokens: of an answer, where a task does not say.
      cache: number format of the KV cache.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        tokenizer: TokenizerSpec,
        *,
        max_length: int,
        add_bos: bool = False,
        batch_tokens: int = 8192,
        rows: int = 4,
        max_new_tokens: int = 256,
        cache: Numbers = "bfloat16",
    ):
        super().__init__()
        self._model, self._params, self._ids = model, params, tokenizer
        self._scorer, self.max_length, self._add_bos = Scorer(model), max_length, add_bos
        self._batch_tokens, self._rows, self._most, self._cache = batch_tokens, rows, max_new_tokens, cache

    @property
    def eot_token_id(self) -> int:
        return self._ids.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: bos."""
        return self._ids.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self._ids.encode(string).tolist()
        return (
            [self._ids.bos_id, *ids] if (self._add_bos if add_special_tokens is None else add_special_tokens) else ids
        )

    def _loglikelihood_tokens(self, requests: Sequence[Asked], disable_tqdm: bool = False, **_: Any):
        """`(log-likelihood in nats, whether greedy decoding would say it)` of each request."""
        rows = [self._row(context, wanted) for _, context, wanted in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        sizes = [-(-(len(row) - 1) // MULTIPLE) * MULTIPLE for row, _ in rows]
        quiet = disable_tqdm or not is_main_process()
        with ProgressBar("log-likelihoods", len(rows), quiet=quiet) as bar:
            for size in sorted(set(sizes)):
                here = [i for i, other in enumerate(sizes) if other == size]
                count = rows_per_batch(self._batch_tokens, size)
                for first in range(0, len(here), count):
                    group = here[first : first + count]
                    for i, answer in zip(group, self._scored([rows[i] for i in group], size, count), strict=True):
                        found[i] = answer
                    bar.advance(len(group), length=f"{size:,}")
        return found

    def _row(self, context: list[int], wanted: list[int]) -> tuple[list[int], int]:
        """Tokens of a request, the last `max_length` of them as input, and how many at its end are scored."""
        if not wanted or not context:
            raise ConfigError("request", (context, wanted), "a context and something to score are needed")
        if len(wanted) > self.max_length:
            fix = f"{len(wanted)} tokens to score; raise max_length"
            raise ConfigError("max_length", self.max_length, fix)
        return [*context, *wanted][-(self.max_length + 1) :], len(wanted)

    def _scored(self, group: Sequence[tuple[list[int], int]], size: int, rows: int) -> Iterable[tuple[float, bool]]:
        documents = [Document(np.asarray(row, np.int32), np.zeros(len(row), np.float32)) for row, _ in group]
        nll_BT, right_BT = self._scorer.token_losses(
            self._params, batch_of(documents, size, self._ids.pad_id, rows=rows)
        )
        for b, (row, count) in enumerate(group):
            place = slice(len(row) - 1 - count, len(row) - 1)
            yield -float(nll_BT[b, place].astype(np.float64).sum()), bool(right_BT[b, place].all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, cut into windows as that library cuts them."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self._ids.encode(request.args[0]).tolist()
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for context, wanted in map(make_disjoint_window, cut):
                windows.append((None, list(context), list(wanted)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string, eos, or the most tokens."""
        parts, _ = token_parts()
        rows = -(-self._rows // parts) * parts
        kinds: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(self._how(dict(request.args[1])), []).append(i)
        said = [""] * len(requests)
        with ProgressBar("answers", len(requests), quiet=disable_tqdm or not is_main_process()) as bar:
            for (stops, spec), numbers in kinds.items():
                for first in range(0, len(numbers), rows):
                    group = numbers[first : first + rows]
                    contexts = [requests[i].args[0] for i in group]
                    for i, text in zip(group, self._continued(contexts, stops, spec, rows)):
                        said[i] = text
                    bar.advance(len(group))
        return said

    def _how(self, asked: dict[str, Any]) -> tuple[tuple[str, ...], Generation]:
        """Stop strings, and how to generate."""
        until = asked.get("until") or ()
        stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        most = next((asked[name] for name in names if asked.get(name)), self._most)
        if most >= self.max_length:
            fix = f"leaves no room for a context: {most} new tokens are asked for"
            raise ConfigError("max_length", self.max_length, fix)
        hot = float(asked.get("temperature") or 0.0) if asked.get("do_sample", True) else 0.0
        sampling = Sampling(temperature=hot, top_p=asked.get("top_p"), top_k=asked.get("top_k")) if hot else Sampling()
        return stops, Generation(tokens=most, sampling=sampling, stop_tokens=(self.eot_token_id,), numbers=self._cache)

    def _continued(self, contexts: Sequence[str], stops, spec: Generation, rows: int) -> list[str]:
        prompts = []
        for text in contexts:
            ids = self.tok_encode(text)[-(self.max_length - spec.tokens) :] or [self.prefix_token_id]
            prompts.append(np.asarray(ids, np.int32))
        prompts += [prompts[-1]] * (rows - len(prompts))
        streams = [TextStream(self._ids, stops) for _ in prompts]

        def take(row, new):
            streams[row.prompt].push(new)
            return streams[row.prompt].stopped

        Generator(self._model, self._params, spec).generate(prompts, on_tokens=take)
        for stream in streams:
            stream.finish()
        return [stream.text for stream in streams[: len(contexts)]]
