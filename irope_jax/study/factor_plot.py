"""A picture of rotation factors: by how much each pair of a head was slowed down, for several methods.

The numbers come from a search (`position.longrope_search`); here they are only drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from irope_jax.study import plots

NAMES = {"pi": "PI", "ntk": "NTK", "yarn": "YaRN"}
DASHES = ((0, (5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1.5)), (0, (1.2, 1.2)))
"""Where two curves are equal, as PI and YaRN on slow pairs, the gaps of one show the other."""


def plot_factors(
    path: Path,
    curves: Mapping[str, Sequence[float]],
    *,
    factor: float,
    critical_pair: int | None = None,
    wavelengths: Sequence[float] | None = None,
    scale: Literal["log", "linear"] = "log",
) -> Path:
    """One line per method over the pairs of a head, fastest first; the last one is the subject and stands out.

    Args:
      path: PNG file to write.
      curves: factors by name of the method, all of the same number of pairs.
      factor: of the extension, a line to hold them against.
      critical_pair: first pair that does not finish a turn within the trained length; shaded from there on.
      wavelengths: tokens to an unscaled turn, by pair; written along the top.
      scale: of the factors. A factor is a ratio, so the logarithm shows small ones as well as large ones.

    Raises:
      PlotsMissingError: matplotlib is not installed.
    """
    plt = plots.pyplot()
    figure, axis = plt.subplots(figsize=(plots.WIDTH, 3.9), layout="constrained")
    pairs = max(map(len, curves.values()))
    axis.axhline(factor, color=plots.GREY, linewidth=0.8, linestyle=":")
    axis.annotate(
        f"×{factor:g}", (1.0, factor), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
        color=plots.GREY, va="center", fontsize=9,
    )  # fmt: skip
    if critical_pair is not None and critical_pair < pairs:
        axis.axvspan(critical_pair - 0.5, pairs, color="#f2f2f2", zorder=0)
        # Factors do not fall, so the lower right corner stays empty.
        axis.annotate(
            f"from pair {critical_pair} on: less than one turn in training", (0.99, 0.075),
            xycoords="axes fraction", ha="right", va="bottom", color=plots.GREY, fontsize=8.5,
        )  # fmt: skip
    for i, (name, factors) in enumerate(curves.items()):
        subject = i == len(curves) - 1
        axis.plot(
            range(len(factors)),
            factors,
            color=plots.COLOURS[i % len(plots.COLOURS)],
            linestyle="-" if subject or i == 0 else DASHES[(i - 1) % len(DASHES)],
            marker=plots.MARKERS[i % len(plots.MARKERS)],
            markersize=4.5 if subject else 3.0,
            markevery=math.ceil(pairs / 32),
            markeredgewidth=0,
            linewidth=2.2 if subject else 1.4,
            zorder=4 if subject else 3,
            label=NAMES.get(name, name),
        )
    axis.set_xlim(-0.5, pairs - 0.5)
    values = [factor, *(value for factors in curves.values() for value in factors)]
    if scale == "log":
        _log_axis(axis, min(values), max(values))
    if wavelengths is not None:
        _wavelengths_above(axis, wavelengths)
    axis.set_xlabel("pair of the head, fastest first")
    axis.set_ylabel("frequency divided by")
    axis.set_title("Factors of the extension")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.06, 1.0))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    return path


def _log_axis(axis, low: float, high: float) -> None:
    """Powers of two as plain numbers; quarters between them where there are few."""
    import matplotlib.ticker as ticker

    axis.set_yscale("log", base=2)
    margin = max(high / low, 1.5) ** 0.06
    axis.set_ylim(low / margin, high * margin)
    axis.yaxis.set_major_locator(ticker.LogLocator(base=2, subs=(1, 1.25, 1.5, 1.75) if high / low < 6 else (1,)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(ticker.NullLocator())


def _wavelengths_above(axis, wavelengths: Sequence[float]) -> None:
    places = range(0, len(wavelengths), math.ceil(len(wavelengths) / 8))
    top = axis.secondary_xaxis("top")
    top.set_xticks(list(places), [_tokens(wavelengths[place]) for place in places])
    top.tick_params(length=2, labelsize=8.5, colors=plots.GREY)
    top.spines["top"].set_visible(False)
    top.set_xlabel("tokens to a turn, unscaled", fontsize=8.5, color=plots.GREY)


def _tokens(count: float) -> str:
    for size, prefix in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{prefix}"
    return f"{count:.3g}"
