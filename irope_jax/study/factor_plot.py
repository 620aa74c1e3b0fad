"""A picture of rotation factors: by how much each pair of a head was slowed down, for several methods.

The numbers come from a search (`position.longrope_search`); here they are only drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from irope_jax.study import plots


def plot_factors(
    path: Path, curves: Mapping[str, Sequence[float]], *, factor: float, critical_pair: int | None = None
) -> Path:
    """One line per method over the pairs of a head, fastest first.

    Args:
      path: PNG file to write.
      curves: factors by name of the method, all of the same number of pairs.
      factor: of the extension, a line to hold them against.
      critical_pair: first pair that does not finish a turn within the trained length; marked.

    Raises:
      PlotsMissingError: matplotlib is not installed.
    """
    plt = plots.pyplot()
    figure, axis = plt.subplots(figsize=(plots.WIDTH * 0.75, 3.6), layout="constrained")
    axis.axhline(factor, color=plots.GREY, linewidth=0.8, linestyle=":")
    axis.annotate(f"x{factor:g}", (0, factor), color=plots.GREY, va="bottom", ha="left", fontsize=9)
    if critical_pair is not None:
        axis.axvline(critical_pair - 0.5, color=plots.GREY, linewidth=0.8, linestyle="--")
        axis.annotate(
            "from here on less than\none turn in training",
            (critical_pair - 0.5, 1.0),
            xytext=(4, 2),
            textcoords="offset points",
            color=plots.GREY,
            va="bottom",
            fontsize=8.5,
        )
    for i, (name, factors) in enumerate(curves.items()):
        colour, marker = plots.COLOURS[i % len(plots.COLOURS)], plots.MARKERS[i % len(plots.MARKERS)]
        last = i == len(curves) - 1
        axis.plot(
            range(len(factors)),
            factors,
            color=colour,
            marker=marker,
            markersize=3.5 if last else 2.5,
            linewidth=2.0 if last else 1.2,
            label={"pi": "PI", "ntk": "NTK", "yarn": "YaRN"}.get(name, name),
        )
    axis.set_xlabel("pair of the head, fastest first")
    axis.set_ylabel("frequency divided by")
    axis.set_title("Factors of the extension")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=200)
    plt.close(figure)
    return path
