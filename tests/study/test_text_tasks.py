"""Tables and figures of tasks in words, read from run directories with known numbers."""

import re

import pytest

from irope_jax.core.records import RunWriter
from irope_jax.study import plots, task_plots
from irope_jax.study.collect import load_arms
from irope_jax.study.report import terminal_tables, write_report
from irope_jax.study.text_tasks import effective_table, likelihood_table, scores_table, suite_scores, task_scores

pytest.importorskip("matplotlib")

LENGTHS = (4096, 8192, 16_384)
SCORES = {"niah_single_1": (1.0, 0.9, 0.5), "ruler_vt": (0.8, 0.6, 0.2)}


def make_run(directory, name, *, depths=(), kinds=("text_tasks",), factor=1.0):
    config = {"name": name, "data": {"seq_len": 4096}, "evals": [{"kind": "text_tasks", "name": "ruler"}]}
    with RunWriter(directory / name, config, name, tensorboard=False) as w:
        w.train(1, {"loss": 1.0})
        if "text_tasks" in kinds:
            for task, scores in SCORES.items():
                for length, score in zip(LENGTHS, scores):
                    for depth in depths or (None,):
                        where = {"task": task, "length": length} | ({} if depth is None else {"depth": depth})
                        w.measure(1, "ruler", "score", factor * score * (1 if depth != 1.0 else 0.5), 20, where)
            for length, score in zip(LENGTHS, (0.9, 0.75, 0.35)):
                w.measure(
                    1, "ruler", "suite_score", factor * score, 40, {"suite": "ruler", "tasks": 2, "length": length}
                )
            where = {"suite": "ruler", "tasks": 2, "threshold": 0.856}
            w.measure(1, "ruler", "effective_length", 4096.0 if factor == 1.0 else 0.0, 3, where)
        if "passkey" in kinds:
            for depth in (0.25, 0.75):
                w.measure(1, "passkey", "accuracy", 1.0 - depth, 8, {"length": 1024, "depth": depth})
        if "likelihoods" in kinds:
            w.measure(1, "sliding_perplexity", "nll_sliding", 2.5, 1000, {"length": 1024, "stride": 256})
            w.measure(1, "cropped_perplexity", "context_gain", 0.125, 640, {"length": 4096, "crop": 512})
            w.measure(1, "multiple_choice", "acc", 0.75, 12, {})
    return directory / name


def test_several_evaluations_of_a_kind_are_all_shown_and_told_apart_where_they_must(tmp_path):
    run = make_run(tmp_path, "a")
    config = {"name": "a", "data": {"seq_len": 4096}, "evals": [{"kind": "text_tasks", "name": "ruler"}]}
    with RunWriter(run, config, "a", tensorboard=False) as w:
        w.event(1, "evaluation", evaluation="needle", kind="text_tasks", spec="x")
        w.measure(1, "needle", "score", 0.25, 4, {"task": "number", "length": 4096})
        w.measure(1, "needle", "score", 0.75, 4, {"task": "ruler_vt", "length": 4096})
    (arm,) = load_arms([run])
    found = {task: [cell.value for cell in cells] for task, cells in task_scores(arm).items()}
    assert found == {
        "niah_single_1": [1.0, 0.9, 0.5],
        "ruler: ruler_vt": [0.8, 0.6, 0.2],
        "number": [0.25],
        "needle: ruler_vt": [0.75],
    }


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or path)
    yield figures
    import matplotlib.pyplot

    matplotlib.pyplot.close("all")


def test_scores_are_means_over_depths_and_passkeys_are_a_task(tmp_path):
    (arm,) = load_arms([make_run(tmp_path, "a", depths=(0.0, 1.0), kinds=("text_tasks", "passkey"))])
    found = task_scores(arm)
    assert list(found) == ["niah_single_1", "ruler_vt", "passkey"]
    assert [(c.where["length"], c.value, c.count) for c in found["ruler_vt"]] == [
        (4096, pytest.approx(0.6), 40),
        (8192, pytest.approx(0.45), 40),
        (16_384, pytest.approx(0.15), 40),
    ]
    assert [c.value for c in found["passkey"]] == [0.5]
    assert [c.value for c in task_scores(arm, ("length", "depth"))["passkey"]] == [0.75, 0.25]
    assert [c.value for c in suite_scores(arm)["ruler, 2 tasks"]] == [0.9, 0.75, 0.35]


