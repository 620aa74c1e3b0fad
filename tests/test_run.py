"""The verbs end to end, in this process: train, stop, go on, evaluate, report."""

import os
import re
import shutil
import signal

import pytest

from irope_jax import cli
from irope_jax.checkpoint.native import Checkpoints
from irope_jax.core.numerics import assert_equal_trees
from irope_jax.core.records import RunWriter, load_run
from irope_jax.study.collect import load_arms
from tests import tiny

OF_THE_MACHINE = ("step_seconds", "tokens_per_second", "flops_per_second", "mfu", "memory_bytes")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(place):
    return f"--config={tiny.config_file(place)}"


@pytest.fixture(scope="module")
def whole(place, config):
    """A finished run; tests that change it take a copy."""
    directory = place / "whole"
    assert cli.main(["train", config, f"--run-dir={directory}"]) == 0
    return directory


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def irope(capfd, *arguments):
    capfd.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return code, out, err


def last_line_is_the_error(code, err, *parts):
    assert code == 1 and "Traceback" not in err, err
    error = err.strip().splitlines()[-1]
    assert error.startswith("irope: error: "), err
    for part in parts:
        assert part in error, (part, error)


def final(directory):
    with Checkpoints(directory) as checkpoints:
        return checkpoints.read()


def measured(directory):
    return {(r.step, r.evaluation, r.name, *r.where.items()): (r.value, r.count) for r in load_run(directory).evals}


def test_a_run_records_steps_evaluations_and_its_end(whole):
    run = load_run(whole)
    assert [r.step for r in run.train] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "grad_norm", "learning_rate", "tokens", "memory_bytes"} <= set(run.train[0].scalars)
    assert "tokens_per_second" not in run.train[0].scalars and "tokens_per_second" in run.train[1].scalars
    assert run.train[-1].scalars["tokens"] == 6 * 8 * 32
    assert {(r.step, r.evaluation) for r in run.evals} == {(s, e) for s in (3, 6) for e in ("perplexity", "retrieval")}
    assert [e.name for e in run.events if e.name != "spent"] == ["start", "finished"]
    assert list((whole / "tensorboard").iterdir())


def test_the_newest_checkpoints_are_kept_and_say_what_they_belong_to(whole):
    with Checkpoints(whole) as checkpoints:
        assert sorted(int(p.name) for p in checkpoints.directory.iterdir() if p.name.isdigit()) == [4, 6]
        meta = checkpoints.meta()
    assert meta["fingerprint"] == load_run(whole).fingerprint and meta["config"] == load_run(whole).config


def test_a_finished_run_started_again_says_so_and_does_nothing(capfd, copy, config):
    before = (copy / "records.jsonl").read_bytes()
    code, _, err = irope(capfd, "train", config, f"--run-dir={copy}")
    assert code == 0 and "finished" in err and "nothing to do" in err
    assert (copy / "records.jsonl").read_bytes() == before


def test_a_run_stopped_by_sigterm_saves_leaves_with_143_and_goes_on_bit_equal(
    capfd, monkeypatch, tmp_path, whole, config
):
    directory, record = tmp_path / "cut", RunWriter.train

    def record_and_stop(self, step, scalars):
        record(self, step, scalars)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunWriter, "train", record_and_stop)
    code, _, err = irope(capfd, "train", config, f"--run-dir={directory}")
    assert code == 128 + signal.SIGTERM and "the same command goes on" in err
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.latest == 3
    assert load_run(directory).events[-1].details == {"signal": "SIGTERM"}
    monkeypatch.undo()
    assert irope(capfd, "train", config, f"--run-dir={directory}")[0] == 0
    for found, wanted, what in zip(final(directory), final(whole), ("state", "data"), strict=False):
        assert_equal_trees(found, wanted, what=what)
    lines = [
        [(r.step, {k: v for k, v in r.scalars.items() if k not in OF_THE_MACHINE}) for r in load_run(d).train]
        for d in (directory, whole)
    ]
    assert lines[0] == lines[1]
    assert measured(directory) == measured(whole)


