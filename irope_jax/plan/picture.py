"""Memory of a device as stacked bars."""

from __future__ import annotations

from pathlib import Path

from irope_jax.core.chips import Chip
from irope_jax.core.config import ConfigError
from irope_jax.plan.job import Figures
from irope_jax.study import plots

PARTS = ("parameters", "optimizer", "cache", "kept", "other temporaries")


def draw_memory(bars: list[tuple[str, Figures, Chip | None]], path: Path) -> None:
    """A bar for each `(label, figures, chip)`, with a line at the chip's memory.

    Raises:
      ConfigError: nothing to draw, or the file cannot be written.
      PlotsMissingError: matplotlib is not installed.
    """
    if not bars:
        raise ConfigError("--plot", str(path), "no target gave figures to draw")
    pyplot = plots.pyplot()
    figure, axes = pyplot.subplots(figsize=(2 + 1.2 * len(bars), 4.5), layout="constrained")
    for place, (_, one, chip) in enumerate(bars):
        below = 0.0
        sizes = [one.parameters, one.optimizer, one.cache, one.kept or 0, (one.temporaries or 0) - (one.kept or 0)]
        for size, colour in zip(sizes, plots.COLOURS):
            if size > 0:
                axes.bar(place, size / 1e9, bottom=below / 1e9, color=colour, width=0.7)
                below += size
        if chip is not None and chip.memory:
            axes.plot([place - 0.45, place + 0.45], [chip.memory / 1e9] * 2, color="black", linewidth=1.5)
    axes.set_xticks(range(len(bars)), [label for label, *_ in bars], fontsize=8)
    axes.set_ylabel("GB a device; the line is the chip's memory")
    patches = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for _, colour in zip(PARTS, plots.COLOURS)]
    axes.legend(patches, PARTS, fontsize=8)
    try:
        plots.save_figure(figure, path)
    except (OSError, ValueError) as error:
        raise ConfigError("--plot", str(path), f"cannot be written ({error})") from None
