"""Figures of a comparison, as PNG files that stay legible at 800 pixels width.

Here: drawing. Not here: what is drawn (collect). Every figure takes all arms of the comparison and a path, returns the
path, or `None` if nothing of it was measured. A run has the same colour and marker in every figure; colours are those
of Okabe and Ito, told apart by colour-blind eyes, and markers tell runs apart in black and white. matplotlib is
imported only when something is drawn.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from irope_jax.study.collect import (
    Arm,
    Cell,
    Facts,
    by_length,
    chance,
    in_multiples,
    nll_by_position,
    retrieval,
    smooth,
    together,
)
from irope_jax.study.tables import times

WIDTH = 8.0
"""Inches; at 200 dots per inch and shown 800 pixels wide, 10 points are 14 pixels."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#6b6b6b"


class PlotsMissingError(RuntimeError):
    """matplotlib is not installed."""


def headline(arms: Sequence[Arm], path: Path, facts: Facts = "all") -> Path | None:
    """Retrieval by context length beside loss by position: does it still find, does it still read."""
    panels: list[Callable] = []
    if any(retrieval(arm, facts) for arm in arms):
        panels.append(lambda axis, arms: _draw_retrieval(axis, arms, facts))
    if any(nll_by_position(arm) for arm in arms):
        panels.append(_draw_nll_by_position)
    if not panels:
        return None
    plt = pyplot()
    size = (WIDTH if len(panels) > 1 else 0.6 * WIDTH, height_for(arms, 3.5))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, draw in zip(axes[0], panels, strict=True):
        draw(axis, arms)
    legend_above(figure, axes[0], arms)
    return save_figure(figure, path)


def retrieval_by_length(arms: Sequence[Arm], path: Path, facts: Facts = "all") -> Path | None:
    """Accuracy by context length, with the 95 % Wilson band and the line of chance."""
    if not any(retrieval(arm, facts) for arm in arms):
        return None
    figure, axis = pyplot().subplots(figsize=(WIDTH, height_for(arms, 3.9)))
    _draw_retrieval(axis, arms, facts)
    legend_above(figure, [axis], together(arms, "retrieval"))
    return save_figure(figure, path)


def perplexity_by_position(arms: Sequence[Arm], path: Path) -> Path | None:
    """Perplexity by position (log2 buckets), with a line where training ended."""
    if not any(nll_by_position(arm) for arm in arms):
        return None
    figure, axis = pyplot().subplots(figsize=(WIDTH, height_for(arms, 3.9)))
    _draw_nll_by_position(axis, arms, as_perplexity=True)
    legend_above(figure, [axis], arms)
    return save_figure(figure, path)


def loss_curves(arms: Sequence[Arm], path: Path) -> Path | None:
    """Training loss by step, raw (faint) and smoothed, several runs in one panel."""
    curves = [(arm, *arm.run.series("loss")) for arm in arms]
    curves = [(arm, steps, losses) for arm, steps, losses in curves if any(math.isfinite(v) for v in losses)]
    if not curves:
        return None
    figure, axis = pyplot().subplots(figsize=(WIDTH, height_for(arms, 3.9)))
    smoothed_all = []
    for arm, steps, losses in curves:
        span = max(1.0, (steps[-1] - steps[0]) / 30)
        smoothed = smooth(steps, losses, span)
        smoothed_all += [v for v in smoothed if math.isfinite(v)]
        colour = run_colour(arm)
        axis.plot(steps, losses, color=colour, linewidth=0.7, alpha=0.3)
        style = {name: run_line(arm)[name] for name in ("linestyle", "linewidth")}
        axis.plot(steps, smoothed, color=colour, label=arm.label, **style)
        if not arm.finished:
            axis.plot(steps[-1], smoothed[-1], "x", color=colour, markersize=8, markeredgewidth=2)
    if any(not arm.finished for arm, _, _ in curves):
        _note(axis, "× not finished")
    low, high = min(smoothed_all), max(smoothed_all)
    margin = 0.08 * (high - low) or 0.1
    axis.set_ylim(low - margin, high + margin)
    axis.set_xlim(left=0)
    axis.set_xlabel("training step")
    axis.set_ylabel("loss, nats per token")
    axis.xaxis.set_major_formatter(_ticker().FuncFormatter(lambda value, _: f"{value:,.0f}"))
    legend_above(figure, [axis], [arm for arm, _, _ in curves])
    return save_figure(figure, path)


