"""Time and memory by context length: which measurements, their table and their figure.

What evaluations are expected to record:

    cost  prefill_seconds  of a whole text              where length
    cost  token_seconds    of one token after it        where length
    cost  cache_bytes      of the KV cache              where length
    cost  peak_bytes       beyond what was held before  where length
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from irope_jax.study import plots
from irope_jax.study.collect import Arm, measured
from irope_jax.study.tables import ABSENT, Table, three_digits

MEASURES = (
    ("prefill_seconds", "reading the text, s", 1.0),
    ("token_seconds", "a token after it, ms", 1e-3),
    ("cache_bytes", "KV cache, MB", 1e6),
    ("peak_bytes", "most memory held, MB", 1e6),
)
"""Name, what to call it, unit."""


def costs(arms: Sequence[Arm], name: str) -> dict[str, dict[int, float]]:
    """Per line of the figure (a run, or an evaluation of a run with several) what was measured, by length."""
    found: dict[str, dict[int, float]] = {}
    for arm in arms:
        several = len(arm.evaluations("cost")) > 1
        for label, m in measured(arm, "cost", name):
            evaluation = label.removesuffix(": ")
            line = arm.label if not several else evaluation if len(arms) == 1 else f"{arm.label}: {evaluation}"
            found.setdefault(line, {})[int(m.where["length"])] = m.value
    return found


def cost_tables(arms: Sequence[Arm]) -> list[Table]:
    """A table for each measure: rows = lines of the figure, columns = lengths."""
    tables = []
    for name, title, unit in MEASURES:
        found = costs(arms, name)
        lengths = sorted({length for own in found.values() for length in own})
        rows = tuple(
            (line, *(three_digits(own[n] / unit) if n in own else ABSENT for n in lengths))
            for line, own in found.items()
        )
        if rows:
            tables.append(Table(title[0].upper() + title[1:], ("tokens", *(f"{n:,}" for n in lengths)), rows))
    return tables


def cost_by_length(arms: Sequence[Arm], path: Path) -> Path | None:
    """A panel for each measure, both axes logarithmic: lines of slope 1 grow as the text does."""
    panels = [(title, unit, found) for name, title, unit in MEASURES if (found := costs(arms, name))]
    if not panels:
        return None
    lines = list(dict.fromkeys(line for _, _, found in panels for line in found))
    figure, axes = plots.pyplot().subplots(2, 2, figsize=(plots.WIDTH, 5.6), squeeze=False, sharex=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    styles = [Arm(number, line, arms[0].run) for number, line in enumerate(lines)]
    for (title, unit, found), axis in zip(panels, axes.flat):
        for style in styles:
            own = sorted(found.get(style.label, {}).items())
            axis.plot([n for n, _ in own], [value / unit for _, value in own], **plots.run_line(style))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        values = [value / unit for own in found.values() for value in own.values() if value > 0]
        plots.plain_log_axis(axis.yaxis, min(values, default=1.0), max(values, default=1.0))
        plots.set_lengths(axis, sorted({n for own in found.values() for n in own}), plots.short_tokens)
        axis.set_title(title)
    for axis in axes[-1]:
        axis.set_xlabel("context, tokens")
    plots.legend_above(figure, list(axes.flat[: len(panels)]), styles)
    return plots.save_figure(figure, path)
