"""Time and memory by length: lines apart by evaluation or by run, units, and what was not measured."""

from irope_jax.core.records import RunWriter
from irope_jax.study.collect import load_arms
from irope_jax.study.cost import cost_by_length, cost_tables, costs
from irope_jax.study.report import write_report

LENGTHS = (8192, 16384)


def make_run(directory, name, evaluations):
    specs = [{"kind": "cost", "name": evaluation} for evaluation in evaluations]
    with RunWriter(directory / name, {"name": name, "evals": specs}, name, tensorboard=False) as w:
        for number, evaluation in enumerate(evaluations, 1):
            for length in LENGTHS[: 3 - number]:
                w.measure(0, evaluation, "prefill_seconds", number * length / 1e3, 1, {"length": length})
                w.measure(0, evaluation, "token_seconds", 0.0125, 16, {"length": length})
                w.measure(0, evaluation, "cache_bytes", 3.5e6, 1, {"length": length})
    return directory / name


def test_a_line_for_each_evaluation_of_a_run_or_for_each_run(tmp_path):
    a, b = make_run(tmp_path, "a", ("iRoPE", "all RoPE")), make_run(tmp_path, "b", ("cost",))
    reading = costs(load_arms([a]), "prefill_seconds")
    assert reading == {"iRoPE": {8192: 8.192, 16384: 16.384}, "all RoPE": {8192: 16.384}}
    assert set(costs(load_arms([a, b]), "prefill_seconds")) == {"a: iRoPE", "a: all RoPE", "b"}


def test_tables_have_units_and_say_what_is_missing(tmp_path):
    tables = cost_tables(load_arms([make_run(tmp_path, "a", ("iRoPE", "all RoPE"))]))
    assert [table.title for table in tables] == ["Reading the text, s", "A token after it, ms", "KV cache, MB"]
    assert tables[0].columns == ("tokens", "8,192", "16,384")
    assert tables[0].rows == (("iRoPE", "8.19", "16.4"), ("all RoPE", "16.4", "–"))
    assert tables[1].rows[0] == ("iRoPE", "12.5", "12.5") and tables[2].rows[0] == ("iRoPE", "3.5", "3.5")


def test_the_page_has_the_figure_and_no_empty_sections(tmp_path):
    page = write_report([make_run(tmp_path, "a", ("iRoPE", "all RoPE"))], tmp_path / "out").read_text()
    assert "(cost_by_length.png)" in page and (tmp_path / "out" / "cost_by_length.png").stat().st_size > 10_000
    assert "Not measured" not in page and "no result to show" not in page and "was not measured" not in page
    assert "No loss was recorded" in page  # a run that should have trained
    assert cost_by_length(load_arms([make_run(tmp_path, "none", ())]), tmp_path / "none.png") is None


def test_what_was_only_evaluated_misses_no_training(tmp_path):
    run = make_run(tmp_path, "a", ("iRoPE",))
    with RunWriter(run, {"name": "a", "evals": [], "train": {"steps": 9}}, "a", tensorboard=False,
                   on_config_change="accept") as w:  # fmt: skip
        w.measure(0, "iRoPE", "prefill_seconds", 1234.5, 1, {"length": LENGTHS[0]})
        w.event(0, "evaluated")
    page = write_report([run], tmp_path / "out").read_text()
    assert "training step" not in page and "Training" not in page and "| evaluated |" in page
    assert "| 1,234 |" in page or "| 1,235 |" in page
