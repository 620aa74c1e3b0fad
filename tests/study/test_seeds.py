from dataclasses import replace

import pytest

from irope_jax.core.records import RecordError, RunWriter, load_run
from irope_jax.study.collect import further, retrieval
from irope_jax.study.html import write_html
from irope_jax.study.reach import steps_table
from irope_jax.study.report import write_page
from irope_jax.study.seeds import pooled_arm
from irope_jax.study.tables import retrieval_table

LENGTHS = (128, 1024)


def run(tmp_path, seed, accuracies, steps=3, **config):
    values = {
        "name": f"s/arm/seed={seed}", "seed": seed, "data": {"seed": seed, "seq_len": 128}, "train": {"steps": 3},
        "evals": [{"kind": "retrieval", "name": "retrieval"}], **config,
    }  # fmt: skip
    with RunWriter(tmp_path / f"seed={seed}", values, f"mark {seed}") as writer:
        writer.start(0)
        for step in range(1, steps + 1):
            writer.train(step, {"loss": 3.0 - step + seed})
        writer.measure(1, "retrieval", "accuracy", 0.0, 10, {"length": 128, "straddle": False})  # an earlier one
        for length, accuracy in zip(LENGTHS, accuracies, strict=True):
            writer.measure(steps, "retrieval", "accuracy", accuracy, 10, {"length": length, "straddle": False})
        writer.event(steps, "finished")
    return load_run(tmp_path / f"seed={seed}")


def test_means_and_spread_over_seeds(tmp_path):
    runs = [run(tmp_path, 0, (1.0, 0.5)), run(tmp_path, 1, (0.9, 0.7)), run(tmp_path, 2, (0.8, 0.3), steps=2)]
    arm = pooled_arm(0, "arm", runs)
    near, far = retrieval(arm)
    assert near.value == pytest.approx(0.9) and near.interval == (0.8, 1.0) and near.count == 30
    assert far.value == pytest.approx(0.5) and far.interval == (0.3, 0.7)
    assert retrieval_table([arm]).rows[0] == ("arm", "0.900 (0.80–1.00)", "0.500 (0.30–0.70)")
    assert arm.run.series("loss") == ([1, 2], [pytest.approx(3.0), pytest.approx(2.0)])


def test_a_further_evaluation_has_tables_and_pictures_of_its_own(tmp_path):
    evals = [{"kind": "retrieval", "name": "retrieval"}, {"kind": "retrieval", "name": "64 facts"}]
    runs = [run(tmp_path, seed, (1.0, 0.5), evals=evals) for seed in (0, 1)]
    for seed, accuracy in enumerate((0.25, 0.75)):
        with RunWriter(runs[seed].directory, runs[seed].config, f"mark {seed}") as writer:
            writer.measure(3, "64 facts", "accuracy", accuracy, 10, {"length": 1024, "straddle": False})
            writer.measure(3, "64 facts", "accuracy", 0.0, 1, {"length": 1024, "straddle": True})
    arm = pooled_arm(0, "arm", [load_run(one.directory) for one in runs])
    text = write_page([arm], tmp_path / "out", title="Q?", command="irope report x").read_text()
    assert "**64 facts: retrieval accuracy, facts inside one chunk**" in text and "0.500 (0.25–0.75)" in text
    assert (tmp_path / "out" / "retrieval_64_facts_inside.png").is_file()
    assert "**Retrieval accuracy, facts inside" not in text and "No fact lay across a border of chunks." in text
    assert not (tmp_path / "out" / "retrieval_inside.png").is_file()
    assert [c.value for c in retrieval(arm)] == [1.0, 0.5]


def test_one_seed_keeps_its_wilson_interval(tmp_path):
    cell = retrieval(pooled_arm(0, "arm", [run(tmp_path, 0, (1.0, 0.5))]))[0]
    assert cell.spread is None and cell.interval[0] == pytest.approx(0.722, abs=1e-3)


