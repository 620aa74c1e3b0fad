"""Runs side by side, and their measurements aggregated.

Here: reading run directories into the arms of a comparison, choosing which measurements speak for a run, weighted
means, intervals. Not here: how they look (tables, plots) or what the page says (report).

What evaluations are expected to record (`core.records.RunWriter.measure`):

    perplexity  nll_by_position  nats per token, count = tokens     where length, from, to   (positions [from, to))
    perplexity  nll_by_length    nats per token, count = tokens     where length
    retrieval   accuracy         fraction right, count = queries    where length, depth, straddle
    retrieval   answer_nll       nats per token of the answer       where length, depth, straddle
    retrieval   chance           accuracy of guessing (optional)    where anything

An evaluation may have another name if the config says its kind: `config["evals"] = [{"kind": ..., "name": ...}]`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from irope_jax.core.records import ADDED, Measurement, RecordError, Run, load_run

Facts = Literal["all", "inside", "straddling"]


@dataclass(frozen=True)
class Arm:
    """One run of a comparison.

    Attributes:
      index: place in the comparison; decides colour and marker in every figure.
      label: the name of the run, unique in the comparison.
      run: its records; of several seeds what they recorded together.
      seeds: the runs that were pooled (`study.seeds`); empty for a single run.
    """

    index: int
    label: str
    run: Run
    seeds: tuple[Run, ...] = ()

    @property
    def training_length(self) -> int | None:
        """Tokens per training sequence, of the last stage where there are several; `None` if nothing says it.

        Of an imported model it is what the model says it reads, until it is trained on here.
        """
        events = self.run.events
        staged = [event.details.get("length") for event in events if event.name == "stage"]
        imported = [event.details.get("context") for event in events if event.name == "imported"]
        if imported and not self.run.train:
            staged = imported
        return staged[-1] if staged and staged[-1] else lookup(self.run.config, "data", "seq_len")

    @property
    def planned_steps(self) -> int | None:
        """Of a run of stages, which gates may end early, those it took once it is finished."""
        if not lookup(self.run.config, "stages"):
            return lookup(self.run.config, "train", "steps")
        done = [event.step for event in self.run.events if event.name == "finished"]
        return done[-1] if done else None

    @property
    def untrained(self) -> bool:
        """Whether it was evaluated only (`irope eval` of a config), with weights of its start or fresh ones."""
        return not self.run.train and any(event.name == "evaluated" for event in self.run.events)

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end; of several seeds, all of them."""
        if lookup(self.run.config, "stages"):
            return all(_ended(run) for run in self.seeds or (self.run,))
        return self.planned_steps is not None and self.run.last_step >= self.planned_steps

    def multiple(self, length: int) -> float:
        """A context length in multiples of the training length."""
        return length / self.training_length

    def recorded(self, detail: str) -> Any:
        """The latest value of a detail in the run's events, e.g. `parameters`; `None` if never recorded."""
        return next((e.details[detail] for e in reversed(self.run.events) if detail in e.details), None)

    def evaluations(self, kind: str) -> list[str]:
        """Names of the recorded evaluations of a kind; first the one that speaks for the run.

        That is the one called like its kind, else the first that the config names, else one that was added later.
        """
        named = self.planned(kind)
        added = [event.details for event in self.run.events if event.name == ADDED]
        named += [details.get("evaluation") for details in added if details.get("kind") == kind]
        recorded = {m.evaluation for m in self.run.evals}
        return [name for name in dict.fromkeys([kind, *named]) if name in recorded]

    def planned(self, kind: str) -> list[str]:
        """Names of the evaluations of a kind that the config of the run has."""
        specs = lookup(self.run.config, "evals") or ()
        return [spec.get("name") for spec in specs if isinstance(spec, dict) and spec.get("kind") == kind]

    def measured_at(self, kind: str) -> int | None:
        """The last step at which the evaluation of a kind was recorded; `None` if never."""
        names = self.evaluations(kind)
        return max((m.step for m in self.run.evals if m.evaluation == names[0]), default=None) if names else None

    def measurements(self, kind: str, name: str) -> list[Measurement]:
        """What the evaluation of a kind found at the last step at which it was recorded: what speaks for the run."""
        step = self.measured_at(kind)
        wanted = (step, self.evaluations(kind)[0], name) if step is not None else None
        return [m for m in self.run.evals if (m.step, m.evaluation, m.name) == wanted]


@dataclass(frozen=True)
class Cell:
    """A mean over `count` things; `where` holds the keys it was grouped by.

    Attributes:
      spread: the least and the greatest mean of the seeds, where there are several.
    """

    where: dict[str, Any]
    value: float
    count: int
    spread: tuple[float, float] | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """From the least to the greatest of the seeds; else the 95 % Wilson interval, reading `value` as a fraction of
        `count` independent trials."""
        return self.spread or wilson(self.value, self.count)


def _ended(run: Run) -> bool:
    told = [event.name for event in run.events if event.name in ("start", "finished")]
    return told[-1:] == ["finished"]


