"""Synthetic tasks whose answer is a list put together from all over the context; asked for at the very end.

The protocol is that of `synthetic`, whose tasks have answers that stand in one place.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.data.haystacks import HaystackSpec, MarkovHaystack
from irope_jax.data.samples import Sample, Task, draw_between, scatter
from irope_jax.data.tokenizer import TokenizerSpec


@dataclass(frozen=True)
class ManyValues(Task):
    """Keys with several values: facts `SET key value`, each told apart; at the end `GET key value1 … valuem` per key.

    The values are asked for in the order in which they were told (RULER's multi-value needles, arXiv 2404.06654).

    Attributes:
      haystack: the filler.
      num_lists: (least, most) keys of a sample, all of them asked for.
      values_each: (least, most) values of each key, the same number for all keys of a sample and different for a key.
      num_keys, num_values: symbols of keys and values.
    """

    haystack: HaystackSpec = field(default_factory=MarkovHaystack)
    num_lists: tuple[int, int] = (1, 3)
    values_each: tuple[int, int] = (2, 4)
    num_keys: int = 64
    num_values: int = 64
    text_weight: float = 1.0
    answer_weight: float = 1.0
    kind: ClassVar[str] = "many_values"

    def __post_init__(self):
        self.check_ranges("num_lists", "values_each")
        self.check_positive("num_keys", "num_values")
        self.check_weights("text_weight", "answer_weight")
        if self.num_lists[1] > self.num_keys:
            raise ConfigError("num_lists", self.num_lists, f"keys are unique; at most num_keys={self.num_keys}")
        if self.values_each[1] > self.num_values:
            fix = f"values of a key are unique; at most num_values={self.num_values}"
            raise ConfigError("values_each", self.values_each, fix)

    @property
    def symbols_needed(self) -> int:
        return self.num_keys + self.num_values

    @property
    def shortest(self) -> int:
        return 1 + self.num_lists[1] * (2 + 4 * self.values_each[1])

    def at_end(self, facts: int) -> Task:
        return dataclasses.replace(self, num_lists=(facts, facts))

    def _sample(self, rng: np.random.Generator, length: int, tokenizer: TokenizerSpec) -> Sample:
        lists, each = draw_between(rng, self.num_lists), draw_between(rng, self.values_each)
        keys = tokenizer.symbols(0, self.num_keys)[rng.permutation(self.num_keys)[:lists]]
        drawn = np.stack([rng.permutation(self.num_values)[:each] for _ in range(lists)])
        values = tokenizer.symbols(self.num_keys, self.num_values)[drawn]
        told = np.stack(
            [np.full((lists, each), tokenizer.marker("set")), np.repeat(keys[:, None], each, 1), values], -1
        )
        at = np.sort(rng.random((lists, each)), axis=1)
        asks = np.concatenate([np.full((lists, 1), tokenizer.marker("get")), keys[:, None], values], axis=1)
        return asked_at_end(self, rng, length, tokenizer, told, at, asks)


@dataclass(frozen=True)
class SameValue(Task):
    """Chains of assignments as in `VariableTracking`; at the end `GET value x1 x2 … xh` per chain: all that hold it.

    This is the way round in which RULER (arXiv 2404.06654) asks: from the value to the variables, in their order.

    Attributes:
      haystack: the filler.
      num_chains: (least, most) chains; variables and values are unique within a sample.
      hops: (least, most) links that follow the first assignment.
      num_keys, num_values: symbols of variables and values.
    """

    haystack: HaystackSpec = field(default_factory=MarkovHaystack)
    num_chains: tuple[int, int] = (1, 3)
    hops: tuple[int, int] = (1, 4)
    num_keys: int = 64
    num_values: int = 64
    text_weight: float = 1.0
    answer_weight: float = 1.0
    kind: ClassVar[str] = "same_value"

    def __post_init__(self):
        self.check_ranges("num_chains", "hops")
        self.check_positive("num_keys", "num_values")
        self.check_weights("text_weight", "answer_weight")
        check_chains(self.num_chains, self.hops, self.num_keys)
        if self.num_chains[1] > self.num_values:
            raise ConfigError("num_chains", self.num_chains, f"values are unique; at most num_values={self.num_values}")

    @property
    def symbols_needed(self) -> int:
        return self.num_keys + self.num_values

    @property
    def shortest(self) -> int:
        return 1 + self.num_chains[1] * (2 + 4 * (1 + self.hops[1]))

    def at_end(self, facts: int) -> Task:
        return dataclasses.replace(self, num_chains=(facts, facts))

    def _sample(self, rng: np.random.Generator, length: int, tokenizer: TokenizerSpec) -> Sample:
        chains, each = draw_between(rng, self.num_chains), 1 + draw_between(rng, self.hops)
        names = tokenizer.symbols(0, self.num_keys)[rng.permutation(self.num_keys)[: chains * each]]
        names = names.reshape(chains, each)
        values = tokenizer.symbols(self.num_keys, self.num_values)[rng.permutation(self.num_values)[:chains]]
        told = chain_links(names, values, tokenizer)
        at = np.sort(rng.random((chains, each)), axis=1)
        asks = np.concatenate([np.full((chains, 1), tokenizer.marker("get")), values[:, None], names], axis=1)
        return asked_at_end(self, rng, length, tokenizer, told, at, asks)


def chain_links(names: np.ndarray, values: np.ndarray, tokenizer: TokenizerSpec) -> np.ndarray:
    """`SET x1 value`, `LET x2 x1`, …: int `[c, m, 3]` of names `[c, m]` and the values `[c]` of their chains."""
    how = np.full(names.shape, tokenizer.marker("let"))
    how[:, 0] = tokenizer.marker("set")
    return np.stack([how, names, np.concatenate([values[:, None], names[:, :-1]], axis=1)], axis=-1)


def check_chains(num_chains: tuple[int, int], hops: tuple[int, int], num_keys: int) -> None:
    """Raises `ConfigError` if chains need more variables than there are."""
    if num_chains[1] * (1 + hops[1]) > num_keys:
        fix = f"chains × (1 + hops) variables are unique; at most num_keys={num_keys}"
        raise ConfigError("num_chains", num_chains, fix)


def asked_at_end(
    task: ManyValues | SameValue,
    rng: np.random.Generator,
    length: int,
    tokenizer: TokenizerSpec,
    told: np.ndarray,
    at: np.ndarray,
    asks: np.ndarray,
) -> Sample:
    """A sample from facts in a haystack and questions after it, in random order.

    Args:
      task: has haystack and weights.
      rng, length, tokenizer: of the sample.
      told: int `[q, m, 3]`, the facts that question q needs.
      at: float `[q, m]`, where they stand in the filler.
      asks: int `[q, 2 + m]`, marker, what is asked for, and the answer of m tokens.

    The fact of a question, in the sample's `meta`, is the first that it needs.
    """
    count, each, _ = told.shape
    order = rng.permutation(count)
    tail = asks[order].astype(np.int32)
    room = length - 1 - told.size - tail.size
    filler = task.haystack.fill(rng, room, tokenizer)
    context, starts, gaps = scatter(filler, told.reshape(-1, 3).astype(np.int32), at.reshape(-1), tokenizer.bos_id)
    tokens = np.concatenate([context, tail.reshape(-1)])
    weights, answers = np.full(length, task.text_weight, np.float32), np.zeros(length, bool)
    weights[0] = 0
    weights[starts[:, None] + np.arange(3)] = 0
    weights[len(context) :] = 0
    first = len(context) + (2 + each) * np.arange(count) + 2
    places = first[:, None] + np.arange(each)
    weights[places], answers[places] = task.answer_weight, True
    fact = starts.reshape(count, each)[order, 0]
    meta = {
        "answer_start": first,
        "answer_end": first + each - 1,
        "fact_start": fact,
        "fact_end": fact + 2,
        "depth": gaps.reshape(count, each)[order, 0] / max(1, room),
        "num_facts": count * each,
        "num_queries": count,
    }
    return Sample(tokens, weights, answers, meta)
