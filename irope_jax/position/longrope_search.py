"""The evolutionary search of LongRoPE (arXiv 2402.13753): one factor per rotating pair, and how many tokens go without.

Belongs here: candidates, how they vary, who survives, and the log from which a search that was cut off goes on. What a
candidate is worth is told by a `score` function; no model is known here.

What differs from the authors' code, on purpose: the number of first tokens is searched together with the factors, the
first generation is that of the paper (PI, NTK and YaRN, and mutations of them), every loop is bounded, and a score that
is not finite is the worst there is.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from irope_jax.core.config import ConfigError, fingerprint
from irope_jax.position.rope import Frequencies
from irope_jax.position.scaling import NTK, Linear, RopeScaling, YaRN


@dataclass(frozen=True, order=True)
class Candidate:
    """Factors in whole steps, so that "seen before" is exact.

    Attributes:
      steps: factor i is `steps[i] * step`; they do not fall with i.
      first_tokens: tokens at positions below this turn unscaled.
      step: the grid.
    """

    steps: tuple[int, ...]
    first_tokens: int = 0
    step: float = 0.01

    @property
    def factors(self) -> tuple[float, ...]:
        digits = max(0, 2 - math.floor(math.log10(self.step)))
        return tuple(round(count * self.step, digits) for count in self.steps)

    @classmethod
    def rounded(cls, factors: Iterable[float], step: float, first_tokens: int = 0) -> Candidate:
        """The nearest candidate on the grid; monotone if the factors are."""
        return cls(tuple(round(float(factor) / step) for factor in factors), first_tokens, step)


@dataclass(frozen=True)
class Evolution:
    """How a population is bred; the defaults are the paper's (section 3.3 and appendix A).

    Attributes:
      population: candidates of the first generation.
      parents: the best of all so far, which breed and stay.
      mutations: children of one parent, each generation.
      crossovers: children of two.
      iterations: generations after the first.
      probability: with which each factor of a child changes.
      step: grid of the factors.
      max_stretch: factors go from 1 to this times the factor of the extension.
      first_tokens: numbers of unscaled first tokens to choose from.
      attempts: tries for a child that is new before it is given up.
      seed: of everything random.
    """

    population: int = 64
    parents: int = 32
    mutations: int = 16
    crossovers: int = 16
    iterations: int = 40
    probability: float = 0.3
    step: float = 0.01
    max_stretch: float = 1.25
    first_tokens: tuple[int, ...] = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
    attempts: int = 100
    seed: int = 0
    kind: ClassVar[str] = "evolution"

    def __post_init__(self):
        for name in ("population", "parents", "attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        for name in ("mutations", "crossovers", "iterations", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must be 0 or more")
        if not 0 < self.probability <= 1:
            raise ConfigError("probability", self.probability, "with which a factor changes; above 0 and up to 1")
        if not 0 < self.step <= 1:
            raise ConfigError("step", self.step, "grid of the factors; above 0 and up to 1, such as 0.01")
        if self.max_stretch < 1:
            raise ConfigError("max_stretch", self.max_stretch, "would leave out position interpolation; use 1 or more")
        if not self.first_tokens or min(self.first_tokens) < 0:
            raise ConfigError("first_tokens", self.first_tokens, "give at least one number, each 0 or more")

    @property
    def evaluations(self) -> int:
        """Candidates scored at most."""
        return self.population + self.iterations * (self.mutations + self.crossovers)

    def bounds(self, factor: float) -> tuple[int, int]:
        """Least and greatest factor in steps, for an extension by `factor`."""
        return math.ceil(1 / self.step - 1e-9), math.floor(self.max_stretch * factor / self.step + 1e-9)


class SearchError(RuntimeError):
    """A search that cannot go on; the message says what was seen and what to change."""


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
      best: the candidate with the lowest score.
      score: its score.
      history: the best score after each generation, the first one included.
      evaluations: candidates that have a score.
    """

    best: Candidate
    score: float
    history: tuple[float, ...]
    evaluations: int


