"""The page: complete when everything is there, honest when it is not, and links that lead somewhere."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import irope_jax
from irope_jax.core.records import RecordError
from irope_jax.study.collect import load_arms
from irope_jax.study.report import terminal_tables, write_report
from tests.study.fake_runs import make_run

pytest.importorskip("matplotlib")


def sections(page):
    parts = re.split(r"^## ", page.read_text(), flags=re.M)
    return {part.split("\n", 1)[0]: part for part in parts[1:]} | {"": parts[0]}


def test_a_whole_comparison(tmp_path):
    runs = [make_run(tmp_path, "irope", steps=20), make_run(tmp_path, "all-rope", steps=20, decay=0.3, seed=1)]
    page = write_report(runs, tmp_path / "out" / "page", title="What iRoPE buys", command="irope report it")
    text, parts = page.read_text(), sections(page)
    assert page == tmp_path / "out" / "page" / "report.md"
    assert text.startswith("# What iRoPE buys\n\n![headline figure](headline.png)")
    assert "Read this first" not in text and "None" not in text
    assert list(parts) == ["What was run", "Retrieval", "Perplexity", "Training", "How this page was made", ""]
    assert "| all-rope | all-rope, from scratch on novels and facts | 1,234,567 | 128 | 20 |" in parts["What was run"]
    for title in ("all facts", "facts inside one chunk", "facts that straddle a chunk border"):
        assert f"**Retrieval accuracy, {title}**" in parts["Retrieval"]
    assert "| run | 1× (128) | 4× (512) | 16× (2,048) | 64× (8,192) |" in parts["Retrieval"]
    assert "| → 4,096 to 8,191 |" in parts["Perplexity"] and "Loss by context length" in parts["Perplexity"]
    assert "```bash\nirope report it\n```" in parts["How this page was made"]
    assert f"irope-jax {irope_jax.__version__}" in parts["How this page was made"]
    pictures = re.findall(r"\]\((.+?)\)", text)
    assert len(pictures) == 6 and all((page.parent / picture).exists() for picture in pictures)
    assert sorted(p.name for p in page.parent.glob("*.png")) == sorted(pictures)


def test_the_default_command_makes_the_page_again(tmp_path):
    run = make_run(tmp_path, "a b", steps=20, evaluations=())
    text = write_report([run], tmp_path / "out").read_text()
    assert f"irope report '{run}' --out {tmp_path / 'out'}" in text


def test_one_run_that_was_never_finished_nor_evaluated(tmp_path):
    page = write_report([make_run(tmp_path, "a", steps=40, done=20, evaluations=())], tmp_path / "out")
    parts = sections(page)
    assert "> - a: not finished, stopped at step 20 of 40." in parts[""]
    assert "> - a: retrieval was not measured." in parts[""] and "there is no result to show yet" in parts[""]
    assert "Not measured." in parts["Retrieval"] and "Not measured." in parts["Perplexity"]
    assert "20 of 40" in parts["What was run"] and "differ" not in parts["What was run"]
    assert [p.name for p in page.parent.glob("*.png")] == ["loss_curves.png"]


def test_a_run_that_recorded_nothing(tmp_path):
    page = write_report([make_run(tmp_path, "a", done=0, evaluations=())], tmp_path / "out")
    assert "No loss was recorded." in page.read_text() and not list(page.parent.glob("*.png"))


def test_only_one_half_of_the_headline(tmp_path):
    page = write_report([make_run(tmp_path, "a", steps=20, evaluations=("perplexity",))], tmp_path / "out")
    opening = sections(page)[""]
    assert "(headline.png)" in opening and "Mean loss by position" in opening and "Left:" not in opening


def test_damage_and_unwritable_places_are_record_errors(tmp_path):
    run = make_run(tmp_path, "a", done=5, evaluations=())
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="the report cannot be written there"):
        write_report([run], tmp_path / "file" / "out")
    with pytest.raises(RecordError, match="is not a run directory"):
        write_report([tmp_path], tmp_path / "out")


def test_terminal_tables_fit_a_terminal(tmp_path):
    console = pytest.importorskip("rich.console").Console(width=80, record=True, file=io.StringIO())
    runs = [make_run(tmp_path, "irope", steps=5), make_run(tmp_path, "all-rope", steps=5, decay=0.3)]
    for table in terminal_tables(load_arms(runs)):
        console.print(table)
    text = console.export_text()
    assert re.search(r"all-rope +\d\.\d{3} +\d\.\d{3} +\d\.\d{3} +\d\.\d{3}", text)
    assert "Retrieval accuracy, all facts" in text and "→ 128 to 255" in text


def test_study_needs_neither_jax_nor_matplotlib_to_be_imported():
    code = "import sys, irope_jax.study.report; assert not {'jax', 'flax', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(irope_jax.__file__).parents[1])