def heat_maps(arms: Sequence[Arm], path: Path, facts: Facts = "all") -> Path | None:
    """Accuracy by context length and depth of the fact: one map per run, one colour scale for all."""
    maps = [(arm, retrieval(arm, facts, ("length", "depth"))) for arm in together(arms, "retrieval")]
    maps = [(arm, arm.label, cells) for arm, cells in maps if cells]
    return draw_maps(maps, path, "retrieval accuracy") if maps else None


def draw_maps(maps: Sequence[tuple[Arm, str, Sequence[Cell]]], path: Path, what: str) -> Path:
    """A map by context length and depth for each `(run, title, cells)`, all on one colour scale from 0 to 1.

    Args:
      maps: at least one; cells have `length` and `depth`.
      path: PNG file to write.
      what: is measured, written along the scale.
    """
    plt = pyplot()
    widest = max(len({cell.where["length"] for cell in cells}) for _, _, cells in maps)
    depths = sorted({cell.where["depth"] for _, _, cells in maps for cell in cells})
    columns = min(len(maps), 3 if widest <= 6 else 2)
    lines = math.ceil(len(maps) / columns)
    width = WIDTH if columns > 1 else 5.5
    height = 0.9 + lines * (0.75 + max(1.6, min(0.32 * len(depths), 3.2)))
    figure, axes = plt.subplots(lines, columns, figsize=(width, height), squeeze=False, layout="constrained")
    for axis in axes.flat[len(maps) :]:
        axis.set_visible(False)
    for place, ((arm, title, cells), axis) in enumerate(zip(maps, axes.flat)):
        lengths = sorted({cell.where["length"] for cell in cells})
        grid = [[math.nan] * len(lengths) for _ in depths]
        for cell in cells:
            grid[depths.index(cell.where["depth"])][lengths.index(cell.where["length"])] = cell.value
        axis.set_facecolor("#dddddd")
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="none")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                shown = "–" if math.isnan(value) else _hundredths(value)
                ink = "black" if math.isnan(value) or value > 0.55 else "white"
                axis.text(x, y, shown, ha="center", va="center", color=ink, fontsize=8)
        # White lines between the cells: equal neighbours stay countable.
        axis.set_xticks([x - 0.5 for x in range(1, len(lengths))], minor=True)
        axis.set_yticks([y - 0.5 for y in range(1, len(depths))], minor=True)
        axis.grid(False, which="major")
        axis.grid(which="minor", color="white", linewidth=1.0)
        axis.tick_params(which="both", length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        letters = max(8, int(0.85 * width / columns * 72 / 6.5))
        axis.set_title("\n".join(textwrap.wrap(title, letters)), color=run_colour(arm))
        heads = [f"{times(arm.multiple(n))}\n{short_tokens(n)}" if arm.training_length else f"{n:,}" for n in lengths]
        axis.set_xticks(range(len(lengths)), heads, fontsize=8)
        if place % columns == 0:
            axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=8)
            axis.set_ylabel("depth of the fact")
        else:
            axis.set_yticks([])
    relative = all(arm.training_length for arm, _, _ in maps)
    figure.supxlabel("context length" + (" (× training length, tokens)" if relative else ", tokens"), fontsize=10)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=25)
    bar.set_label(what)
    bar.outline.set_visible(False)
    return save_figure(figure, path)