def named_candidates(
    spec: Evolution, head_dim: int, theta: float, factor: float, original_length: int
) -> dict[str, Candidate]:
    """PI, NTK and YaRN on the grid; `theta_i / theta_i'` are their factors."""
    low, high = spec.bounds(factor)
    unscaled = Frequencies.geometric(head_dim, theta).inv_freq

    def of(scaling: RopeScaling) -> Candidate:
        factors = unscaled / scaling.frequencies(head_dim, theta).inv_freq
        steps = np.clip(np.round(factors / spec.step), low, high).astype(int)
        return Candidate(tuple(np.maximum.accumulate(steps).tolist()), min(spec.first_tokens), spec.step)

    return {"pi": of(Linear(factor)), "ntk": of(NTK(factor)), "yarn": of(YaRN(factor, original_length))}


def initial_candidates(
    spec: Evolution, head_dim: int, theta: float, factor: float, original_length: int
) -> list[Candidate]:
    """The first generation: `named_candidates`, then mutations of them."""
    found = list(dict.fromkeys(named_candidates(spec, head_dim, theta, factor, original_length).values()))
    rng, bounds, named = np.random.default_rng([spec.seed, 0]), spec.bounds(factor), len(found)
    seen = set(found)
    for _ in range(spec.population - named):
        child = _new(lambda: _mutate(spec, found[rng.integers(named)], bounds, rng), seen, spec.attempts)
        if child is not None:
            seen.add(child)
            found.append(child)
    return found[: max(spec.population, named)]


def evolve(
    spec: Evolution,
    initial: Sequence[Candidate],
    score: Callable[[list[Candidate]], list[float]],
    *,
    factor: float,
    known: Mapping[Candidate, float] | None = None,
    tell: Callable[[int, Candidate, float], None] | None = None,
) -> Result:
    """The best candidate of a search.

    Depends on the spec, the first generation and the scores only: generation g draws from its own random stream, so
    neither how scores are batched nor a cut between them changes anything.

    Args:
      spec: how to breed.
      initial: the first generation.
      score: scores of candidates, lower is better; one that is not finite loses to all others.
      factor: of the extension; it bounds the factors.
      known: scores from a search that was cut off. Going through the same generations again, those candidates are not
        scored twice.
      tell: called after each generation with its number, the best candidate and its score.

    Raises:
      SearchError: no candidate of the first generation has a finite score.
    """
    known = {} if known is None else known
    scores: dict[Candidate, float] = {}

    def evaluate(candidates: Iterable[Candidate]) -> None:
        candidates = list(dict.fromkeys(candidates))
        fresh = [candidate for candidate in candidates if candidate not in known]
        found = dict(zip(fresh, score(fresh), strict=True)) if fresh else {}
        for candidate in candidates:
            value = float(found[candidate] if candidate in found else known[candidate])
            scores[candidate] = value if math.isfinite(value) else math.inf

    def ranked() -> list[Candidate]:
        return sorted(scores, key=lambda candidate: (scores[candidate], candidate))

    evaluate(initial)
    history, bounds = [], spec.bounds(factor)
    for generation in range(spec.iterations + 1):
        if generation:
            parents = [candidate for candidate in ranked()[: spec.parents] if scores[candidate] < math.inf]
            evaluate(_children(spec, parents, set(scores), bounds, np.random.default_rng([spec.seed, generation])))
        best = ranked()[0]
        if scores[best] == math.inf:
            raise SearchError(
                f"none of the {len(scores)} candidates has a finite score; check that the model gives a finite loss on "
                "the documents of the search, or use shorter ones"
            )
        history.append(scores[best])
        if tell is not None:
            tell(generation, best, scores[best])
    return Result(best, scores[best], tuple(history), len(scores))


def _children(spec: Evolution, parents: list[Candidate], seen: set, bounds, rng) -> list[Candidate]:
    """Up to `mutations + crossovers` candidates that nobody has seen."""

    def mutation() -> Candidate:
        return _mutate(spec, parents[rng.integers(len(parents))], bounds, rng)

    def crossover() -> Candidate | None:
        return _cross(spec, parents, rng)

    children: list[Candidate] = []
    for make, count in ((mutation, spec.mutations), (crossover, spec.crossovers)):
        for _ in range(count):
            child = _new(make, seen, spec.attempts)
            if child is None and make is crossover:  # two parents may have no new child
                child = _new(mutation, seen, spec.attempts)
            if child is not None:
                seen.add(child)
                children.append(child)
    return children


