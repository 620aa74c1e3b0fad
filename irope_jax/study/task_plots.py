"""Figures of tasks in words: maps by length and depth, curves by length. What is drawn is `text_tasks`'."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from irope_jax.study import plots
from irope_jax.study.collect import Arm, Cell
from irope_jax.study.text_tasks import suite_scores, task_scores, thresholds


def task_maps(arms: Sequence[Arm], path: Path) -> Path | None:
    """Score by context length and depth: a map for each run and each task that has depths."""
    maps = [
        (arm, task if len(arms) == 1 else f"{arm.label}: {task}", cells)
        for arm in arms
        for task, cells in task_scores(arm, ("length", "depth")).items()
    ]
    return plots.draw_maps(maps, path, "score") if maps else None


def suite_by_length(arms: Sequence[Arm], path: Path) -> Path | None:
    """Mean score of each suite by context length, with its threshold: a panel for each suite, a line for each run."""
    found = {arm.label: suite_scores(arm) for arm in arms}
    suites = list(dict.fromkeys(suite for own in found.values() for suite in own))
    panels = {suite: {label: own[suite] for label, own in found.items() if suite in own} for suite in suites}
    limits = thresholds(arms)
    return _panels(arms, panels, path, {suite: limits[suite] for suite in suites if suite in limits})


def tasks_by_length(arms: Sequence[Arm], path: Path) -> Path | None:
    """Score of each task by context length: a panel for each task, a line for each run, the 95 % Wilson band."""
    found = {arm.label: task_scores(arm) for arm in arms}
    tasks = list(dict.fromkeys(task for own in found.values() for task in own))
    panels = {task: {label: own[task] for label, own in found.items() if task in own} for task in tasks}
    return _panels(arms, panels, path, {}, bands=True)


def _panels(
    arms: Sequence[Arm],
    panels: dict[str, dict[str, list[Cell]]],
    path: Path,
    limits: dict[str, float],
    bands: bool = False,
) -> Path | None:
    """A panel for each entry, all with the same axes; nothing where there is no entry."""
    if not panels:
        return None
    columns = min(len(panels), 4)
    lines = math.ceil(len(panels) / columns)
    width = plots.WIDTH if columns > 1 else 0.7 * plots.WIDTH
    height = 0.7 + lines * (2.0 if columns > 2 else 2.8)
    figure, axes = plots.pyplot().subplots(
        lines, columns, figsize=(width, height), squeeze=False, sharex=True, sharey=True
    )
    lengths = sorted({c.where["length"] for own in panels.values() for cells in own.values() for c in cells})
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for number, ((title, own), axis) in enumerate(zip(panels.items(), axes.flat)):
        for arm in arms:
            cells = own.get(arm.label, [])
            xs, values = [cell.where["length"] for cell in cells], [cell.value for cell in cells]
            if cells and bands:
                low, high = zip(*(cell.interval for cell in cells))
                axis.fill_between(xs, low, high, color=plots.run_colour(arm), alpha=0.15, linewidth=0)
            if cells:
                axis.plot(xs, values, **plots.run_line(arm))
        if title in limits:
            axis.axhline(limits[title], color=plots.GREY, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
            axis.annotate(
                f"{100 * limits[title]:g} %", (0, limits[title]), (4, 3), xycoords=("axes fraction", "data"),
                textcoords="offset points", color=plots.GREY, fontsize=8.5,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        plots.set_lengths(axis, lengths, plots.short_tokens, at_most=4 if columns > 2 else 8)
        axis.set_ylim(-0.03, 1.05)
        axis.set_title("\n".join(textwrap.wrap(title, 20 if columns > 2 else 40)), fontsize=9)
        if number % columns == 0:
            axis.set_ylabel("score")
        if number + columns >= len(panels):
            axis.set_xlabel("context, tokens")
            axis.tick_params(labelbottom=True)
    plots.legend_above(figure, list(axes.flat[: len(panels)]), arms)
    return plots.save_figure(figure, path)