def _draw_retrieval(axis, arms: Sequence[Arm], facts: Facts = "all") -> None:
    arms = together(arms, "retrieval")
    relative = in_multiples(arms)
    ticks: dict[float, None] = {}
    for arm in arms:
        cells = retrieval(arm, facts)
        if not cells:
            continue
        xs = list(by_length(arms, arm, cells))
        ticks.update(dict.fromkeys(xs))
        bounds = [cell.interval for cell in cells]
        low, high = [bound[0] for bound in bounds], [bound[1] for bound in bounds]
        axis.fill_between(
            xs, low, high, color=run_colour(arm), alpha=0.2 if len(arms) <= len(COLOURS) else 0.1, linewidth=0
        )
        axis.plot(xs, [cell.value for cell in cells], **run_line(arm))
    guess = chance(arms)
    if guess is not None:
        axis.axhline(guess, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        axis.annotate(
            "chance", (0, guess), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points", color=GREY,
            fontsize=8.5,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    set_lengths(axis, sorted(ticks), times if relative else short_tokens)
    if relative and min(ticks) < 1:
        _mark_training(axis, 1.0, height=0.3)  # accuracy is high there
    axis.set_ylim(-0.03, 1.05)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axis.set_xlabel("context length" + (", × training length" if relative else ", tokens"))
    axis.set_ylabel("retrieval accuracy")
    about = {"all": "by context length", "inside": "inside one chunk", "straddling": "across a chunk border"}
    axis.set_title(f"Retrieval {about[facts]}")


def _draw_nll_by_position(axis, arms: Sequence[Arm], as_perplexity: bool = False) -> None:
    trained = [arm for arm in arms if arm.training_length and nll_by_position(arm)]
    lengths = sorted({arm.training_length for arm in trained})
    # The first positions are guessed with next to no context: high for every model, they would flatten the rest.
    first = min(lengths, default=16) / 32
    drawn, borders = [], set()
    for arm in arms:
        cells = [c for c in nll_by_position(arm) if c.where["to"] > first]
        if not cells:
            continue
        lows, highs = [c.where["from"] for c in cells], [c.where["to"] for c in cells]
        # A bucket stands at its geometric middle; the one that begins at 0 has none.
        xs = [math.sqrt(max(low, 0.5) * high) for low, high in zip(lows, highs, strict=True)]
        values = [math.exp(min(c.value, 50.0)) if as_perplexity else c.value for c in cells]
        borders.update(lows, highs)
        drawn += [v for v in values if math.isfinite(v)]
        axis.plot(xs, values, **run_line(arm))
    axis.set_xscale("log", base=2)
    if as_perplexity:
        axis.set_yscale("log")
    set_lengths(axis, sorted(b for b in borders if b > 0), short_tokens, at_most=10 if as_perplexity else 6)
    for length in lengths:
        own = [arm for arm in trained if arm.training_length == length]
        text = "training\nlength" if len(lengths) == 1 else f"trained\nat {short_tokens(length)}"
        _mark_training(axis, length, text, run_colour(own[0]) if len(own) == 1 < len(trained) else GREY)
    if drawn:
        low, high = min(drawn), max(drawn)
        if as_perplexity:
            ratio = max(high / low, 1.2) ** 0.1
            axis.set_ylim(low / ratio, high * ratio)
            plain_log_axis(axis.yaxis, low / ratio, high * ratio)
        else:
            margin = 0.1 * max(high - low, 0.1)
            axis.set_ylim(low - margin, high + margin)
    axis.set_xlabel("position in the document, tokens")
    axis.set_ylabel("perplexity per token" if as_perplexity else "loss, nats per token")
    axis.set_title("Perplexity by position" if as_perplexity else "Loss by position")


def _mark_training(
    axis, place: float, text: str = "training\nlength", colour: str = GREY, height: float = 0.985
) -> None:
    axis.axvline(place, color=colour, linewidth=1.2, linestyle=":", zorder=1)
    axis.annotate(
        text, (place, height), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
        va="top", ha="left", color=colour, fontsize=8.5, linespacing=0.95, zorder=1,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
    )  # fmt: skip


def set_lengths(axis, places: Sequence[float], write: Callable[[float], str], at_most: int = 7) -> None:
    every = math.ceil(len(places) / at_most) if places else 1
    shown = places[::every]
    axis.set_xticks(shown, [write(place) for place in shown])
    axis.xaxis.set_minor_locator(_ticker().NullLocator())


def plain_log_axis(axis, low: float, high: float) -> None:
    """Ticks 1 2 5 10 … written as plain numbers; finer ones where the range is small."""
    subs = (1, 2, 5) if high / low > 6 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9) if high / low > 2 else None
    ticker = _ticker()
    axis.set_major_locator(ticker.LogLocator(subs=subs) if subs else ticker.MaxNLocator(6))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axis.set_minor_locator(ticker.NullLocator())


def short_tokens(length: float) -> str:
    for size, prefix in ((2**20, "M"), (2**10, "k")):
        if length >= size and length % (size // 4) == 0:
            return f"{length / size:g}{prefix}"
    return f"{length:g}"


def _hundredths(value: float) -> str:
    return "1" if value == 1 else "0" if value == 0 else f"{min(value, 0.99):.2f}"[1:]


def height_for(arms: Sequence[Arm], few: float) -> float:
    """Inches, so many for a few curves; many need room."""
    return few + 0.15 * max(0, len(arms) - len(COLOURS))


def run_colour(arm: Arm) -> str:
    return COLOURS[arm.index % len(COLOURS)]


def run_line(arm: Arm) -> dict:
    """A colour and a marker of its own; where colours are used up, again with other markers, hollow, and dashes."""
    again = arm.index // len(COLOURS)
    return {
        "color": run_colour(arm),
        "marker": MARKERS[(arm.index + again) % len(MARKERS)],
        "linestyle": ("-", (0, (3.2, 1.4)), (0, (1.2, 1.2)))[min(again, 2)],
        "linewidth": 1.6 if again else 2.0,
        "markersize": 5.5,
        "markerfacecolor": "white" if again else run_colour(arm),
        "markeredgecolor": run_colour(arm) if again else "white",
        "markeredgewidth": 0.8,
        "label": arm.label,
        # The first run is drawn last: where curves meet, the subject of the comparison is on top.
        "zorder": 5 - 0.01 * arm.index,
    }


def legend_above(figure, axes, arms: Sequence[Arm]) -> None:
    handles: dict[str, object] = {}
    for axis in axes:
        found, labels = axis.get_legend_handles_labels()
        handles.update(zip(labels, found, strict=True))
    labels = [arm.label for arm in arms if arm.label in handles]
    widest = max(map(len, labels))
    columns = max(1, min(len(labels), 4, int(figure.get_figwidth() * 13 / (widest + 7))))
    lines = math.ceil(len(labels) / columns)
    height = figure.get_figheight() + 0.24 * (lines - 1)
    figure.set_figheight(height)
    top = 1 - (0.06 + 0.22 * lines) / height
    figure.tight_layout(rect=(0, 0, 1, top), pad=0.5, w_pad=2.0)
    figure.legend(
        [handles[label] for label in labels], labels, loc="upper center", ncols=columns, frameon=False, fontsize=10,
        bbox_to_anchor=(0.5, 1.0), borderaxespad=0.1, handlelength=2.6, columnspacing=1.4,
    )  # fmt: skip


def _note(axis, text: str) -> None:
    axis.annotate(text, (0.995, 0.97), xycoords="axes fraction", ha="right", va="top", color=GREY, fontsize=8.5)


def save_figure(figure, path: Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, facecolor="white", metadata={"Software": None})
    pyplot().close(figure)
    return path


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise PlotsMissingError(
            "figures need matplotlib, which is not installed: `pip install 'irope-jax[plots]'`"
        ) from None
    matplotlib.use("Agg", force=True)
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 10,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e6e6e6",
            "grid.linewidth": 0.8,
            "axes.edgecolor": "#444444",
        }
    )
    return plt


def plain_numbers(leading: Sequence[int] = range(1, 10)):
    """Ticks as plain numbers, of those alone that begin with one of these digits."""
    return _ticker().FuncFormatter(lambda x, _: f"{x:,.4g}" if x > 0 and int(f"{x:e}"[0]) in leading else "")


def _ticker():
    import matplotlib.ticker

    return matplotlib.ticker
