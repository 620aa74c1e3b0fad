"""Runs that differ in their seed alone, as one arm of a comparison: their means, and how far they lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from irope_jax.core.config import differences
from irope_jax.core.records import Measurement, RecordError, Run, TrainRecord
from irope_jax.study.collect import Arm

MAY_DIFFER = ("seed", "data.seed", "name", "train.init_from")
"""Fields in which the runs of an arm may differ: their seeds, and what follows from them."""


def pooled_arm(index: int, label: str, runs: Sequence[Run]) -> Arm:
    """One arm of several runs.

    Raises:
      RecordError: their configs differ in more than the seed.
    """
    first = runs[0]
    for other in runs[1:]:
        changed = [line for line in differences(first.config, other.config) if line.split(":")[0] not in MAY_DIFFER]
        if changed:
            raise RecordError(
                f"{other.directory}: not of the same arm as {first.directory}: {'; '.join(changed[:3])}; run the cells "
                "of one grid, or report the runs one by one"
            )
    config = {**first.config, "name": label}
    if len(runs) == 1:
        return Arm(index, label, replace(first, config=config))
    last = max(run.last_step for run in runs)
    evals = [m for run in runs for m in _last_measured(run, last)]
    whole = Run(first.directory, config, first.fingerprint, _mean_losses(runs), evals, first.events)
    return Arm(index, label, whole, tuple(runs))


def _last_measured(run: Run, step: int) -> list[Measurement]:
    """What each evaluation found last, as if all runs had ended at one step."""
    ends: dict[str, int] = {}
    for m in run.evals:
        ends[m.evaluation] = max(m.step, ends.get(m.evaluation, m.step))
    return [replace(m, step=step) for m in run.evals if m.step == ends[m.evaluation]]


def _mean_losses(runs: Sequence[Run]) -> list[TrainRecord]:
    """Scalars that all runs recorded, averaged at the steps that all of them have."""
    by_step = [{record.step: record for record in run.train} for run in runs]
    found = []
    for step in sorted(set.intersection(*(set(one) for one in by_step))):
        records = [one[step] for one in by_step]
        names = set.intersection(*(set(record.scalars) for record in records))
        scalars: dict[str, Any] = {n: statistics.fmean(r.scalars[n] for r in records) for n in names}
        found.append(TrainRecord(step, records[0].time, scalars))
    return found