def _new(make: Callable[[], Candidate | None], seen: set[Candidate], attempts: int) -> Candidate | None:
    for _ in range(attempts):
        child = make()
        if child is not None and child not in seen:
            return child
    return None


def _mutate(spec: Evolution, parent: Candidate, bounds: tuple[int, int], rng: np.random.Generator) -> Candidate:
    """Each factor changes with `probability` to any value between its neighbours: monotone by construction."""
    steps = list(parent.steps)
    for i in range(len(steps)):
        if rng.random() < spec.probability:
            low = steps[i - 1] if i else bounds[0]
            high = steps[i + 1] if i + 1 < len(steps) else bounds[1]
            steps[i] = int(rng.integers(low, high + 1))
    first = parent.first_tokens
    if rng.random() < spec.probability:
        first = int(rng.choice(spec.first_tokens))
    return Candidate(tuple(steps), first, parent.step)


def _cross(spec: Evolution, parents: list[Candidate], rng: np.random.Generator) -> Candidate | None:
    """Every value from one parent or the other; None if the factors then fall somewhere."""
    if len(parents) < 2:
        return None
    left, right = (parents[i] for i in rng.choice(len(parents), 2, replace=False))
    taken = rng.random(len(left.steps)) < 0.5
    steps = tuple(b if take else a for take, a, b in zip(taken.tolist(), left.steps, right.steps))
    if any(a > b for a, b in itertools.pairwise(steps)):
        return None
    return Candidate(steps, (left if rng.random() < 0.5 else right).first_tokens, left.step)


class SearchLog:
    """Scores as JSON lines, one per candidate, under a header that says what they are scores of.

    Lines are written as scores become known. A last line that was cut off by a kill is dropped; anything else that
    cannot be read is an error. Use it as a context manager.

    Args:
      path: the file; made if it is not there.
      asked: plain values that decide every score. Another question needs another file.

    Attributes:
      known: scores read from the file, by candidate; those that were not finite are infinite.

    Raises:
      SearchError: the file is of another question, or damaged.
    """

    def __init__(self, path: str | Path, asked: Any):
        self.path, self.known = Path(path), {}
        header = {"irope_jax": "rope search", "version": 1, "fingerprint": fingerprint(asked), "asked": asked}
        kept = self._read(header) if self.path.exists() else None
        if kept is None:
            self._file = self.path.open("w", encoding="utf-8")
            self._write(header)
        else:
            self._file = self.path.open("r+", encoding="utf-8")
            self._file.truncate(kept)
            self._file.seek(kept)

    def _read(self, header: dict) -> int | None:
        """Bytes of whole lines; None if not even the header was written."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            return None
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                if number == 1:
                    found = record["fingerprint"]
                    if found != header["fingerprint"]:
                        raise SearchError(
                            f"{self.path}: scores of another search (other config, model or checkpoint); "
                            "give this one another --out, or delete the file"
                        )
                    continue
                value = record["score"]
                candidate = Candidate(tuple(map(int, record["steps"])), int(record["first_tokens"]), record["step"])
                self.known[candidate] = math.inf if value is None else float(value)
            except (ValueError, KeyError, TypeError) as error:
                fix = f"not a line of a search ({error}); delete the file"
                raise SearchError(f"{self.path}, line {number}: {fix}") from None
        return len(whole)

    def add(self, candidates: Sequence[Candidate], scores: Sequence[float]) -> None:
        """Keep the scores of candidates."""
        for candidate, value in zip(candidates, scores, strict=True):
            finite = float(value) if math.isfinite(value) else None
            self._write(
                {
                    "steps": candidate.steps,
                    "first_tokens": candidate.first_tokens,
                    "step": candidate.step,
                    "score": finite,
                }
            )

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SearchLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def factors_json(candidate: Candidate, *, original_length: int, factor: float, attention_policy: str) -> dict[str, Any]:
    """A `LongRoPE` scaling as plain values: what `scaling=` of a config takes, and a literal of the command line."""
    return {
        "kind": "longrope",
        "original_length": original_length,
        "factor": factor,
        "long_factor": list(candidate.factors),
        "first_tokens": candidate.first_tokens,
        "attention_policy": attention_policy,
    }