def test_tables_say_scores_thresholds_and_likelihoods(tmp_path):
    arms = load_arms(
        [make_run(tmp_path, "a", kinds=("text_tasks", "likelihoods")), make_run(tmp_path, "b", factor=0.5)]
    )
    table = scores_table(arms[0])
    assert table.columns == ("task", "4,096", "8,192", "16,384")
    assert [row[0] for row in table.rows] == ["niah_single_1", "ruler_vt", "mean of ruler, 2 tasks"]
    assert table.rows[1][1].startswith("0.800 (") and table.rows[2][1:] == ("0.900", "0.750", "0.350")
    effective = effective_table(arms)
    assert effective.columns == ("run", "ruler, 2 tasks (score above 85.6 %)")
    assert effective.rows == (("a", "4,096"), ("b", "none"))
    assert likelihood_table(arms).rows == (
        ("nll_sliding (length 1,024, stride 256)", "2.500 (n=1,000)", "–"),
        ("context_gain (length 4,096, crop 512)", "0.125 (n=640)", "–"),
        ("acc", "0.750 (n=12)", "–"),
    )


def test_figures_show_what_was_measured(tmp_path, drawn):
    arms = load_arms([make_run(tmp_path, "a", depths=(0.0, 1.0)), make_run(tmp_path, "b", factor=0.5)])
    task_plots.suite_by_length(arms, tmp_path / "x.png")
    (axis,) = drawn[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
    assert lines["a"] == [0.9, 0.75, 0.35] and lines["b"] == [0.45, 0.375, 0.175]
    assert "85.6 %" in [text.get_text() for text in axis.texts]
    task_plots.tasks_by_length(arms, tmp_path / "x.png")
    panels = {axis.get_title(loc="left"): axis for axis in drawn[1].axes if axis.get_visible()}
    assert set(panels) == set(SCORES)
    lines = {line.get_label(): list(line.get_ydata()) for line in panels["ruler_vt"].get_lines()}
    assert lines["b"] == pytest.approx([0.4, 0.3, 0.1]) and lines["a"] == pytest.approx([0.6, 0.45, 0.15])
    task_plots.task_maps(arms, tmp_path / "x.png")
    maps = {axis.get_title(loc="left"): axis for axis in drawn[2].axes if axis.images}
    assert set(maps) == {"a: niah_single_1", "a: ruler_vt"}  # the other run has no depths
    assert maps["a: ruler_vt"].images[0].get_array()[1].tolist() == pytest.approx([0.4, 0.3, 0.1])


def test_the_report_has_the_sections_that_were_measured(tmp_path):
    runs = [make_run(tmp_path, "a", depths=(0.0, 1.0), kinds=("text_tasks", "likelihoods"))]
    page = write_report(runs, tmp_path / "out")
    text = page.read_text()
    assert "## Tasks in words" in text and "## Other likelihoods" in text and "None" not in text
    for picture in ("suite_by_length.png", "tasks_by_length.png", "task_heat_maps.png"):
        assert f"({picture})" in text and (page.parent / picture).stat().st_size > 1000
    assert all((page.parent / picture).exists() for picture in re.findall(r"\]\((.+?)\)", text))
    bare = write_report([make_run(tmp_path, "c", kinds=())], tmp_path / "bare").read_text()
    assert "Tasks in words" not in bare and "Other likelihoods" not in bare
    titles = [table.title for table in terminal_tables(load_arms(runs))]
    assert titles[-3:] == ["a: scores by context length", "Effective length, tokens", "Other likelihoods"]
