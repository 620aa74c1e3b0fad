"""Run directories: what is written is read back, whatever kills the writer and however often it restarts."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import irope_jax
from irope_jax.core.records import ConfigChangedError, NullWriter, RecordError, RunWriter, is_run, load_run

CONFIG = {"name": "tiny", "model": {"layers": 4, "theta": 1e4}, "train": {"steps": 10}}


def writer(directory, config=CONFIG, fingerprint="aaaa", **kwargs):
    return RunWriter(directory, config, fingerprint, tensorboard=False, **kwargs)


def lines(directory):
    return [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]


def test_what_is_written_is_read_back(tmp_path):
    with writer(tmp_path / "run") as w:
        w.start(0, devices=8)
        w.train(1, {"loss": 2.5, "tokens": 4096})
        w.measure(1, "retrieval", "accuracy", 0.75, 64, {"length": 512, "depth": 0.5, "straddle": True})
        w.event(1, "checkpoint", path=tmp_path / "c", name="kept")
    run = load_run(tmp_path / "run")
    assert (run.name, run.fingerprint, run.config) == ("tiny", "aaaa", CONFIG)
    assert [(r.step, r.scalars) for r in run.train] == [(1, {"loss": 2.5, "tokens": 4096})]
    (m,) = run.evals
    assert (m.evaluation, m.name, m.value, m.count) == ("retrieval", "accuracy", 0.75, 64)
    assert m.where == {"length": 512, "depth": 0.5, "straddle": True}
    assert [(e.name, e.details) for e in run.events] == [
        ("start", {"devices": 8}),
        ("checkpoint", {"path": str(tmp_path / "c"), "name": "kept"}),
    ]
    assert run.last_step == 1 and run.series("loss") == ([1], [2.5]) and run.series("absent") == ([], [])


def test_a_line_is_on_disk_before_the_call_returns(tmp_path):
    w = writer(tmp_path)
    w.train(1, {"loss": 1.0})
    assert lines(tmp_path)[-1]["loss"] == 1.0  # the file is still open
    w.close()


def test_values_json_cannot_say(tmp_path):
    with writer(tmp_path) as w:
        w.train(1, {"loss": math.nan, "grad_norm": math.inf, "update_norm": -math.inf})
        w.measure(1, "perplexity", "nll_by_length", math.nan, 0, {"length": 8})
        w.event(1, "skipped", loss=math.nan)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "records.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    run = load_run(tmp_path)
    scalars = run.train[0].scalars
    assert math.isnan(scalars["loss"]) and scalars["grad_norm"] == math.inf and scalars["update_norm"] == -math.inf
    assert math.isnan(run.evals[0].value) and math.isnan(run.events[0].details["loss"])


def test_array_scalars_are_numbers_and_arrays_are_refused(tmp_path):
    numpy = pytest.importorskip("numpy")
    with writer(tmp_path) as w:
        w.train(numpy.int64(3), {"loss": numpy.float32(0.5)})
        w.event(3, "note", n=numpy.int32(7))
        with pytest.raises(TypeError, match="cannot record a ndarray"):
            w.event(3, "note", n=numpy.zeros(3))
    run = load_run(tmp_path)
    assert run.train[0].step == 3 and run.train[0].scalars == {"loss": 0.5} and run.events[0].details == {"n": 7}


def test_a_scalar_may_not_take_the_place_of_the_line_itself(tmp_path):
    with writer(tmp_path) as w, pytest.raises(ValueError, match="cannot be called 'step'"):
        w.train(1, {"step": 1.0})


def test_the_name_falls_back_to_the_directory(tmp_path):
    writer(tmp_path / "seven", config={"a": 1}).close()
    assert load_run(tmp_path / "seven").name == "seven"


@pytest.mark.parametrize("keep", range(1, 40, 6))
def test_a_torn_last_line_is_dropped_by_the_reader_and_removed_by_the_writer(tmp_path, keep):
    with writer(tmp_path) as w:
        w.train(1, {"loss": 3.0})
        w.train(2, {"loss": 2.0})
    path = tmp_path / "records.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:keep])
    assert load_run(tmp_path).series("loss") == ([1], [3.0])
    with writer(tmp_path) as w:
        w.start(1)
        w.train(2, {"loss": 1.5})
    assert path.read_bytes().startswith(first + b'{"kind": "event"')
    assert load_run(tmp_path).series("loss") == ([1, 2], [3.0, 1.5])


def test_a_line_without_its_newline_is_torn_for_both(tmp_path):
    """A whole object without its newline: reader and writer must agree, or the next line is glued to it."""
    with writer(tmp_path) as w:
        w.train(1, {"loss": 3.0})
        w.train(2, {"loss": 2.0})
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert load_run(tmp_path).last_step == 1
    with writer(tmp_path) as w:
        w.train(2, {"loss": 1.0})
    assert load_run(tmp_path).series("loss") == ([1, 2], [3.0, 1.0])


def test_going_back_supersedes_what_lay_beyond(tmp_path):
    def steps(w, first, last, loss):
        for step in range(first, last + 1):
            w.train(step, {"loss": loss})
            w.measure(step, "perplexity", "nll_by_length", loss, 1, {"length": 8})

    with writer(tmp_path) as w:
        w.start(0)
        steps(w, 1, 7, 0.1)
    with writer(tmp_path) as w:
        w.start(4)
        steps(w, 5, 6, 0.2)
    with writer(tmp_path) as w:
        w.start(5)
        steps(w, 6, 9, 0.3)
    run = load_run(tmp_path)
    assert run.series("loss") == ([1, 2, 3, 4, 5, 6, 7, 8, 9], [0.1] * 4 + [0.2] + [0.3] * 4)
    assert [m.value for m in run.evals] == [0.1] * 4 + [0.2] + [0.3] * 4
    assert [e.step for e in run.events if e.name == "start"] == [0, 4, 5]


def test_the_same_measurement_taken_twice_counts_once(tmp_path):
    with writer(tmp_path) as w:
        w.measure(5, "retrieval", "accuracy", 0.5, 10, {"length": 8, "depth": 0.1})
        w.measure(5, "retrieval", "accuracy", 0.9, 20, {"depth": 0.1, "length": 8})
        w.measure(6, "retrieval", "accuracy", 0.7, 10, {"length": 8, "depth": 0.1})
    assert [(m.step, m.value, m.count) for m in load_run(tmp_path).evals] == [(5, 0.9, 20), (6, 0.7, 10)]


def test_reopening_with_the_same_config_leaves_config_json_alone(tmp_path):
    writer(tmp_path).close()
    before = (tmp_path / "config.json").stat().st_mtime_ns
    writer(tmp_path).close()
    assert (tmp_path / "config.json").stat().st_mtime_ns == before


def test_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    writer(tmp_path).close()
    other = CONFIG | {"model": {"layers": 8, "heads": (2, 2)}}
    with pytest.raises(ConfigChangedError) as caught:
        writer(tmp_path, other, "bbbb")
    message = str(caught.value)
    assert "model.layers: 4 -> 8" in message and "model.theta: 10000.0 -> absent" in message
    assert "on_config_change" in message and "\n" not in message
    assert len(caught.value.differences) == 3
    assert load_run(tmp_path).fingerprint == "aaaa"


def test_another_config_can_be_accepted_and_is_recorded(tmp_path):
    with writer(tmp_path) as w:
        w.train(3, {"loss": 1.0})
    other = CONFIG | {"train": {"steps": 20}}
    writer(tmp_path, other, "bbbb", on_config_change="accept").close()
    run = load_run(tmp_path)
    assert run.config == other and run.fingerprint == "bbbb" and run.last_step == 3
    (event,) = run.events
    assert (event.step, event.name) == (3, "config_changed")
    assert event.details == {"differences": ["train.steps: 10 -> 20"], "old_fingerprint": "aaaa"}
    writer(tmp_path, other, "bbbb").close()
    assert len(load_run(tmp_path).events) == 1


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (b'{"kind": "train", "step": 2, "ti\n', "line 2: not a record"),
        (b'{"kind": "train", "time": 0}\n', "line 2: not a record (no field 'step')"),
        (b'{"kind": "train", "step": 2, "time": 0, "loss": "abc"}\n', "line 2: not a record (could not convert"),
        (b'{"kind": "trane", "step": 2, "time": 0}\n', "line 2: not a record (unknown kind 'trane')"),
        (b"[1]\n", "line 2: not a record"),
        (b"\xff\xfe\n", "line 2: not a record"),
        (b"\n", "line 2: not a record"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, damage, says):
    with writer(tmp_path) as w:
        w.train(1, {"loss": 1.0})
        w.train(2, {"loss": 1.0})
    path = tmp_path / "records.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + second)
    with pytest.raises(RecordError) as caught:
        load_run(tmp_path)
    assert str(path) in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{\n "config": {\n', "line 3: not JSON"),
        ('{"config": {}}', "no 'config' with its 'fingerprint'"),
        ("[]", "no 'config'"),
        ('{"format": 99, "config": {}, "fingerprint": "a"}', "format 99, this version reads 1"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, text, says):
    writer(tmp_path).close()
    (tmp_path / "config.json").write_text(text)
    for attempt in (lambda: load_run(tmp_path), lambda: writer(tmp_path)):
        with pytest.raises(RecordError) as caught:
            attempt()
        assert "config.json" in str(caught.value) and says in str(caught.value)


def test_what_is_not_a_run_directory(tmp_path):
    assert not is_run(tmp_path)
    with pytest.raises(RecordError, match="is not a run directory"):
        load_run(tmp_path)
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(RecordError, match=r"config\.json: missing beside records\.jsonl"):
        writer(tmp_path)
    assert not is_run(tmp_path)


def test_a_run_without_records_can_be_read(tmp_path):
    writer(tmp_path).close()
    (tmp_path / "records.jsonl").unlink()
    run = load_run(tmp_path)
    assert is_run(tmp_path) and (run.train, run.evals, run.events, run.last_step) == ([], [], [], 0)


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with NullWriter() as w:
        w.start(0)
        w.train(1, {"loss": 1.0})
        w.measure(1, "e", "n", 1.0, 1, {})
        w.event(1, "x", any="thing")
    assert list(tmp_path.iterdir()) == []
    public = {name for name in vars(RunWriter) if not name.startswith("_")}
    assert public <= set(vars(NullWriter))


def test_the_mirror_is_written_only_when_asked(tmp_path):
    pytest.importorskip("tensorboardX")
    with RunWriter(tmp_path / "with", CONFIG, "a", tensorboard=True) as w:
        w.start(3)
        w.train(4, {"loss": 1.0, "grad_norm": math.nan})
        w.measure(4, "retrieval", "accuracy", 1.0, 1, {"length": 8})
    content = b"".join(p.read_bytes() for p in (tmp_path / "with" / "tensorboard").iterdir())
    assert b"train/loss" in content and b"eval/retrieval/accuracy/length_8" in content
    writer(tmp_path / "without").close()
    assert not (tmp_path / "without" / "tensorboard").exists()


def test_records_need_no_jax():
    code = "import sys, irope_jax.core.records; assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(irope_jax.__file__).parents[1])
