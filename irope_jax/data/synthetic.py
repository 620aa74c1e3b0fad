"""Tasks that can only be solved by looking back: one generator API for training and for evaluation.

`task.sample(rng, length, tokenizer, **overrides) -> Sample` gives exactly `length` tokens with loss weights, the places
of the answers, and per question where its fact stands. Overrides replace fields of the task for this sample only.
What a sample is says `samples`, the filler around the facts comes from `haystacks`; scoring belongs to the evaluations.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from irope_jax.core.config import ConfigError, nearest
from irope_jax.data.haystacks import HaystackSpec, MarkovHaystack
from irope_jax.data.samples import Sample, Task, draw_between, draw_distinct, scatter
from irope_jax.data.synthetic_lists import ManyValues, SameValue, chain_links, check_chains
from irope_jax.data.tokenizer import TokenizerSpec


@dataclass(frozen=True)
class Needle(Task):
    """Facts `SET key value` scattered in a haystack, questions `GET key value` whose value is the answer.

    Attributes:
      haystack: the filler.
      num_facts: (least, most) facts of a sample; keys are unique within it.
      num_queries: (least, most) questions.
      queries: `mixed` puts each question anywhere after its fact and a quarter of them (at least one) at the very end,
        which is what training wants; `end` puts all of them at the end and asks for a fact at most once (fewer facts
        than questions means fewer questions), so that no answer can be copied from a question next to it.
      depths: where the first facts stand, as fractions of the filler before them; the rest stand anywhere. With
        `queries='end'` and depths given, only these facts are asked for.
      num_keys, num_values: symbols that keys and values are made of.
      key_tokens, value_tokens: tokens of one key, of one value.
      text_weight, answer_weight: loss weights of filler and answers; fact tokens and the question itself have 0.
    """

    haystack: HaystackSpec = field(default_factory=MarkovHaystack)
    num_facts: tuple[int, int] = (1, 8)
    num_queries: tuple[int, int] = (3, 8)
    queries: Literal["mixed", "end"] = "mixed"
    depths: tuple[float, ...] = ()
    num_keys: int = 64
    num_values: int = 64
    key_tokens: int = 1
    value_tokens: int = 1
    text_weight: float = 1.0
    answer_weight: float = 1.0
    kind: ClassVar[str] = "needle"

    def __post_init__(self):
        self.check_ranges("num_facts", "num_queries")
        self.check_positive("num_keys", "num_values", "key_tokens", "value_tokens")
        self.check_weights("text_weight", "answer_weight")
        if self.queries not in ("mixed", "end"):
            raise ConfigError("queries", self.queries, nearest(str(self.queries), ("mixed", "end")))
        if any(not 0 <= depth <= 1 for depth in self.depths):
            raise ConfigError("depths", self.depths, "depths lie between 0 and 1")
        if len(self.depths) > self.num_facts[0]:
            raise ConfigError("depths", self.depths, f"more depths than facts; num_facts starts at {self.num_facts[0]}")
        if self.num_facts[1] > self.num_keys**self.key_tokens:
            fix = "keys are unique in a sample; lower it or raise num_keys or key_tokens"
            raise ConfigError("num_facts", self.num_facts, fix)

    @property
    def symbols_needed(self) -> int:
        return self.num_keys + self.num_values

    @property
    def event_tokens(self) -> int:
        """Tokens of one fact, and of one question with its answer."""
        return 1 + self.key_tokens + self.value_tokens

    @property
    def shortest(self) -> int:
        return 1 + (self.num_facts[1] + self.num_queries[1]) * self.event_tokens

    def at_end(self, facts: int) -> Task:
        each = (facts, facts)
        return dataclasses.replace(self, queries="end", num_facts=each, num_queries=each, depths=())

    def placed(self, depths: tuple[float, ...]) -> dict[str, Any]:
        return {"depths": depths}

    def _sample(self, rng: np.random.Generator, length: int, tokenizer: TokenizerSpec) -> Sample:
        num_facts, num_queries = draw_between(rng, self.num_facts), draw_between(rng, self.num_queries)
        keys = tokenizer.symbols(0, self.num_keys)[draw_distinct(rng, self.num_keys, self.key_tokens, num_facts)]
        values = rng.integers(self.num_values, size=(num_facts, self.value_tokens))
        values = tokenizer.symbols(self.num_keys, self.num_values)[values]
        fact_at = rng.random(num_facts)
        fact_at[: len(self.depths)] = self.depths
        asked, query_at = self._questions(rng, num_queries, fact_at)
        num_queries = len(asked)
        at = np.concatenate([fact_at, query_at])
        fact = np.concatenate([np.arange(num_facts), asked])
        marker = np.repeat([tokenizer.marker("set"), tokenizer.marker("get")], [num_facts, num_queries])
        events = np.concatenate([marker[:, None], keys[fact], values[fact]], axis=1).astype(np.int32)
        room = length - 1 - events.size
        filler = self.haystack.fill(rng, room, tokenizer)
        tokens, starts, gaps = scatter(filler, events, at, tokenizer.bos_id)
        weights, answers = np.full(length, self.text_weight, np.float32), np.zeros(length, bool)
        weights[0] = 0
        weights[starts[:, None] + np.arange(self.event_tokens)] = 0
        first = starts[num_facts:] + 1 + self.key_tokens
        places = first[:, None] + np.arange(self.value_tokens)
        weights[places], answers[places] = self.answer_weight, True
        meta = {
            "answer_start": first,
            "answer_end": first + self.value_tokens - 1,
            "fact_start": starts[asked],
            "fact_end": starts[asked] + self.event_tokens - 1,
            "depth": gaps[asked] / max(1, room),
            "num_facts": num_facts,
            "num_queries": num_queries,
        }
        return Sample(tokens, weights, answers, meta)

    def _questions(self, rng, num_queries, fact_at) -> tuple[np.ndarray, np.ndarray]:
        """Which fact each question asks for, and where in the filler it stands (0 to 1)."""
        if self.queries == "end":
            askable = len(self.depths) or len(fact_at)
            asked = rng.permutation(askable)[:num_queries]
            return asked, np.ones(len(asked))
        asked = rng.integers(len(fact_at), size=num_queries)
        at = fact_at[asked] + (1 - fact_at[asked]) * rng.random(num_queries)
        at[-max(1, num_queries // 4) :] = 1.0
        return asked, at


@dataclass(frozen=True)
class MultiQueryRecall(Task):
    """Multi-query associative recall (MQAR, arXiv 2312.04927): `k v k v …`, then each key once more with its value.

    The pairs stand first; each is asked for once, after a gap drawn from a power law (short gaps are likely). All other
    places are random values without loss. The loss is on the values of the questions only.

    Attributes:
      num_pairs: (least, most) pairs of a sample; keys are unique.
      power: exponent a of the gap law, p(g) ∝ a g^(a - 1).
      num_keys, num_values: symbols of keys and values.
    """

    num_pairs: tuple[int, int] = (4, 16)
    power: float = 0.01
    num_keys: int = 64
    num_values: int = 64
    answer_weight: float = 1.0
    kind: ClassVar[str] = "multi_query_recall"

    def __post_init__(self):
        self.check_ranges("num_pairs")
        self.check_positive("num_keys", "num_values")
        self.check_weights("answer_weight")
        if self.num_pairs[1] > self.num_keys:
            raise ConfigError("num_pairs", self.num_pairs, f"keys are unique; at most num_keys={self.num_keys}")
        if self.power <= 0:
            raise ConfigError("power", self.power, "must be positive")

    @property
    def symbols_needed(self) -> int:
        return self.num_keys + self.num_values

    @property
    def shortest(self) -> int:
        return 1 + 4 * self.num_pairs[1]

    def _sample(self, rng: np.random.Generator, length: int, tokenizer: TokenizerSpec) -> Sample:
        pairs = draw_between(rng, self.num_pairs)
        keys = tokenizer.symbols(0, self.num_keys)[rng.permutation(self.num_keys)[:pairs]]
        noise = tokenizer.symbols(self.num_keys, self.num_values)[rng.integers(self.num_values, size=length + pairs)]
        tokens, values = noise[:length].copy(), noise[length:]
        tokens[0] = tokenizer.bos_id
        fact_start = 1 + 2 * np.arange(pairs)
        tokens[fact_start], tokens[fact_start + 1] = keys, values
        slots = (length - 1 - 2 * pairs) // 2
        gap_law = np.arange(1, slots + 1) ** (self.power - 1)
        slot = rng.choice(slots, size=pairs, replace=False, p=gap_law / gap_law.sum())
        query = 1 + 2 * pairs + 2 * slot
        tokens[query], tokens[query + 1] = keys, values
        weights, answers = np.zeros(length, np.float32), np.zeros(length, bool)
        weights[query + 1], answers[query + 1] = self.answer_weight, True
        meta = {
            "answer_start": query + 1,
            "answer_end": query + 1,
            "fact_start": fact_start,
            "fact_end": fact_start + 1,
            "depth": np.arange(pairs) / max(1, pairs - 1),
            "num_facts": pairs,
            "num_queries": pairs,
        }
        return Sample(tokens, weights, answers, meta)


@dataclass(frozen=True)
class Copy(Task):
    """A random string `SET s1 … sk` somewhere in a haystack, and at the very end `COPY` and the same string.

    Attributes:
      haystack: the filler.
      string_tokens: (least, most) tokens of the string.
      num_values: symbols the string is made of.
      depth: where the string stands in the filler, 0 to 1; `None` anywhere.
    """

    haystack: HaystackSpec = field(default_factory=MarkovHaystack)
    string_tokens: tuple[int, int] = (8, 16)
    num_values: int = 64
    depth: float | None = None
    text_weight: float = 1.0
    answer_weight: float = 1.0
    kind: ClassVar[str] = "copy"

    def __post_init__(self):
        self.check_ranges("string_tokens")
        self.check_positive("num_values")
        self.check_weights("text_weight", "answer_weight")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ConfigError("depth", self.depth, "lies between 0 and 1")

    @property
    def symbols_needed(self) -> int:
        return self.num_values

    @property
    def shortest(self) -> int:
        return 3 + 2 * self.string_tokens[1]

    def at_end(self, facts: int) -> Task:
        if facts != 1:
            raise ConfigError("kind", self.kind, "there is one string in a sample; ask for 1")
        return self

    def placed(self, depths: tuple[float, ...]) -> dict[str, Any]:
        return {"depth": depths[0]}

    def _sample(self, rng: np.random.Generator, length: int, tokenizer: TokenizerSpec) -> Sample:
        count = draw_between(rng, self.string_tokens)
        string = tokenizer.symbols(0, self.num_values)[rng.integers(self.num_values, size=count)]
        room = length - 3 - 2 * count
        at = np.array([rng.random() if self.depth is None else self.depth, 1.0])
        events = np.stack([np.r_[tokenizer.marker(name), string] for name in ("set", "copy")]).astype(np.int32)
        tokens, starts, gaps = scatter(self.haystack.fill(rng, room, tokenizer), events, at, tokenizer.bos_id)
        weights, answers = np.full(length, self.text_weight, np.float32), np.zeros(length, bool)
        weights[0] = 0
        weights[starts[:, None] + np.arange(1 + count)] = 0
        weights[length - count :], answers[length - count :] = self.answer_weight, True
        meta = {
            "answer_start": np.array([length - count]),
            "answer_end": np.array([length - 1]),
            "fact_start": starts[:1],
            "fact_end": starts[:1] + count,
            "depth": gaps[:1] / max(1, room),
            "num_facts": 1,
            "num_queries": 1,
        }
        return Sample(tokens, weights, answers, meta)


@dataclass(frozen=True)
class VariableTracking(Task):
    """Chains of assignments: `SET x1 value`, `LET x2 x1`, `LET x3 x2`, …; at the end `GET x_last value` per chain.

    The value of a chain of h hops is found by following h links back to the first assignment (RULER's variable
    tracking, arXiv 2404.06654, asked from the other end). Links of a chain stand in order, chains are interleaved.

    Attributes:
      haystack: the filler.
      num_chains: (least, most) chains; variables are unique within a sample.
      hops: (least, most) links that follow the first assignment.
      num_keys, num_values: symbols of variables and values.
    """

    haystack: HaystackSpec = field(default_factory=MarkovHaystack)
    num_chains: tuple[int, int] = (1, 4)
    hops: tuple[int, int] = (1, 4)
    num_keys: int = 64
    num_values: int = 64
    text_weight: float = 1.0
    answer_weight: float = 1.0
    kind: ClassVar[str] = "variable_tracking"

    def __post_init__(self):
        self.check_ranges("num_chains", "hops")
        self.check_positive("num_keys", "num_values")
        self.check_weights("text_weight", "answer_weight")
        check_chains(self.num_chains, self.hops, self.num_keys)

    @property
    def symbols_needed(self) -> int:
        return self.num_keys + self.num_values

    @property
    def shortest(self) -> int:
        return 1 + 3 * self.num_chains[1] * (2 + self.hops[1])

    def at_end(self, facts: int) -> Task:
        return dataclasses.replace(self, num_chains=(facts, facts))

    def _sample(self, rng: np.random.Generator, length: int, tokenizer: TokenizerSpec) -> Sample:
        chains, hops = draw_between(rng, self.num_chains), draw_between(rng, self.hops)
        names = tokenizer.symbols(0, self.num_keys)[rng.permutation(self.num_keys)[: chains * (1 + hops)]]
        names = names.reshape(chains, 1 + hops)
        values = tokenizer.symbols(self.num_keys, self.num_values)[rng.integers(self.num_values, size=chains)]
        links = chain_links(names, values, tokenizer).reshape(-1, 3)
        asks = np.stack([np.full(chains, tokenizer.marker("get")), names[:, -1], values], axis=-1)
        asks, asked = asks[order := rng.permutation(chains)], order
        at = np.concatenate([np.sort(rng.random((chains, 1 + hops)), axis=1).reshape(-1), np.ones(chains)])
        events = np.concatenate([links, asks]).astype(np.int32)
        room = length - 1 - events.size
        tokens, starts, gaps = scatter(self.haystack.fill(rng, room, tokenizer), events, at, tokenizer.bos_id)
        weights, answers = np.full(length, self.text_weight, np.float32), np.zeros(length, bool)
        weights[0] = 0
        weights[starts[:, None] + np.arange(3)] = 0
        answer = starts[len(links) :] + 2
        weights[answer], answers[answer] = self.answer_weight, True
        root = asked * (1 + hops)
        meta = {
            "answer_start": answer,
            "answer_end": answer,
            "fact_start": starts[root],
            "fact_end": starts[root] + 2,
            "depth": gaps[root] / max(1, room),
            "link_starts": starts[: len(links)].reshape(chains, 1 + hops)[asked],
            "num_facts": chains,
            "num_queries": chains,
            "hops": hops,
        }
        return Sample(tokens, weights, answers, meta)


TaskSpec = Needle | MultiQueryRecall | Copy | VariableTracking | ManyValues | SameValue
