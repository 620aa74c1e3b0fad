"""`irope search-rope`: factors that stretch a trained RoPE model, found by evolution or by gradient, kept as JSON.

Wiring only: the search is `position.longrope_search`, scores come from `evals.rotations`, the picture from `study`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console
from rich.table import Table

from irope_jax.core.config import ConfigError, fingerprint, from_dict, override, to_dict
from irope_jax.core.hosts import configure_logging
from irope_jax.core.progress import ProgressBar
from irope_jax.evals.rotations import Gradient, ObjectiveSpec, RotationScorer, TextLoss, train_factors
from irope_jax.experiment import check_devices, load_config, resolve, run_config
from irope_jax.position.longrope_search import (
    Candidate,
    Evolution,
    SearchLog,
    evolve,
    factors_json,
    initial_candidates,
    named_candidates,
)
from irope_jax.position.scaling import LongRoPE, critical_pair
from irope_jax.sharding.mesh import make_mesh
from irope_jax.study.factor_plot import plot_factors
from irope_jax.study.plots import PlotsMissingError
from irope_jax.train.state import load_params

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RopeSearch:
    """What is searched for, and how.

    Attributes:
      original_length: tokens the model was trained at.
      length: tokens it is to read; the factor of the extension is `length / original_length`.
      document_length: tokens of the documents that candidates are scored on; None is `length`.
      objective: what a candidate has to predict.
      method: evolution over factors, or training them by gradient.
      attention_policy: attention factor that goes with the factors; see `LongRoPE`.
      batch_tokens: tokens of one forward pass.
      at_once: candidates of one compiled call.
    """

    original_length: int
    length: int
    document_length: int | None = None
    objective: ObjectiveSpec = TextLoss()
    method: Evolution | Gradient = Evolution()
    attention_policy: Literal["longrope", "yarn", "none"] = "longrope"
    batch_tokens: int = 16_384
    at_once: int = 4

    def __post_init__(self):
        if self.original_length < 2:
            raise ConfigError("original_length", self.original_length, "tokens the model was trained at; use 2 or more")
        if self.length <= self.original_length:
            fix = f"must be above original_length={self.original_length}; there is nothing to extend otherwise"
            raise ConfigError("length", self.length, fix)
        if self.document_length is not None and self.document_length < 2:
            raise ConfigError("document_length", self.document_length, "use 2 or more, or None for length")
        for name in ("batch_tokens", "at_once"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")

    @property
    def factor(self) -> float:
        return self.length / self.original_length

    @property
    def magnitude(self) -> float:
        """Attention factor of the policy."""
        return LongRoPE(self.original_length, self.factor, (1.0,), attention_policy=self.attention_policy).magnitude


class Scores:
    """Scores by candidate, counted on a progress bar and kept in the log as they become known."""

    def __init__(self, scorer: RotationScorer, params: Any, journal: SearchLog, bar: ProgressBar):
        self._scorer, self._params, self._journal, self._bar = scorer, params, journal, bar
        self.best = math.inf

    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        scores: list[float] = []
        for first in range(0, len(candidates), self._scorer.at_once):
            group = candidates[first : first + self._scorer.at_once]
            found = self._scorer.score(self._params, [(c.factors, c.first_tokens) for c in group])
            self._journal.add(group, found)
            scores += found
            self.best = min([self.best, *(score for score in found if math.isfinite(score))])
            self._bar.advance(len(group), best=f"{self.best:.4f} nats")
        return scores


def search_rope_verb(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    configure_logging()
    run = Path(args.checkpoint)
    search = read_search(args.config, overrides)
    experiment = resolve(run_config(run))
    model, tokenizer = experiment.model, experiment.data.tokenizer
    out = Path(args.out) if args.out else run / f"rope_search_{search.length}"
    mesh = make_mesh(check_devices(experiment, jax.device_count()))
    with jax.set_mesh(mesh):
        try:
            scorer = RotationScorer(
                model,
                tokenizer,
                search.objective,
                search.document_length or search.length,
                magnitude=search.magnitude,
                batch_tokens=search.batch_tokens,
                at_once=search.at_once,
            )
        except ConfigError as error:
            raise error.within("config") from None
        params, step = load_params(run, model, mesh, args.step)
        # One log for one question: every score in it answers this search of this checkpoint.
        asked = {"search": to_dict(search), "model": fingerprint(model), "checkpoint": [str(run.absolute()), step]}
        out.mkdir(parents=True, exist_ok=True)
        with SearchLog(out / "scores.jsonl", asked) as journal:
            found = _search(search, scorer, params, journal)
    _write(out, search, scorer, found, args.compare or ())
    return 0


def read_search(reference: str, overrides: Sequence[tuple[str, str]]) -> RopeSearch:
    """A search config file with `config.a.b = text` overrides."""
    search = from_dict(RopeSearch, load_config(reference))
    return from_dict(RopeSearch, override(to_dict(search), overrides)) if overrides else search


def _search(
    search: RopeSearch, scorer: RotationScorer, params: Any, journal: SearchLog
) -> dict[str, tuple[Candidate, float]]:
    """Named candidates with their scores: PI, NTK, YaRN and what was found, which comes last."""
    shape = (scorer.model.head_dim, scorer.rotation.theta, search.factor, search.original_length)
    spec = search.method if isinstance(search.method, Evolution) else Evolution()
    named = named_candidates(spec, *shape)
    known = dict(journal.known)
    if known:
        log.info("going on: %d candidates were scored before", len(known))
    evolution = isinstance(search.method, Evolution)
    total = spec.evaluations if evolution else len(named) + search.method.steps + 1
    with ProgressBar("searching", total, done=len(known) if evolution else 0) as bar:
        score = Scores(scorer, params, journal, bar)
        score.best = min([math.inf, *(s for s in known.values() if math.isfinite(s))])
        first = [candidate for candidate in named.values() if candidate not in known]
        known |= dict(zip(first, score(first)))
        table = {name: (candidate, known[candidate]) for name, candidate in named.items()}
        if evolution:
            initial = initial_candidates(spec, *shape)
            result = evolve(spec, initial, score, factor=search.factor, known=known)
            table["searched"] = (result.best, result.score)
            return table
        start = min(table.values(), key=lambda pair: pair[1])[0]
        trained = train_factors(scorer, params, search.method, start.factors, spec.max_stretch * search.factor)
        best = (start.factors, math.inf)
        for factors, loss in trained:
            best = min(best, (tuple(factors), loss), key=lambda pair: pair[1])
            bar.advance(best=f"{best[1]:.4f} nats")
        candidate = Candidate.rounded(best[0], spec.step)
        table["trained"] = (candidate, score([candidate])[0])
    return table


def _write(out: Path, search: RopeSearch, scorer: RotationScorer, found: dict, compare: Sequence[str]) -> None:
    name, (best, score) = list(found.items())[-1]
    values = factors_json(
        best, original_length=search.original_length, factor=search.factor, attention_policy=search.attention_policy
    )
    (out / "factors.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    table = Table(title=f"{scorer.model.num_layers} layers, x{search.factor:g}: loss on the documents of the search")
    for heading in ("factors", "nats", "perplexity", "first tokens"):
        table.add_column(heading, justify="left" if heading == "factors" else "right")
    for label, (candidate, nats) in found.items():
        perplexity = f"{math.exp(nats):.2f}" if nats < 700 else "inf"
        table.add_row(label, f"{nats:.4f}", perplexity, str(candidate.first_tokens))
    Console().print(table)
    curves = {label: candidate.factors for label, (candidate, _) in found.items() if label != name}
    curves |= {Path(path).parent.name: _factors_of(path) for path in compare}
    curves[name] = best.factors  # the last one stands out
    critical = critical_pair(scorer.model.head_dim, scorer.rotation.theta, search.original_length)
    wavelengths = (2 * math.pi / scorer.theta_P).tolist()
    marks = {"critical_pair": critical, "factor": search.factor, "wavelengths": wavelengths}
    print(f"{name}: {score:.4f} nats with {out / 'factors.json'}, a `scaling` for configs")
    try:
        print(f"picture: {plot_factors(out / 'factors.png', curves, **marks)}")
    except PlotsMissingError as error:
        log.warning("no picture: %s", error)


def _factors_of(path: str) -> list[float]:
    try:
        return [float(factor) for factor in json.loads(Path(path).read_text(encoding="utf-8"))["long_factor"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("--compare", path, f"not a factors.json of a search ({error})") from None
