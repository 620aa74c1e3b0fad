"""Figures: drawn where there is something to draw, `None` where there is not, never a colour for two runs.

How they look was judged by eye; what is drawn is judged by reading the axes.
"""

import builtins
import math
import struct

import pytest

from irope_jax.core.records import RunWriter
from irope_jax.study import plots
from irope_jax.study.collect import Arm, load_arms
from tests.study.fake_runs import make_run

pytest.importorskip("matplotlib")

FIGURES = (
    plots.headline,
    plots.retrieval_by_length,
    plots.perplexity_by_position,
    plots.loss_curves,
    plots.heat_maps,
)


def png_width(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">I", data[16:20])[0]


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved, kept open to be read."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or path)
    yield figures
    import matplotlib.pyplot

    matplotlib.pyplot.close("all")


def lines(axis):
    return {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}


def test_every_figure_is_a_png_wide_enough(tmp_path):
    arms = load_arms([make_run(tmp_path, "a", steps=20), make_run(tmp_path, "b", steps=20, decay=0.3, seed=1)])
    for draw in FIGURES:
        path = draw(arms, tmp_path / "deep" / f"{draw.__name__}.png")
        assert png_width(path) == 1600, draw.__name__


def test_a_run_without_anything_draws_nothing(tmp_path):
    arms = load_arms([make_run(tmp_path, "a", done=0, evaluations=())])
    for draw in FIGURES:
        assert draw(arms, tmp_path / "x.png") is None
    assert not (tmp_path / "x.png").exists()


def test_the_headline_shows_both_panels_with_the_measured_numbers(tmp_path, drawn):
    arms = load_arms([make_run(tmp_path, "a", steps=20), make_run(tmp_path, "b", steps=20, decay=0.3, seed=1)])
    plots.headline(arms, tmp_path / "x.png")
    left, right = drawn[0].axes
    assert left.get_xscale() == right.get_xscale() == "log"
    for arm in arms:
        found = lines(left)[arm.label]
        assert list(found.get_xdata()) == [1, 4, 16, 64]
        hits = [m for m in arm.run.evals if m.name == "accuracy" and m.where["length"] == 2048]
        expected = sum(m.value * m.count for m in hits) / sum(m.count for m in hits)
        assert found.get_ydata()[2] == pytest.approx(expected)
        last = [m.value for m in arm.run.evals if m.name == "nll_by_position" and m.where["to"] == 8192]
        assert lines(right)[arm.label].get_ydata()[-1] == pytest.approx(last[0])
    assert [t.get_text() for t in left.get_xticklabels()] == ["1×", "4×", "16×", "64×"]
    assert "chance" in [t.get_text() for t in left.texts] and "training\nlength" in [t.get_text() for t in right.texts]
    assert [t.get_text() for t in drawn[0].legends[0].get_texts()] == ["a", "b"]


def test_a_run_keeps_its_colour_where_another_is_missing(tmp_path, drawn):
    directories = [
        make_run(tmp_path, "a", steps=20, evaluations=("retrieval",)),
        make_run(tmp_path, "b", steps=20, evaluations=("perplexity",)),
        make_run(tmp_path, "c", steps=20),
    ]
    arms = load_arms(directories)
    for draw in FIGURES[:4]:
        draw(arms, tmp_path / "x.png")
    plots.heat_maps(arms, tmp_path / "x.png")
    from matplotlib.text import Text

    seen: dict[str, set] = {}
    for figure in drawn[:4]:
        for axis in figure.axes:
            for label, line in lines(axis).items():
                seen.setdefault(label, set()).add(line.get_color())
    for axis in drawn[4].axes:
        title = axis.get_title(loc="left")
        if title:
            seen[title] |= {text.get_color() for text in axis.findobj(Text) if text.get_text() == title}
    assert set(seen) == {"a", "b", "c"} and all(len(colours) == 1 for colours in seen.values())
    assert len(set().union(*seen.values())) == 3


def test_heat_maps_show_length_by_depth_with_one_colour_bar(tmp_path, drawn):
    small = {"steps": 20, "lengths": (128, 512), "depths": (0.25, 0.75)}
    arms = load_arms([make_run(tmp_path, name, seed=seed, **small) for seed, name in enumerate("abcd")])
    plots.heat_maps(arms, tmp_path / "x.png")
    maps = [axis for axis in drawn[0].axes if axis.images]
    bars = [axis for axis in drawn[0].axes if axis.get_ylabel() == "retrieval accuracy"]
    assert len(maps) == 4 and len(bars) == 1
    first = [m for m in arms[0].run.evals if m.name == "accuracy"]
    first = [m for m in first if (m.where["length"], m.where["depth"]) == (512, 0.75)]
    expected = sum(m.value * m.count for m in first) / sum(m.count for m in first)
    assert maps[0].images[0].get_array()[1, 1] == pytest.approx(expected)
    assert {axis.images[0].get_clim() for axis in maps} == {(0, 1)}


def test_loss_curves_survive_nan_and_mark_what_did_not_finish(tmp_path, drawn):
    with RunWriter(tmp_path, {"train": {"steps": 100}}, "a", tensorboard=False) as w:
        for step in range(1, 21):
            w.train(step, {"loss": math.nan if step in (1, 7) else 5.0 - step / 10})
    plots.loss_curves(load_arms([tmp_path]), tmp_path / "x.png")
    (axis,) = drawn[0].axes
    assert [t.get_text() for t in axis.texts] == ["× not finished"]
    low, high = axis.get_ylim()
    assert 2.5 < low < 3.1 and 4.7 < high < 5.2


def test_infinite_and_missing_losses_do_not_break_a_figure(tmp_path):
    with RunWriter(tmp_path, {"data": {"seq_len": 8}}, "a", tensorboard=False) as w:
        for value, low, high in ((math.nan, 0, 8), (math.inf, 8, 16), (900.0, 16, 32), (2.0, 32, 64)):
            w.measure(1, "perplexity", "nll_by_position", value, 1, {"length": 64, "from": low, "to": high})
    arms = load_arms([tmp_path])
    for draw in (plots.headline, plots.perplexity_by_position):
        assert draw(arms, tmp_path / f"{draw.__name__}.png").exists()


def test_without_training_lengths_the_axis_counts_tokens(tmp_path, drawn):
    arms = load_arms([make_run(tmp_path, "a", steps=20, config={"data": {}}), make_run(tmp_path, "b", steps=20)])
    plots.retrieval_by_length(arms, tmp_path / "x.png")
    (axis,) = drawn[0].axes
    assert axis.get_xlabel() == "context length, tokens"
    assert [t.get_text() for t in axis.get_xticklabels()] == ["128", "512", "2k", "8k"]


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    arms = load_arms([make_run(tmp_path, "a", steps=20)])
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(plots.PlotsMissingError, match=r"irope-jax\[plots\]"):
        plots.headline(arms, tmp_path / "x.png")


def test_many_runs_are_told_apart(tmp_path):
    lines = [plots.run_line(Arm(index, str(index), None)) for index in range(3 * len(plots.COLOURS))]
    assert len({(line["color"], line["marker"], line["linestyle"]) for line in lines}) == len(lines)
    assert len({(line["marker"], line["linestyle"]) for line in lines}) == len(lines)  # in black and white