def test_runs_that_differ_in_more_than_the_seed_are_no_arm(tmp_path):
    runs = [run(tmp_path, 0, (1.0, 0.5)), run(tmp_path, 1, (0.9, 0.7), train={"steps": 4})]
    with pytest.raises(RecordError, match=r"seed=1: not of the same arm as .*train.steps: 3 -> 4"):
        pooled_arm(0, "arm", runs)


def test_the_page_says_what_the_bands_are_and_its_html_asks_nothing_from_outside(tmp_path):
    arm = pooled_arm(0, "arm", [run(tmp_path, 0, (1.0, 0.5)), run(tmp_path, 1, (0.9, 0.7))])
    page = write_page([arm], tmp_path / "out", title="Q?", command="irope report x", foreword="<script>1</script>")
    assert "from the least to the greatest of them" in page.read_text()
    text = page.with_suffix(".html").read_text()
    assert "<h1>Q?</h1>" in text and "data:image/png;base64," in text and "<table>" in text
    assert "http" not in text and "<script" not in text


def test_pictures_outside_of_the_page_are_not_taken_in(tmp_path):
    (tmp_path / "page.md").write_text("# x\n\n![a](https://example.org/a.png) ![b](missing.png)\n")
    assert "example.org" not in write_html(tmp_path / "page.md").read_text()


def test_steps_until_retrieval_are_those_after_which_it_stayed(tmp_path):
    """By seed: 0.9 at 2 and for good from 4 on; from 3 on; never. The evaluation at the end only is not followed."""
    courses = ((0.0, 0.95, 0.8, 0.9), (0.1, 0.2, 0.92, 1.0), (0.0, 0.0, 0.6, 0.7))
    evals = [{"kind": "retrieval", "name": name} for name in ("retrieval", "on the way")]
    more = dict(evals=evals, train={"steps": 4, "eval_during": ["on the way"]})
    runs = [run(tmp_path, seed, (1.0, 0.5), steps=4, **more) for seed in range(3)]
    for one, course in zip(runs, courses, strict=True):
        with RunWriter(one.directory, one.config, one.fingerprint) as writer:
            for step, accuracy in enumerate(course, start=1):
                writer.measure(step, "on the way", "accuracy", accuracy, 10, {"length": 128, "straddle": False})
    arm = pooled_arm(0, "arm", [load_run(one.directory) for one in runs])
    table = steps_table([arm])
    assert table.columns == ("run", "0.5", "0.9", "0.97")
    assert table.rows == (("arm", "3 (2–3)", "4 (3–4), 1 of 3 not in 4", "4, 2 of 3 not in 4"),)
    text = write_page([arm], tmp_path / "out", title="Q?", command="irope report x").read_text()
    assert table.title in text and "### on the way" not in text
    alone = pooled_arm(0, "alone", [load_run(runs[1].directory)])
    assert steps_table([alone]).rows == (("alone", "3", "3", "4"),)
    assert further([arm, alone], "retrieval") == []
    ordinary = replace(alone, run=replace(alone.run, config={**alone.run.config, "train": {"steps": 4}}))
    assert [name for name, _ in further([arm, ordinary], "retrieval")] == ["on the way"]
    ends_only = replace(alone.run, evals=[m for m in alone.run.evals if m.evaluation == "retrieval" and m.step == 4])
    assert steps_table([replace(alone, run=ends_only)]) is None


def test_what_was_not_recorded_is_not_said_to_be_absent(tmp_path):
    with RunWriter(tmp_path / "old", {"name": "old", "data": {"seq_len": 128}}, "old") as writer:
        writer.start(0)
        writer.train(1, {"loss": 1.0})
        writer.measure(1, "retrieval", "accuracy", 0.5, 10, {"length": 128})
    text = write_page([pooled_arm(0, "old", [load_run(tmp_path / "old")])], tmp_path / "out", title="", command="")
    assert "Whether a fact straddled a chunk border was not recorded." in text.read_text()
