"""Tables and figures of where layers look, read from run directories with known numbers."""

import math
import re

import pytest

from irope_jax.core.records import RunWriter
from irope_jax.study import attention_plots
from irope_jax.study.attention import attention_table, by_head, by_position, layer_kinds
from irope_jax.study.collect import load_arms
from irope_jax.study.report import write_report

pytest.importorskip("matplotlib")

KINDS = (("chunked", "rope"), ("global", "nope"), ("chunked", "rope"))
MEASURES = ("distance", "sink_mass", "recent_mass", "entropy", "entropy_share")


def value(name, layer, head):
    return {"distance": 10.0 * layer + head, "sink_mass": 0.1 * layer + 0.01 * head}.get(name, 0.5)


def make_run(directory, name="a", heads=2):
    with RunWriter(directory / name, {"name": name}, name, tensorboard=False) as w:
        for length in (64, 128):
            for layer, (mask, position) in enumerate(KINDS):
                about = {"length": length, "layer": layer, "mask": mask, "position": position}
                w.measure(1, "attention_reach", "even_distance", 7.0, length, about)
                for measure in MEASURES:
                    for head in range(heads):
                        found = value(measure, layer, head) * (1 if length == 128 else 100)
                        w.measure(1, "attention_reach", measure, found, length, about | {"head": head})
                for low, high in ((0, 1), (1, 2), (2, 64), (64, length)):
                    if low < high:
                        where = about | {"from": low, "to": high}
                        entropy = math.log(max(high, 1)) / (1 + layer)
                        w.measure(1, "attention_reach", "entropy_by_position", entropy, high - low, where)
    return directory / name


def test_the_longest_windows_speak_layer_by_layer_and_head_by_head(tmp_path):
    (arm,) = load_arms([make_run(tmp_path)])
    assert layer_kinds(arm) == {0: "chunked, rope", 1: "global, nope", 2: "chunked, rope"}
    assert by_head(arm, "distance") == [[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]]
    (curve,) = [cells for key, cells in by_position(arm, "entropy").items() if key == (1,)]
    assert [(c.where["from"], c.where["to"]) for c in curve] == [(0, 1), (1, 2), (2, 64), (64, 128)]
    assert curve[-1].value == pytest.approx(math.log(128) / 2)


def test_the_table_has_a_line_for_each_kind_of_layer(tmp_path):
    (arm,) = load_arms([make_run(tmp_path)])
    table = attention_table(arm)
    assert [row[:5] for row in table.rows] == [
        ("chunked, rope", "2", "10.5", "7.0", "0.105"),
        ("global, nope", "1", "10.5", "7.0", "0.105"),
    ]
    assert "128 tokens" in table.title and table.rows[0][5] == "–"


def test_the_report_shows_them_and_only_where_they_were_measured(tmp_path):
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b", heads=16)]
    page = write_report(runs, tmp_path / "report").read_text()
    for picture in re.findall(r"\]\((attention\w+\.png)\)", page):
        assert (tmp_path / "report" / picture).stat().st_size > 10_000
    assert page.count("## Where layers look") == 1 and page.count("attention_") == 2
    with RunWriter(tmp_path / "c", {"name": "c"}, "c", tensorboard=False) as w:
        w.measure(1, "perplexity", "nll_by_length", 2.0, 64, {"length": 64})
    arms = load_arms([tmp_path / "c"])
    assert attention_plots.head_maps(arms, tmp_path / "x.png") is None
    assert attention_plots.entropy_curves(arms, tmp_path / "x.png") is None
    assert "Where layers look" not in write_report([tmp_path / "c"], tmp_path / "other").read_text()
