"""Scores of tasks in words by context length and depth: which measurements, and the tables of them.

What evaluations are expected to record:

    text_tasks  score             0 to 1, count = questions          where task, length, depth (of tasks that have one)
    text_tasks  suite_score       mean over the tasks of a suite     where suite, tasks, length
    text_tasks  effective_length  tokens, 0 if none                  where suite, tasks, threshold
    passkey     accuracy          0 to 1, count = texts              where length, depth

Evaluations by likelihood that are neither loss by length nor by position stand in one table, as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from irope_jax.core.records import Measurement
from irope_jax.study.collect import Arm, Cell, aggregate, measured
from irope_jax.study.tables import ABSENT, Table, accuracy, nll

LIKELIHOODS = {
    "sliding_perplexity": ("nll_sliding",),
    "cropped_perplexity": ("nll_full", "nll_cropped", "context_gain"),
    "long_perplexity": ("long_nll", "key_share"),
    "multiple_choice": ("acc", "acc_norm", "chance"),
}
"""Kinds of evaluations and what they measure, in the order of the table."""


def _suite(label: str, m: Measurement) -> str:
    return f"{label}{m.where['suite']}, {m.where['tasks']} tasks"


def task_scores(arm: Arm, keys: Sequence[str] = ("length",)) -> dict[str, list[Cell]]:
    """Per task its cells by `keys`, tasks in the order in which they were measured; passkeys are a task too."""
    found: dict[str, list] = {}
    scores = measured(arm, "text_tasks", "score")
    homes: dict[str, set[str]] = {}
    for label, m in scores:
        homes.setdefault(m.where["task"], set()).add(label)
    for label, m in scores:
        task = m.where["task"]
        found.setdefault(label + task if len(homes[task]) > 1 else task, []).append(m)
    for label, m in measured(arm, "passkey", "accuracy"):
        found.setdefault(f"{label}passkey", []).append(m)
    cells = {task: aggregate(measurements, keys) for task, measurements in found.items()}
    return {task: own for task, own in cells.items() if own}


def suite_scores(arm: Arm) -> dict[str, list[Cell]]:
    """Per suite its mean score by length, suites named with how many tasks they had."""
    found: dict[str, list] = {}
    for label, m in measured(arm, "text_tasks", "suite_score"):
        found.setdefault(_suite(label, m), []).append(m)
    return {suite: aggregate(measurements, ("length",)) for suite, measurements in found.items()}


def thresholds(arms: Sequence[Arm]) -> dict[str, float]:
    """Per suite, named as in `suite_scores`, the score above which a length is effective."""
    found = [pair for arm in arms for pair in measured(arm, "text_tasks", "effective_length")]
    return {_suite(label, m): m.where["threshold"] for label, m in found}


def scores_table(arm: Arm) -> Table | None:
    """Scores of one run (95 % Wilson interval): rows = tasks and suites, columns = context lengths."""
    rows = {**task_scores(arm), **{f"mean of {suite}": cells for suite, cells in suite_scores(arm).items()}}
    lengths = sorted({cell.where["length"] for cells in rows.values() for cell in cells})
    if not lengths:
        return None
    written = []
    for name, cells in rows.items():
        own = {cell.where["length"]: cell for cell in cells}
        # A mean over tasks is no fraction of trials, so it has no interval.
        interval = not name.startswith("mean of ")
        written.append((name, *(accuracy(own[n], interval) if n in own else ABSENT for n in lengths)))
    return Table(f"{arm.label}: scores by context length", ("task", *(f"{n:,}" for n in lengths)), tuple(written))


def effective_table(arms: Sequence[Arm]) -> Table | None:
    """The effective length of each run by suite, with the threshold in the head."""
    limits, rows = thresholds(arms), []
    for arm in arms:
        found = {_suite(label, m): int(m.value) for label, m in measured(arm, "text_tasks", "effective_length")}
        if found:
            cells = (
                f"{found[suite]:,}" if found.get(suite) else "none" if suite in found else ABSENT for suite in limits
            )
            rows.append((arm.label, *cells))
    heads = (f"{suite} (score above {100 * limit:g} %)" for suite, limit in limits.items())
    return Table("Effective length, tokens", ("run", *heads), tuple(rows)) if rows else None


def likelihood_table(arms: Sequence[Arm]) -> Table | None:
    """Sliding, cropped and long perplexity and multiple choice: rows = measures, columns = runs."""
    rows: dict[str, dict[str, str]] = {}
    for kind, names in LIKELIHOODS.items():
        for name in names:
            for arm in arms:
                for label, m in measured(arm, kind, name):
                    where = ", ".join(f"{key} {value:,}" for key, value in m.where.items())
                    label += f"{name} ({where})" if where else name
                    rows.setdefault(label, {})[arm.label] = f"{nll(m.value)} (n={m.count:,})"
    if not rows:
        return None
    columns = [arm.label for arm in arms]
    written = ((label, *(own.get(column, ABSENT) for column in columns)) for label, own in rows.items())
    return Table("Other likelihoods", ("measure", *columns), tuple(written))