def load_arms(directories: Iterable[str | os.PathLike]) -> list[Arm]:
    """Read the runs of a comparison, in the order given.

    Raises:
      RecordError: no directory given, or one of them is not a readable run directory.
    """
    runs = [load_run(directory) for directory in directories]
    if not runs:
        raise RecordError("no run directory was given; name at least one")
    return arms_of(runs)


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Arms with unique labels: runs that share a name are told apart by their directory."""
    names = [run.name for run in runs]
    labels: list[str] = []
    for run, name in zip(runs, names, strict=True):
        label = name if names.count(name) == 1 else f"{name} ({run.directory.resolve().name})"
        labels.append(label if label not in labels else f"{name} ({run.directory})")
    return [Arm(i, label, run) for i, (label, run) in enumerate(zip(labels, runs, strict=True))]


def lookup(config: Any, *path: str) -> Any:
    """The value at a path of nested mappings, `None` where the path ends early."""
    for key in path:
        if not isinstance(config, dict) or key not in config:
            return None
        config = config[key]
    return config


def aggregate(measurements: Iterable[Measurement], keys: Sequence[str]) -> list[Cell]:
    """Count-weighted means over the measurements that agree in `keys`, ordered by those keys.

    Measurements that lack one of the keys, or of nothing (count 0), are left out. A NaN stays a NaN: it was measured.
    """
    groups: dict[tuple, list[Measurement]] = {}
    for m in measurements:
        if m.count > 0 and all(key in m.where for key in keys):
            groups.setdefault(tuple(m.where[key] for key in keys), []).append(m)
    cells = []
    for group in sorted(groups):
        count = sum(m.count for m in groups[group])
        mean = math.fsum(m.value * m.count for m in groups[group]) / count
        cells.append(Cell(dict(zip(keys, group, strict=True)), mean, count))
    return cells


def measured(arm: Arm, kind: str, name: str) -> list[tuple[str, Measurement]]:
    """What every evaluation of a kind found at the last step at which it was recorded, with how to label it apart.

    The label is empty where a run has one evaluation of the kind, else its name and a colon.
    """
    evaluations, found = arm.evaluations(kind), []
    for evaluation in evaluations:
        own = [m for m in arm.run.evals if m.evaluation == evaluation]
        step = max(m.step for m in own)
        label = f"{evaluation}: " if len(evaluations) > 1 else ""
        found += [(label, m) for m in own if (m.step, m.name) == (step, name)]
    return found


def wilson(fraction: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a fraction of `count` trials (Wilson 1927), 95 % by default.

    It stays within [0, 1] and has a width at 0 of n and n of n, where the normal approximation has none.
    """
    if count <= 0 or math.isnan(fraction):
        return 0.0, 1.0
    centre = (fraction + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(fraction * (1 - fraction) / count + z * z / (4 * count * count))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    # In exact arithmetic the interval contains the fraction; rounding at 0 and 1 must not break that.
    return min(low, fraction), max(high, fraction)


def retrieval(arm: Arm, facts: Facts = "all", keys: Sequence[str] = ("length",), name: str = "accuracy") -> list[Cell]:
    """Retrieval by `keys`; `facts` selects facts within one chunk, across a chunk border, or both."""

    def of(arm: Arm) -> list[Cell]:
        found = arm.measurements("retrieval", name)
        if facts != "all":
            found = [m for m in found if m.where.get("straddle") is (facts == "straddling")]
        return aggregate(found, keys)

    if not arm.seeds:
        return of(arm)
    values: dict[tuple, list[float]] = {}
    for run in arm.seeds:
        for cell in of(Arm(arm.index, arm.label, run)):
            values.setdefault(tuple(cell.where.values()), []).append(cell.value)
    spreads = {place: (min(found), max(found)) for place, found in values.items()}
    return [replace(cell, spread=spreads[tuple(cell.where.values())]) for cell in of(arm)]


def together(arms: Sequence[Arm], kind: str) -> list[Arm]:
    """Arms that one table may hold: where the evaluation called like its kind speaks for some, those with others go."""
    speaks = [next(iter(arm.evaluations(kind)), None) for arm in arms]
    return [arm for arm, name in zip(arms, speaks, strict=True) if kind not in speaks or name in (None, kind)]


def further(arms: Sequence[Arm], kind: str) -> list[tuple[str, list[Arm]]]:
    """Evaluations of a kind beside those that `together` shows: their names, and arms for which each speaks.

    What was taken only to follow the training (`train.eval_during`), at its length, is `study.reach`'s.
    """
    shown = {arm.label for arm in together(arms, kind)}
    own = {arm.label: [n for n in arm.evaluations(kind)[arm.label in shown :] if not _follows(arm, n)] for arm in arms}
    names = dict.fromkeys(name for arm in arms for name in own[arm.label])
    return [(name, [_only(arm, kind, name) for arm in arms if name in arm.evaluations(kind)]) for name in names]


def _follows(arm: Arm, evaluation: str) -> bool:
    lengths = {m.where.get("length") for m in arm.run.evals if m.evaluation == evaluation}
    named = lookup(arm.run.config, "train", "eval_during") or ()
    return evaluation in named and lengths == {arm.training_length}


def _only(arm: Arm, kind: str, name: str) -> Arm:
    """The arm without its other evaluations of the kind."""
    others = set(arm.evaluations(kind)) - {name}
    kept = lambda run: replace(run, evals=[m for m in run.evals if m.evaluation not in others])
    return replace(arm, run=kept(arm.run), seeds=tuple(map(kept, arm.seeds)))


def nll_by_position(arm: Arm) -> list[Cell]:
    """Loss by position bucket in the longest context measured; keys `length`, `from`, `to`.

    Only the longest: shorter contexts are other pieces of text, and mixing them would bend the curve.
    """
    cells = aggregate(arm.measurements("perplexity", "nll_by_position"), ("length", "from", "to"))
    longest = max((cell.where["length"] for cell in cells), default=None)
    return [cell for cell in cells if cell.where["length"] == longest]


def nll_by_length(arm: Arm) -> list[Cell]:
    return aggregate(arm.measurements("perplexity", "nll_by_length"), ("length",))


def chance(arms: Iterable[Arm]) -> float | None:
    """Accuracy of guessing, where the runs agree on one."""
    values = {cell.value for arm in arms for cell in aggregate(arm.measurements("retrieval", "chance"), ())}
    return values.pop() if len(values) == 1 else None


def in_multiples(arms: Iterable[Arm]) -> bool:
    """Whether context lengths can be counted in multiples of the training length: every config says its own."""
    return all(arm.training_length for arm in arms)


def by_length(arms: Iterable[Arm], arm: Arm, cells: Iterable[Cell]) -> dict[float, Cell]:
    """Cells by the context length at which they are compared: multiples of the training length, or tokens."""
    relative = in_multiples(arms)
    return {arm.multiple(c.where["length"]) if relative else c.where["length"]: c for c in cells}


def smooth(steps: Sequence[int], values: Sequence[float], span: float) -> list[float]:
    """Exponential mean of a curve with time constant `span` (in steps), unbiased at its beginning.

    Non-finite values are passed over: the mean of before goes on.
    """
    smoothed, total, weight, before = [], 0.0, 0.0, None
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value):
            keep = 0.0 if before is None else math.exp(-(step - before) / span)
            total, weight, before = keep * total + value, keep * weight + 1.0, step
        smoothed.append(total / weight if weight else math.nan)
    return smoothed


