"""The picture of rotation factors, judged by reading its axes; how it looks was judged by eye."""

import builtins
import struct

import pytest

from irope_jax.study.factor_plot import plot_factors
from irope_jax.study.plots import PlotsMissingError

CURVES = {"pi": [4.0] * 8, "yarn": [1, 1, 1, 2, 3, 4, 4, 4], "searched": [1, 1, 1.2, 2, 3.1, 4, 4.4, 5.0]}


@pytest.fixture
def drawn(monkeypatch):
    """The axis that was drawn last, kept open to be read."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    yield lambda: pyplot.gcf().axes[0]
    close("all")


def lines(axis):
    return {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}


def test_a_png_wide_enough_is_made_where_asked(tmp_path):
    pytest.importorskip("matplotlib")
    path = plot_factors(tmp_path / "deep" / "factors.png", CURVES, factor=4.0, critical_pair=4)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", data[16:20])[0] == 1600
    assert plot_factors(tmp_path / "again.png", CURVES, factor=4.0, critical_pair=4).read_bytes() == data


def test_every_method_is_a_curve_of_its_own_and_the_last_stands_out(tmp_path, drawn):
    plot_factors(tmp_path / "x.png", CURVES, factor=4.0)
    found = lines(drawn())
    assert list(found) == ["PI", "YaRN", "searched"]
    for line, factors in zip(found.values(), CURVES.values()):
        assert list(line.get_xdata()) == list(range(8)) and list(line.get_ydata()) == factors
    assert len({line.get_color() for line in found.values()}) == 3
    widths = [line.get_linewidth() for line in found.values()]
    assert widths[-1] > max(widths[:-1])
    assert found["PI"].get_linestyle() != found["YaRN"].get_linestyle()  # they are equal where both divide by s
    assert "×4" in [text.get_text() for text in drawn().texts]


def test_the_critical_pair_and_all_slower_ones_are_marked(tmp_path, drawn):
    plot_factors(tmp_path / "x.png", CURVES, factor=4.0, critical_pair=5)
    (band,) = drawn().patches
    low, high = band.get_extents().transformed(drawn().transData.inverted()).intervalx
    assert low == pytest.approx(4.5) and high >= 7.5
    assert any("from pair 5 on" in text.get_text() for text in drawn().texts)
    plot_factors(tmp_path / "x.png", CURVES, factor=4.0, critical_pair=8)  # every pair finishes a turn
    assert not drawn().patches


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_the_scale_is_the_one_asked_for_and_holds_every_factor(tmp_path, drawn, scale):
    plot_factors(tmp_path / "x.png", CURVES, factor=4.0, scale=scale)
    assert drawn().get_yscale() == scale
    low, high = drawn().get_ylim()
    assert low < 1.0 and high > 5.0


def test_wavelengths_stand_above_their_pairs(tmp_path, drawn):
    plot_factors(tmp_path / "x.png", CURVES, factor=4.0, wavelengths=[6.283 * 10**i for i in range(8)])
    (top,) = drawn().child_axes
    assert list(top.get_xticks()) == list(range(8))
    shown = [label.get_text() for label in top.get_xticklabels()]
    assert shown == ["6.28", "62.8", "628", "6.28k", "62.8k", "628k", "6.28M", "62.8M"]
    plot_factors(tmp_path / "x.png", {"one": [1.0] * 64}, factor=4.0, wavelengths=[float(i) for i in range(64)])
    (top,) = drawn().child_axes
    assert [(int(x), t.get_text()) for x, t in zip(top.get_xticks(), top.get_xticklabels())][:2] == [(0, "0"), (8, "8")]


def test_one_curve_and_one_pair_are_enough(tmp_path):
    pytest.importorskip("matplotlib")
    for scale in ("log", "linear"):
        assert plot_factors(tmp_path / "x.png", {"one": [1.0]}, factor=1.0, critical_pair=0, scale=scale).exists()


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(PlotsMissingError, match=r"irope-jax\[plots\]"):
        plot_factors(tmp_path / "x.png", CURVES, factor=4.0)