def test_another_config_is_refused_with_its_fields_and_accepted_when_told(capfd, copy, config):
    change = [config, f"--run-dir={copy}", "--config.train.steps=7", "--config.checkpoint.keep=5"]
    changed = "train.steps: 6 -> 7", "checkpoint.keep: 2 -> 5"
    last_line_is_the_error(*irope(capfd, "train", *change)[::2], *changed, "--on-config-change=accept")
    assert [r.step for r in load_run(copy).train] == [1, 2, 3, 4, 5, 6]
    code, _, err = irope(capfd, "train", *change, "--on-config-change=accept")
    assert code == 0, err
    run = load_run(copy)
    assert [r.step for r in run.train] == [1, 2, 3, 4, 5, 6, 7]
    assert "config_changed" in [e.name for e in run.events] and run.config["train"]["steps"] == 7


def test_eval_measures_a_checkpoint_again_and_adds_to_the_records(capfd, copy):
    code, out, err = irope(capfd, "eval", copy, "--step=4", "--only=perplexity")
    assert code == 0, err
    assert {(r.step, r.evaluation) for r in load_run(copy).evals if r.step == 4} == {(4, "perplexity")}
    before = measured(copy)
    code, out, _ = irope(capfd, "eval", copy)
    assert code == 0 and measured(copy) == before  # the same numbers as in training
    printed = re.findall(r"^retrieval  accuracy  ([\d.]+)  n=(\d+)", out, re.MULTILINE)
    recorded = [r for r in load_run(copy).evals if (r.step, r.evaluation, r.name) == (6, "retrieval", "accuracy")]
    assert [(float(a), int(n)) for a, n in printed] == [(round(r.value, 4), r.count) for r in recorded]


def test_eval_with_changed_values_prints_only(capfd, copy):
    before = (copy / "records.jsonl").read_bytes()
    code, out, err = irope(
        capfd, "eval", copy, "--only=retrieval", "--config.evals.1.lengths=(48,)", "--config.evals.1.queries=4"
    )
    assert code == 0 and "length=48" in out and "length=32" not in out
    assert "printed only" in err and (copy / "records.jsonl").read_bytes() == before
    assert load_run(copy).config["evals"][1]["lengths"] == [32]


def test_an_evaluation_with_a_name_of_its_own_joins_the_records_and_stays_what_it_is(capfd, copy):
    sliding = "({'kind': 'sliding_perplexity', 'name': 'slide', 'lengths': (32,), 'stride': 16, 'tokens': %d},)"
    code, out, err = irope(capfd, "eval", copy, "--config.evals=" + sliding % 128)
    assert code == 0 and "printed only" not in err and "slide  nll_sliding" in out
    recorded = lambda: [(r.name, r.count) for r in load_run(copy).evals if r.evaluation == "slide"]
    assert recorded() == [("nll_sliding", 128)]
    (arm,) = load_arms([copy])
    assert [m.count for m in arm.measurements("sliding_perplexity", "nll_sliding")] == [128]
    code, _, err = irope(capfd, "eval", copy, "--config.evals=" + sliding % 64)  # another, under the same name
    assert code == 0 and "printed only" in err and "slide" in err and recorded() == [("nll_sliding", 128)]
    code, _, err = irope(capfd, "train", f"--config={copy / 'config.json'}", f"--run-dir={copy}")
    assert code == 0 and "is finished" in err


def test_eval_on_another_mesh_still_belongs_to_the_run(capfd, copy):
    code, _, err = irope(capfd, "eval", copy, "--only=retrieval", "--config.mesh.data=2", "--config.mesh.fsdp=4")
    assert code == 0 and "printed only" not in err


