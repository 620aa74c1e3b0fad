"""What the time of a run went into, from its records: goodput is the share of it that was training that lasted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from irope_jax.core.records import Run
from irope_jax.study.collect import Arm
from irope_jax.study.tables import ABSENT, Table

COLUMNS = ("steps", "compile", "data", "checkpoint", "evaluation", "start-up", "profile", "lost")


def seconds_spent(run: Run) -> dict[str, float]:
    """Seconds by activity, `lost` and `away` among them; empty for a run that recorded none.

    A run tells at each checkpoint what it did since the last one. What a process did after that and took into its grave
    is `lost`: steps that were done again, up to its last sign of life. Time between that and the next process is `away`
    and belongs to no share.
    """
    total: dict[str, float] = defaultdict(float)
    told = None  # when the newest account ends
    fresh = True  # whether the next account is the first of its process
    alive = None  # last sign of life of the process before
    for event in run.events:
        if event.name == "start" and event.details.get("before") is not None:
            alive, fresh = event.details["before"], True
        if event.name != "spent":
            continue
        begin = event.time - sum(event.details.values())
        if fresh and told is not None and alive is not None:
            total["lost"] += max(alive - told, 0.0)
            total["away"] += max(begin - max(alive, told), 0.0)
        for name, seconds in event.details.items():
            total[name] += seconds
        told, fresh, alive = event.time, False, None
    return dict(total)


def goodput(spent: dict[str, float]) -> float:
    """Share of `steps`; NaN where nothing was spent."""
    total = sum(seconds for name, seconds in spent.items() if name != "away")
    return spent.get("steps", 0.0) / total if total else float("nan")


def goodput_table(arms: Sequence[Arm]) -> Table | None:
    """Rows = runs, columns = where the time went. `None` if no run tells."""
    found = {arm.label: spent for arm in arms if (spent := seconds_spent(arm.run))}
    if not found:
        return None

    columns = tuple(name for name in COLUMNS if any(spent.get(name) for spent in found.values()))

    def row(label: str, spent: dict[str, float]) -> tuple[str, ...]:
        total = sum(seconds for name, seconds in spent.items() if name != "away")
        shares = (f"{spent[name] / total:.1%}" if spent.get(name) else ABSENT for name in columns)
        return (label, f"{total:,.0f} s", *shares)

    rows = tuple(row(label, spent) for label, spent in found.items())
    return Table("Where the time went (goodput: the share of steps)", ("run", "in all", *columns), rows)
