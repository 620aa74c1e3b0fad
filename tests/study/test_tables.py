"""Tables as a reader sees them."""

import io
import math

import pytest

from irope_jax.core.records import RunWriter
from irope_jax.study import tables
from irope_jax.study.collect import Cell, load_arms
from irope_jax.study.tables import Table
from tests.study.fake_runs import make_run

EXAMPLE = Table("Title", ("run", "1×"), (("a|b", "0.5"), ("long name", "[1]")))


def test_markdown():
    assert EXAMPLE.markdown() == "| run | 1× |\n| --- | ---: |\n| a\\|b | 0.5 |\n| long name | [1] |"


def test_plain():
    assert EXAMPLE.plain().splitlines() == [
        "Title",
        "run         1×",
        "---------  ---",
        "a|b        0.5",
        "long name  [1]",
    ]


def test_rich_shows_brackets_as_text():
    console = pytest.importorskip("rich.console").Console(width=60, record=True, file=io.StringIO())
    console.print(EXAMPLE.rich())
    text = console.export_text()
    assert "[1]" in text and "a|b" in text and "Title" in text


def small(directory, name, accuracies, length=8, **config):
    resolved = {"name": name, "data": {"seq_len": length}, "train": {"steps": 1}} | config
    with RunWriter(directory / name, resolved, name, tensorboard=False) as w:
        w.train(1, {"loss": 1.0})
        for context, straddle, value, count in accuracies:
            w.measure(1, "retrieval", "accuracy", value, count, {"length": context, "depth": 0.5, "straddle": straddle})
    return directory / name


def test_retrieval_rows_are_runs_and_columns_multiples_of_the_training_length(tmp_path):
    a = small(tmp_path, "a", [(8, False, 1.0, 30), (8, True, 0.0, 10), (32, False, 0.5, 30)])
    b = small(tmp_path, "b", [(16, False, 0.25, 4)])
    arms = load_arms([a, b])
    table = tables.retrieval_table(arms, intervals=False)
    assert table.columns == ("run", "1× (8)", "2× (16)", "4× (32)")
    assert table.rows == (("a", "0.750", "–", "0.500"), ("b", "–", "0.250", "–"))
    assert tables.retrieval_table(arms, "straddling", intervals=False).rows == (("a", "0.000"), ("b", "–"))
    assert tables.retrieval_table(arms, "inside").rows[0][1] == "1.000 (0.89–1.00)"
    assert tables.retrieval_table(load_arms([b]), "straddling") is None


def test_columns_of_runs_trained_at_different_lengths(tmp_path):
    a, b = small(tmp_path, "a", [(8, False, 1.0, 1)]), small(tmp_path, "b", [(32, False, 0.0, 1)], length=16)
    table = tables.retrieval_table(load_arms([a, b]), intervals=False)
    assert table.columns == ("run", "1×", "2×") and table.rows == (("a", "1.000", "–"), ("b", "–", "0.000"))
    c = small(tmp_path, "c", [(32, False, 0.5, 2)], data={})
    table = tables.retrieval_table(load_arms([a, c]), intervals=False)
    assert table.columns == ("run", "8 tokens", "32 tokens")


def test_loss_by_position_marks_what_lies_beyond_training(tmp_path):
    table = tables.nll_by_position_table(load_arms([make_run(tmp_path, "a", length=128, lengths=(512,), steps=5)]))
    names = [row[0] for row in table.rows]
    assert names[:3] == ["0", "1", "2 to 3"] and names[-3:] == ["64 to 127", "→ 128 to 255", "→ 256 to 511"]
    value, perplexity = table.rows[-1][1].rstrip(")").split(" (")
    assert float(perplexity) == pytest.approx(math.exp(float(value)), abs=0.01)


def test_training_and_runs_tables_of_a_run_without_records(tmp_path):
    arms = load_arms([make_run(tmp_path, "a", done=0, steps=7, evaluations=())])
    assert tables.training_table(arms).rows == (("a", *["–"] * 6, "0"),)
    assert tables.runs_table(arms).rows[0][2:5] == ("1,234,567", "128", "0 of 7")
    assert tables.nll_by_position_table(arms) is None and tables.nll_by_length_table(arms) is None


def test_the_runs_table_says_where_a_run_started_from(tmp_path):
    arms = load_arms([small(tmp_path, "a", [], description="Fine-tuned.", train={"steps": 1, "init_from": "runs/b"})])
    assert tables.runs_table(arms).rows[0][1] == "Fine-tuned. Started from the parameters of `runs/b`."


def test_differences_name_the_fields_in_which_runs_differ(tmp_path):
    layers = [{"mask": "chunked"}, {"mask": "global"}]
    a = small(tmp_path, "a", [], model={"layers": layers, "width": 8, "dims": [1, 2]}, description="x")
    b = small(tmp_path, "b", [], model={"layers": [layers[1], layers[1]], "width": 8, "dims": [1, 3]}, extra=None)
    table = tables.difference_table(load_arms([a, b]))
    assert table.rows == (
        ("`model.layers.0.mask`", "chunked", "global"),
        ("`model.dims`", "[1, 2]", "[1, 3]"),
        ("`extra`", "–", "null"),
    )
    assert tables.difference_table(load_arms([a])) is None and tables.difference_table(load_arms([a, a])) is None
    assert tables.difference_table(load_arms([a, b]), limit=1).rows[-1][0] == "… and 2 more fields"


@pytest.mark.parametrize(
    ("value", "count", "shown"), [(1.0, 10, "1.000"), (0.9999, 10000, "0.999+"), (0.0, 4, "0.000"), (0.625, 8, "0.625")]
)
def test_accuracies(value, count, shown):
    assert tables.accuracy(Cell({}, value, count), interval=False) == shown
    assert tables.accuracy(Cell({}, value, count)).startswith(shown + " (")


def test_numbers():
    assert [tables.times(x) for x in (1.0, 64.0, 1.5, 0.25)] == ["1×", "64×", "1.5×", "1/4×"]
    assert [tables.quantity(x) for x in (0.5, 999, 1234, 5.6e10)] == ["0.5 ", "999 ", "1.23 k", "56 G"]
    assert [tables.perplexity(x) for x in (0.0, math.log(12.345), math.log(54321), 900.0, math.nan, math.inf)] == [
        "1.00", "12.35", "54,321", "huge", "NaN", "huge",
    ]  # fmt: skip
    assert [tables.nll(x) for x in (1.23456, math.nan, math.inf)] == ["1.235", "NaN", "infinite"]
