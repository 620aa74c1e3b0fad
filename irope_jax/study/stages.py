"""The stages of a run as a table: what each cost, how it ended, and what the model then knew.

Here: reading stages out of records. What a stage is, is `train.curriculum`'s; evaluations are recorded at every border.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from irope_jax.core.records import Event, Measurement, Run
from irope_jax.study.collect import Arm
from irope_jax.study.tables import ABSENT, Table, nll, perplexity


@dataclass(frozen=True)
class Stage:
    """A stage that was begun.

    Attributes:
      name, length: as it was called, and tokens of its rows.
      begin, end: steps of the run before its first, and its last so far.
      gate: what its last gate found; None without a gate.
    """

    name: str
    length: int
    begin: int
    end: int
    gate: Event | None

    @property
    def verdict(self) -> str:
        """How it ended."""
        if self.gate is None:
            return "steps"
        return "gate" if self.gate.details.get("opens") else "limit"


def stages_of(run: Run) -> list[Stage]:
    """The stages that a run began, in order."""
    begun = {event.details["number"]: event for event in run.events if event.name == "stage"}
    events = [begun[number] for number in sorted(begun)]
    found = []
    for event, after in zip(events, [*events[1:], None]):
        end = after.step if after else run.last_step
        gates = [one for one in run.events if one.name == "gate" and event.step < one.step <= end]
        details = event.details
        found.append(Stage(details["stage"], details["length"], event.step, end, gates[-1] if gates else None))
    return found


def stages_table(arm: Arm) -> Table | None:
    """Rows = stages, columns = what was measured when they ended: of several seeds the means, of gates the first's.

    `None` for a run of one piece.
    """
    runs = arm.seeds or (arm.run,)
    stages = stages_of(runs[0])
    if not stages:
        return None
    names = {kind: (arm.evaluations(kind) or [None])[0] for kind in ("perplexity", "retrieval")}
    ends = list(zip(*([stage.end for stage in stages_of(run)] for run in runs)))
    losses = [_by_length(runs, names["perplexity"], "nll_by_length", own) for own in ends]
    right = [_by_length(runs, names["retrieval"], "accuracy", own) for own in ends]
    loss_lengths, right_lengths = (sorted({length for one in found for length in one}) for found in (losses, right))
    rows = []
    for stage, loss, accuracy in zip(stages, losses, right):
        own = [r.scalars["loss"] for r in arm.run.train if stage.begin < r.step <= stage.end and "loss" in r.scalars]
        own = [value for value in own[-max(1, len(own) // 20) :] if math.isfinite(value)]
        cells = [f"{nll(loss[n])} ({perplexity(loss[n])})" if n in loss else ABSENT for n in loss_lengths]
        cells += [f"{accuracy[n]:.3f}" if n in accuracy else ABSENT for n in right_lengths]
        steps = f"{stage.end - stage.begin:,}"
        trained = nll(statistics.fmean(own)) if own else ABSENT
        rows.append((stage.name, f"{stage.length:,}", steps, stage.verdict, trained, *cells))
    heads = [f"nats (perplexity) at {n:,}" for n in loss_lengths] + [f"retrieval at {n:,}" for n in right_lengths]
    columns = ("stage", "length", "steps", "ended by", "training loss", *heads)
    return Table(f"Stages of {arm.label}, measured as each ended", columns, tuple(rows))


def _by_length(runs: Sequence[Run], evaluation: str | None, name: str, steps: Sequence[int]) -> dict[int, float]:
    """Means by context length of what was measured at a step of each run."""
    found: dict[int, list[Measurement]] = {}
    for run, step in zip(runs, steps, strict=True):
        for one in run.evals:
            if one.step == step and one.evaluation == evaluation and one.name == name and "length" in one.where:
                found.setdefault(int(one.where["length"]), []).append(one)
    return {length: _mean(cells) for length, cells in found.items()}


def _mean(cells: Sequence[Measurement]) -> float:
    return sum(cell.value * cell.count for cell in cells) / sum(cell.count for cell in cells)