def test_a_config_that_trains_nothing_is_evaluated_into_a_run_of_its_own(capfd, whole, tmp_path):
    """With the weights of the run it names, or fresh ones."""
    place = tmp_path / "asked"
    ask = ("eval", f"--config={tiny.config_file(tmp_path)}", f"--run-dir={place}", "--only=retrieval")
    code, _, err = irope(capfd, *ask, f"--config.train.init_from={whole}")
    assert code == 0, err
    key = lambda r: (r.evaluation, r.name, r.value, r.count, *r.where.items())
    there = [key(r) for r in load_run(whole).evals if (r.step, r.evaluation) == (6, "retrieval")]
    assert [key(r) for r in load_run(place).evals if r.step == 6] == there
    assert irope(capfd, "report", place)[0] == 0
    code, _, err = irope(capfd, *ask)
    last_line_is_the_error(code, err, "begun with other values", "--run-dir")
    code, _, err = irope(capfd, *ask[:2], f"--run-dir={tmp_path / 'fresh'}", "--only=retrieval")
    assert code == 0 and "fresh" in err
    for arguments in ((), (whole, ask[1])):
        code, _, err = irope(capfd, "eval", *arguments)
        assert code == 2 and "not both" in err
    code, _, err = irope(capfd, "eval", ask[1], f"--run-dir={whole}")
    assert code == 2 and f"irope eval {whole}" in err


def test_eval_mistakes(capfd, whole):
    code, _, err = irope(capfd, "eval", whole, "--only=retreival")
    assert code == 2 and "did you mean 'retrieval'?" in err
    last_line_is_the_error(*irope(capfd, "eval", whole, "--step=5")[::2], "no checkpoint of step 5", "[4, 6]")
    code, _, err = irope(capfd, "eval", whole, "--config.evals=()")
    assert code == 2 and "config.evals" in err.splitlines()[-1]


def test_report_of_a_run_is_a_page_with_pictures(capfd, copy):
    code, out, err = irope(capfd, "report", copy)
    assert code == 0, err
    page = copy / "report" / "report.md"
    assert os.path.samefile(re.search(r"^report: (.+)$", out, re.MULTILINE).group(1), page)
    pictures = re.findall(r"^picture: (.+\.png)$", out, re.MULTILINE)
    assert pictures and all(os.path.getsize(p) > 1000 for p in pictures)
    assert all(os.path.basename(p) in page.read_text() for p in pictures)


@pytest.mark.parametrize("file", ["state/manifest.ocdbt", "state/d/*", "data/metadata", "state/_METADATA"])
def test_a_damaged_checkpoint_is_one_clear_error(capfd, copy, file):
    damage(copy, file)
    code, _, err = irope(capfd, "eval", copy, "--step=6")
    last_line_is_the_error(code, err, str(copy / "checkpoints" / "6"), file.partition("*")[0], "were written")


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(capfd, copy, config):
    damage(copy, "state/d/*")
    code, _, err = irope(capfd, "train", config, f"--run-dir={copy}")
    assert code == 0 and "resuming at step 4" in err and "checkpoints/6: state/d/" in err, err
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.latest == 6
    assert [path.name for path in (copy / "damaged_checkpoints").iterdir()] == ["6"]


def damage(run, file):
    damaged = [p for p in (run / "checkpoints" / "6").glob(file) if p.is_file()]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_other_layers_of_the_same_parameters_are_evaluated(whole, capfd):
    """One kind of layer instead of two, so the parameters are stacked otherwise; other widths are refused."""
    one = "{'position': {'kind': 'rope'}, 'mask': {'kind': 'global'}, 'ffn': {'kind': 'swiglu', 'hidden_dim': 16}}"
    code, out, _ = irope(capfd, "eval", whole, f"--config.model.pattern=({one},)", "--only=perplexity")
    assert code == 0 and "nll_by_length" in out
    code, _, err = irope(capfd, "eval", whole, f"--config.model.pattern=({one},)", "--config.model.d_model=18")
    last_line_is_the_error(code, err, "has shape", "this model needs shape")
