"""After how many steps a run could retrieve: from evaluations that were taken while it trained (`train.eval_every`)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from irope_jax.core.records import Run
from irope_jax.study.collect import Arm, aggregate
from irope_jax.study.tables import Table

ACCURACIES = (0.5, 0.9, 0.97)


def steps_table(arms: Sequence[Arm]) -> Table | None:
    """The first measured step from which on accuracy at the training length was never below: rows = runs.

    The mean over seeds, in brackets the least and the greatest. `None` if no run was measured while it trained.
    """
    rows = []
    for arm in arms:
        courses = [course for run in arm.seeds or (arm.run,) if len(course := _course(arm, run)) > 1]
        if courses:
            rows.append((arm.label, *(_reached(courses, accuracy) for accuracy in ACCURACIES)))
    if not rows:
        return None
    columns = ("run", *(f"{accuracy:g}" for accuracy in ACCURACIES))
    return Table("Steps until retrieval at the training length stayed at or above", columns, tuple(rows))


def _course(arm: Arm, run: Run) -> dict[int, float]:
    """Accuracy by step, of the retrieval evaluation that was taken most often."""
    courses = []
    for name in Arm(arm.index, arm.label, run).evaluations("retrieval"):
        own = [m for m in run.evals if (m.evaluation, m.name) == (name, "accuracy")]
        steps = sorted({m.step for m in own if m.where.get("length") == arm.training_length})
        at = lambda step, own=own: [m for m in own if m.step == step and m.where.get("length") == arm.training_length]
        courses.append({step: cells[0].value for step in steps if (cells := aggregate(at(step), ("length",)))})
    return max(courses, key=len, default={})


def _reached(courses: Sequence[dict[int, float]], accuracy: float) -> str:
    found = []
    for course in courses:
        below = [step for step, value in course.items() if not value >= accuracy]
        after = [step for step in course if not below or step > below[-1]]
        found += after[:1]
    never, longest = len(courses) - len(found), max(map(max, courses))
    if not found:
        return f"not in {longest:,}"
    spread = f" ({min(found):,}–{max(found):,})" if len(found) > 1 else ""
    missing = f", {never} of {len(courses)} not in {longest:,}" if never else ""
    return f"{statistics.fmean(found):,.0f}{spread}{missing}"
