"""Generation: prompts are read, then tokens are chosen one after the other, for all rows of a batch at once.

The device decodes several tokens between two looks of the host (`Generation.steps`), which then streams them, sees stop
strings and ends rows. With `guesses` it decodes by checking guesses instead (`lookup`). Text is `text`'s business.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from irope_jax.attention.stored import Numbers
from irope_jax.core.config import ConfigError
from irope_jax.core.hosts import to_host
from irope_jax.core.numerics import tree_bytes
from irope_jax.decode.lookup import Lookup
from irope_jax.decode.prefill import prefill
from irope_jax.decode.sampling import Sampling, choose
from irope_jax.decode.stepping import stepping
from irope_jax.model.cache import CacheSpec, KVCache, fitting_capacity, fork, new_cache
from irope_jax.model.config import ModelConfig
from irope_jax.model.decodable import check_length
from irope_jax.model.decoder import cached_hidden_states
from irope_jax.sharding.rules import token_parts

NOTHING = -1
"""In place of a token, once a row has ended."""


@dataclass(frozen=True)
class Generation:
    """How much is generated, and how.

    Attributes:
      tokens: most new tokens of a row.
      sampling: how each is chosen.
      stop_tokens: ids that end a row; they are not part of it.
      samples: rows that go on from each prompt, whose cache they share.
      numbers: format of keys and values.
      piece: tokens of a prompt that are read at a time.
      steps: tokens between two looks of the host.
      guesses: tokens that are guessed from earlier text and checked at once; 0 decodes one by one. Greedy only, and
        gives what greedy gives up to rounding.
      offload: keys and values of layers that see everything lie in the memory of the host (`CacheSpec.offload`).
    """

    tokens: int = 256
    sampling: Sampling = Sampling()
    stop_tokens: tuple[int, ...] = ()
    samples: int = 1
    numbers: Numbers = "bfloat16"
    piece: int = 2048
    steps: int = 16
    guesses: int = 0
    offload: bool = False

    def __post_init__(self):
        for name in ("tokens", "samples", "piece", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        if self.guesses < 0:
            raise ConfigError("guesses", self.guesses, "tokens to guess; 0 guesses none")
        if self.guesses and not self.sampling.greedy:
            raise ConfigError(
                "guesses", self.guesses, "guesses are checked against the greedy choice; set temperature 0"
            )


@dataclass
class Row:
    """What was generated for one row.

    Attributes:
      prompt: number of its prompt.
      sample: which of the samples of the prompt.
      tokens: new ids, without the stop token.
      ended: `stop` by a stop token, `caller` because the callback said so, `length`; empty while it goes on.
    """

    prompt: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    ended: Literal["", "stop", "caller", "length"] = ""


@dataclass(frozen=True)
class Speed:
    """What a generator has done so far, and its time on the host's clock, compilation included.

    Attributes:
      read: tokens of prompts.
      made: new tokens of all rows.
      steps: forward passes that made them.
      cache_bytes: of the caches of the last batch, prefixes included, over all devices.
    """

    read: int = 0
    read_seconds: float = 0.0
    made: int = 0
    made_seconds: float = 0.0
    steps: int = 0
    cache_bytes: int = 0

    def plus(self, **more: float) -> Speed:
        return replace(self, **{name: getattr(self, name) + value for name, value in more.items()})


@dataclass(frozen=True)
class Prefix:
    """Prompts that were read: a cache that others go on from, their tokens, and the logits of what follows."""

    cache: KVCache
    rows: tuple[np.ndarray, ...]
    logits_BV: jax.Array


OnTokens = Callable[[Row, Sequence[int]], bool | None]
"""Called with new tokens of a row as they come; True ends the row."""


class Generator:
    """Generates with one model on the mesh in force. What is compiled is shared by all generators of the model.

    Attributes:
      speed: of all calls of `read` and `generate`.
    """

    def __init__(self, model: ModelConfig, params: Any, spec: Generation = Generation()):
        self.model, self.params, self.spec = model, params, spec
        self.speed = Speed()

    def read(
        self, prompts: Sequence[np.ndarray], *, room: int = 0, progress: Callable[[int], None] = lambda tokens: None
    ) -> Prefix:
        """Prompts into a cache with `room` for so many more tokens.

        Raises:
          ConfigError: an empty prompt, a model that cannot be decoded, or a batch that the mesh does not divide.
        """
        rows = [np.asarray(prompt, np.int32) for prompt in prompts]
        for number, row in enumerate(rows):
            if not len(row):
                raise ConfigError(
                    f"prompt {number}", "", "is empty, so nothing says how to go on; begin with one token"
                )
        self._check_batch(len(rows))
        cache = new_cache(self.model, self._cache_spec(len(rows), max(map(len, rows)) + room))
        began = time.perf_counter()
        cache, logits_BV = prefill(self.model, self.params, cache, rows, size=self.spec.piece, progress=progress)
        self.speed = self.speed.plus(read=sum(map(len, rows)), read_seconds=time.perf_counter() - began)
        return Prefix(cache, tuple(rows), logits_BV)

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        *,
        prefix: Prefix | None = None,
        on_tokens: OnTokens | None = None,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[Row]:
        """Rows, `samples` for each prompt, in order of prompts.

        Args:
          prompts: token ids of each.
          prefix: text before all prompts that `read` has read, which is shared and not read again: of one row, or of
            as many as divide the prompts. Prompts may then be empty.
          on_tokens: sees tokens as they come.
          progress: called with numbers of prompt tokens as they are read.
        """
        spec, samples = self.spec, self.spec.samples
        if prefix is None and samples == 1:
            start = self.read(prompts, room=spec.tokens + spec.guesses, progress=progress)
            return self._go_on(start.cache, start.logits_BV, start.rows, on_tokens)
        if prefix is None or samples > 1:
            prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
            if prefix is None:
                prefix = self.read(prompts, progress=progress)
            else:
                prefix = self._read_on(prefix, prompts, 0, progress)
            prompts = [np.zeros(0, np.int32)] * (len(prompts) * samples)
        start = self._read_on(prefix, prompts, spec.tokens + spec.guesses, progress)
        return self._go_on(start.cache, start.logits_BV, start.rows, on_tokens)

    def _read_on(self, prefix: Prefix, prompts: Sequence[np.ndarray], room: int, progress) -> Prefix:
        """Prompts read after a prefix, into a cache of their own."""
        rows = [np.asarray(prompt, np.int32) for prompt in prompts]
        self._check_batch(len(rows))
        spec = self._cache_spec(len(rows), max(map(len, rows)) + room, after=max(map(len, prefix.rows)))
        cache, each = fork(self.model, prefix.cache, spec), len(rows) // len(prefix.rows)
        logits_BV = jnp.repeat(prefix.logits_BV, each, axis=0)
        began = time.perf_counter()
        if any(map(len, rows)):
            cache, logits_BV = prefill(
                self.model, self.params, cache, rows, size=self.spec.piece, logits_BV=logits_BV, progress=progress
            )
            self.speed = self.speed.plus(read=sum(map(len, rows)), read_seconds=time.perf_counter() - began)
        whole = [np.concatenate([prefix.rows[b // each], row]) for b, row in enumerate(rows)]
        return Prefix(cache, tuple(whole), logits_BV)

    def _cache_spec(self, batch: int, tokens: int, after: int = 0) -> CacheSpec:
        check_length(self.model, tokens + after)
        capacity = fitting_capacity(tokens, token_parts()[1])
        return CacheSpec(batch, capacity, self.spec.numbers, slack=self.spec.guesses, offload=self.spec.offload)

    @staticmethod
    def _check_batch(rows: int) -> None:
        parts, _ = token_parts()
        if rows % parts:
            fix = f"cut a batch into {parts} parts; give a multiple of {parts} prompts, or set mesh.context or tensor"
            raise ConfigError("mesh.data x fsdp x expert", parts, f"{rows} rows do not divide: {fix}")

    def _go_on(self, cache: KVCache, logits_BV, prompts, on_tokens: OnTokens | None) -> list[Row]:
        spec, count = self.spec, len(prompts)
        rows = [Row(b // spec.samples, b % spec.samples) for b in range(count)]
        began = time.perf_counter()
        self.speed = replace(self.speed, cache_bytes=tree_bytes(cache))
        samples_B = np.asarray([row.sample for row in rows], np.int32)
        first_B = to_host(_first(spec.sampling)(logits_BV, samples_B, cache.lengths))
        done_B = self._take(rows, first_B[:, None], on_tokens)
        steps = (self._guess if spec.guesses else self._one_by_one)(cache, prompts, rows, samples_B, done_B, on_tokens)
        made = sum(len(row.tokens) for row in rows)
        self.speed = self.speed.plus(made=made, made_seconds=time.perf_counter() - began, steps=steps)
        return rows

    def _take(self, rows: list[Row], new_Bn: np.ndarray, on_tokens: OnTokens | None) -> np.ndarray:
        """New tokens to their rows; bool `[B]`, which have ended."""
        for row, new in zip(rows, new_Bn.tolist(), strict=True):
            if row.ended:
                continue
            taken = []
            for token in new:
                if token == NOTHING:
                    break
                if token in self.spec.stop_tokens:
                    row.ended = "stop"
                    break
                taken.append(token)
                if len(row.tokens) + len(taken) == self.spec.tokens:
                    row.ended = "length"
                    break
            row.tokens += taken
            if on_tokens is not None and taken and on_tokens(row, taken):
                row.ended = "caller"
        return np.asarray([bool(row.ended) for row in rows])

    def _one_by_one(self, cache, prompts, rows, samples_B, done_B, on_tokens) -> int:
        step, steps = several_steps(self.model, self.spec.sampling, self.spec.stop_tokens, self.spec.steps), 0
        while not done_B.all():
            last_B = np.asarray([row.tokens[-1] if row.tokens else 0 for row in rows], np.int32)
            left_B = np.asarray([self.spec.tokens - len(row.tokens) for row in rows], np.int32)
            cache, new_Bn, taken = step(self.params, cache, last_B, done_B, left_B, samples_B)
            steps += int(taken)
            done_B = self._take(rows, to_host(new_Bn), on_tokens)
        return steps

    def _guess(self, cache, prompts, rows, samples_B, done_B, on_tokens) -> int:
        step, steps, width = _check_guesses(self.model), 0, self.spec.guesses + 1
        texts = [Lookup(np.concatenate([prompt, row.tokens])) for prompt, row in zip(prompts, rows)]
        while not done_B.all():
            tokens, real = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
            for b, row in enumerate(rows):
                if not row.ended:
                    guess = [row.tokens[-1], *texts[b].guess(self.spec.guesses)]
                    tokens[b, : len(guess)], real[b, : len(guess)] = guess, True
            cache, new_Bn = step(self.params, cache, tokens, real)
            before = [len(row.tokens) for row in rows]
            done_B = self._take(rows, to_host(new_Bn), on_tokens)
            for text, row, old in zip(texts, rows, before):
                text.extend(row.tokens[old:])
            steps += 1
        return steps


@functools.lru_cache(maxsize=16)
def _first(sampling: Sampling) -> Callable:
    return jax.jit(lambda logits_BV, samples_B, lengths_B: choose(sampling, logits_BV, samples_B, lengths_B))


@functools.lru_cache(maxsize=16)
def several_steps(model: ModelConfig, sampling: Sampling, stops: tuple[int, ...], steps: int) -> Callable:
    """`(params, cache, last_B, done_B, left_B, samples_B) -> (cache, new [B, steps], steps taken)`."""

    def run(params, cache: KVCache, last_B, done_B, left_B, samples_B):
        def goes_on(state):
            at, _, _, done_B, _ = state
            return (at < steps) & ~jnp.all(done_B)

        def step(state):
            at, cache, last_B, done_B, new_Bn = state
            info = cache.next_info(~done_B[:, None])
            hidden_BTD, w_DV, cache = cached_hidden_states(model, params, last_B[:, None], info, cache)
            logits_BV = jnp.einsum("BD,DV->BV", hidden_BTD[:, 0], w_DV, preferred_element_type=jnp.float32)
            next_B = choose(sampling, logits_BV, samples_B, cache.lengths)
            new_Bn = new_Bn.at[:, at].set(jnp.where(done_B, NOTHING, next_B))
            ended_B = done_B | (at + 1 >= left_B)
            for stop in stops:
                ended_B |= next_B == stop
            return at + 1, cache, next_B, ended_B, new_Bn

        start = (jnp.int32(0), cache, last_B, done_B, jnp.full((last_B.shape[0], steps), NOTHING, jnp.int32))
        at, cache, _, _, new_Bn = jax.lax.while_loop(goes_on, step, start)
        return cache, new_Bn, at

    return stepping(run)


@functools.lru_cache(maxsize=16)
def _check_guesses(model: ModelConfig) -> Callable:
    """`(params, cache, tokens_BT, real_BT) -> (cache, new_BT)`: greedy tokens as far as guesses were right, one beyond.

    Tokens begin with the last one that is certain; the cache keeps what was right.
    """

    def run(params, cache: KVCache, tokens_BT, real_BT):
        before_B = cache.lengths
        hidden_BTD, w_DV, cache = cached_hidden_states(model, params, tokens_BT, cache.next_info(real_BT), cache)
        logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, w_DV, preferred_element_type=jnp.float32)
        greedy_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
        right_BT = (tokens_BT[:, 1:] == greedy_BT[:, :-1]) & real_BT[:, 1:]
        right_B = jnp.sum(jnp.cumprod(right_BT.astype(jnp.int32), axis=-1), axis=-1)
        kept_B = jnp.where(real_BT[:, 0], right_B + 1, 0)
        new_BT = jnp.where(jnp.arange(tokens_BT.shape[1]) < kept_B[:, None], greedy_BT, NOTHING)
        return cache.rewound(before_B + kept_B), new_BT

    return stepping(run)