def missing(arms: Iterable[Arm]) -> list[str]:
    """What a reader must know before comparing: unfinished runs, evaluations not made, conditions that differ."""
    arms, notes = list(arms), []
    for arm in arms:
        step, planned = arm.run.last_step, arm.planned_steps
        if arm.untrained:
            pass
        elif not arm.run.train:
            notes.append(f"{arm.label}: recorded no training step.")
        elif arm.finished:
            pass
        elif planned is None and lookup(arm.run.config, "stages"):
            notes.append(f"{arm.label}: not finished, stopped at step {step:,}.")
        elif planned is None:
            notes.append(f"{arm.label}: its config does not say how many steps were planned (train.steps).")
        elif step < planned:
            notes.append(f"{arm.label}: not finished, stopped at step {step:,} of {planned:,}.")
        if not arm.training_length:
            notes.append(f"{arm.label}: its config does not say the training length (data.seq_len).")
        for kind in ("perplexity", "retrieval"):
            at = arm.measured_at(kind)
            expected = arm.planned(kind) or not arm.run.evals or any(other.evaluations(kind) for other in arms)
            if at is None and not expected:
                continue
            if at is None:
                notes.append(f"{arm.label}: {kind} was not measured.")
            elif at < step:
                notes.append(f"{arm.label}: {kind} was last measured at step {at:,}, training is at {step:,}.")
        for name in arm.evaluations("perplexity")[1:]:  # those of retrieval have tables of their own
            notes.append(f"{arm.label}: the evaluation {name!r} was measured too; it is not on this page.")
    lengths = {arm.label: arm.training_length for arm in arms if arm.training_length}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{label} {length:,}" for label, length in lengths.items())
        notes.append(f"The runs were trained at different lengths ({listed}); multiples are of each run's own.")
    for evaluation, kind, cells in (("retrieval", "retrieval", retrieval), ("loss", "perplexity", nll_by_length)):
        measured = {arm.label: by_length(arms, arm, cells(arm)) for arm in together(arms, kind) if cells(arm)}
        everything = set().union(*measured.values())
        unit = " × the training length" if in_multiples(arms) else " tokens"
        for label, own in measured.items():
            if absent := sorted(everything - set(own)):
                listed = ", ".join(f"{place:,g}" for place in absent)
                notes.append(f"{label}: {evaluation} was not measured at {listed}{unit}, as it was for other runs.")
    return notes
