"""Figures of where layers look: maps of layers and heads, curves by position. What is drawn is `attention`'s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from irope_jax.study import plots
from irope_jax.study.attention import by_head, by_position, kind_of, layer_kinds, looked
from irope_jax.study.collect import Arm


def head_maps(arms: Sequence[Arm], path: Path) -> Path | None:
    """Mean distance and mass on the first tokens of every head: a line of two maps for each run."""
    arms = [arm for arm in arms if layer_kinds(arm)]
    if not arms:
        return None
    plt = plots.pyplot()
    from matplotlib.colors import LogNorm

    most = max(len(layer_kinds(arm)) for arm in arms)
    height = 1.0 + len(arms) * (0.7 + max(1.5, min(0.24 * most, 6.5)))
    figure, axes = plt.subplots(len(arms), 2, figsize=(plots.WIDTH, height), squeeze=False, layout="constrained")
    distances = [max(v, 0.0) for arm in arms for line in by_head(arm, "distance") for v in line if math.isfinite(v)]
    low, high = max(1.0, min(distances)), max(2.0, *distances)
    scales = ("distance", LogNorm(low, max(high, 1.01 * low))), ("sink_mass", plt.Normalize(0, 1))
    for line, arm in zip(axes, arms, strict=True):
        kinds, length = list(layer_kinds(arm).values()), looked(arm, "distance")[0].where["length"]
        for axis, (name, norm) in zip(line, scales, strict=True):
            grid = by_head(arm, name)
            axis.set_facecolor("#dddddd")
            image = axis.imshow(grid, norm=norm, cmap="cividis", aspect="auto", interpolation="none")
            _write_cells(axis, grid, norm, decimals=2 if name == "sink_mass" else 0)
            axis.grid(False, which="major")
            axis.set_xticks(range(len(grid[0])))
            axis.set_xlabel("head")
            axis.tick_params(length=0)
            for spine in axis.spines.values():
                spine.set_visible(False)
            bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02, aspect=25)
            bar.outline.set_visible(False)
            if name == "distance":
                bar.ax.yaxis.set_major_formatter(plots.plain_numbers())
                bar.ax.yaxis.set_minor_formatter(plots.plain_numbers((1, 2, 5)))
        _name_layers(line[0], kinds)
        line[1].set_yticks(range(len(kinds)), [f"{n}" for n in range(len(kinds))], fontsize=8)
        title = f"{arm.label}, {length:,} tokens" if len(arms) > 1 else f"in {length:,} tokens"
        line[0].set_title(f"Mean distance, tokens\n{title}", color=plots.run_colour(arm) if len(arms) > 1 else "black")
        line[1].set_title("Mass on the first tokens\nof document or chunk")
    return plots.save_figure(figure, path)


def entropy_curves(arms: Sequence[Arm], path: Path) -> Path | None:
    """Entropy by position: a panel for each run, a thin line for each layer, a thick one for each kind of layers."""
    found = [(arm, by_position(arm, "entropy", ("layer", "mask", "position"))) for arm in arms]
    found = [(arm, curves) for arm, curves in found if curves]
    if not found:
        return None
    plt = plots.pyplot()
    width = plots.WIDTH if len(found) > 1 else 0.75 * plots.WIDTH
    columns = min(2, len(found))
    lines = math.ceil(len(found) / columns)
    size = (width, 0.6 + 3.2 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    every = dict.fromkeys(kind for arm, _ in found for kind in layer_kinds(arm).values())
    colours = {kind: plots.COLOURS[i % len(plots.COLOURS)] for i, kind in enumerate(every)}
    for axis, (arm, curves) in zip(axes.flat, found):
        for (_, mask, position), cells in curves.items():
            colour = colours[kind_of({"mask": mask, "position": position})]
            axis.plot(*_points(cells), color=colour, linewidth=0.7, alpha=0.35)
        for (mask, position), cells in by_position(arm, "entropy", ("mask", "position")).items():
            kind = kind_of({"mask": mask, "position": position})
            axis.plot(*_points(cells), color=colours[kind], linewidth=2.2, marker="o", markersize=4, label=kind)
        widest = max(curves.values(), key=len)
        xs = [x for x in sorted({c.where[key] for c in widest for key in ("from", "to")}) if x >= 1]
        places, even = _points(widest)[0], [_mean_log(c.where["from"], c.where["to"]) for c in widest]
        axis.plot(places, even, color=plots.GREY, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        axis.annotate(
            "even over all", (places[-1], even[-1]), (-8, 2), textcoords="offset points", color=plots.GREY,
            fontsize=8.5, ha="right", va="bottom",
        )  # fmt: skip
        axis.set_xscale("log", base=2)
        plots.set_lengths(axis, xs, plots.short_tokens)
        axis.set_xlabel("position in the document, tokens")
        axis.set_title(arm.label if len(found) > 1 else "Entropy of attention by position")
        axis.legend(frameon=False, fontsize=9, loc="upper left")
    for line in axes:
        line[0].set_ylabel("entropy, nats")
    return plots.save_figure(figure, path)


def _mean_log(low: int, high: int) -> float:
    """Mean of `log(p + 1)` over the positions `low` to `high - 1`: the entropy of even attention to all before."""
    return (math.lgamma(high + 1) - math.lgamma(low + 1)) / (high - low)


def _points(cells) -> tuple[list[float], list[float]]:
    """A bucket stands at its geometric middle; the one that begins at 0 has none."""
    xs = [math.sqrt(max(c.where["from"], 0.5) * c.where["to"]) for c in cells]
    return xs, [c.value for c in cells]


def _name_layers(axis, kinds: Sequence[str]) -> None:
    """Layer numbers with their kinds, where there is more than one; global layers bold."""
    several = len(set(kinds)) > 1
    names = [f"{kind}  {n}" if several else f"{n}" for n, kind in enumerate(kinds)]
    axis.set_yticks(range(len(kinds)), names, fontsize=8)
    axis.set_ylabel("layer" if several else f"layer (all {kinds[0]})")
    if several:
        for label, kind in zip(axis.get_yticklabels(), kinds, strict=True):
            label.set_fontweight("bold" if kind.startswith("global") else "normal")


def _write_cells(axis, grid: Sequence[Sequence[float]], norm, decimals: int) -> None:
    """Numbers in the cells where there is room for them; at least one decimal below 10."""
    if len(grid[0]) > 12 or len(grid) > 40:
        return
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            ink = "black" if math.isnan(value) or norm(value) > 0.55 else "white"
            text = "–" if math.isnan(value) else f"{value:,.{decimals or int(value < 9.95)}f}"
            axis.text(x, y, text, ha="center", va="center", color=ink, fontsize=6.5)
