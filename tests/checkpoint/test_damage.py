"""Damaged checkpoints: every kind is found and named, the one before is used, and the step can be saved again."""

import errno
import json
import logging
import os
import shutil
import threading

import jax
import numpy as np
import pytest

from irope_jax.checkpoint import checksums
from irope_jax.checkpoint.damage import DAMAGED
from irope_jax.checkpoint.native import CHECKPOINTS, CheckpointConfig, CheckpointError, Checkpoints
from irope_jax.core.config import ConfigError

STEPS = (1, 2, 3)
KEEP = CheckpointConfig(keep=9)


def value(step):
    return {"params": {"x": np.arange(5000.0) * step, "y": np.arange(7) + step}}


def save(checkpoints, step):
    checkpoints.save(step, value(step), {"taken": step}, {"step": step})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    with Checkpoints(directory, KEEP, create=True) as checkpoints:
        for step in STEPS:
            save(checkpoints, step)
    return directory


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def files_of(run, step):
    directory = run / CHECKPOINTS / str(step)
    names = json.loads((directory / checksums.LIST).read_text())["files"]
    return [directory / name for name in (*names, checksums.LIST)]


def newest(run):
    with Checkpoints(run) as checkpoints:
        return checkpoints.latest


@pytest.mark.parametrize("damage", [truncate, flip, os.remove])
def test_every_file_counts(run, damage):
    names = [path.name for path in files_of(run, 3)]
    assert len(names) >= 10 and "_CHECKPOINT_METADATA" in names and "manifest.ocdbt" in names
    for path in files_of(run, 3):
        kept = path.read_bytes()
        damage(path)
        fault = checksums.fault(run / CHECKPOINTS / "3")
        assert fault is not None and path.name in fault, (path, fault)
        path.write_bytes(kept)
    assert checksums.fault(run / CHECKPOINTS / "3") is None


def test_the_list_waits_for_metadata_that_orbax_writes_beside_it(tmp_path):
    """Listed too early, a whole checkpoint would later pass for damaged."""
    file, whole = tmp_path / "_CHECKPOINT_METADATA", {"item_handlers": {"state": "x"}, "commit_timestamp_nsecs": None}
    file.write_text(json.dumps({"item_handlers": None, "commit_timestamp_nsecs": None}))
    with pytest.raises(TimeoutError, match="not whole"):
        checksums.write_list(tmp_path, patience=0.0)
    later = threading.Timer(0.3, lambda: file.write_text(json.dumps(whole)))
    later.start()
    checksums.write_list(tmp_path)
    later.join()
    file.write_text(json.dumps(whole | {"commit_timestamp_nsecs": 7}))
    assert checksums.fault(tmp_path) is None


def test_every_byte_of_the_list_counts(run):
    listed = files_of(run, 3)[-1]
    for at in np.linspace(0, 1, 40):
        kept = listed.read_bytes()
        flip(listed, at)
        assert checksums.fault(listed.parent) is not None, at
        listed.write_bytes(kept)


def test_the_one_before_is_used_and_one_line_names_the_file(run, caplog):
    flip(files_of(run, 3)[-2])
    os.remove(run / CHECKPOINTS / "2" / checksums.LIST)
    with caplog.at_level(logging.WARNING, "irope_jax"), Checkpoints(run) as checkpoints:
        assert checkpoints.latest == 1
        state, place, meta = checkpoints.read()
        assert checkpoints.meta() == meta == {"step": 1} and place == {"taken": 1}
    np.testing.assert_array_equal(state["params"]["x"], value(1)["params"]["x"])
    said = {record.getMessage() for record in caplog.records}
    assert any("checkpoints/3: state/" in line and "checksum" in line for line in said), said
    assert any("checkpoints/2: checksums.json is missing" in line for line in said), said
    assert sorted(p.name for p in (run / CHECKPOINTS).iterdir()) == ["1", "2", "3"]  # reading moves nothing


def test_a_step_that_is_asked_for_is_not_replaced_by_another(run):
    truncate(files_of(run, 3)[-2])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), value(3)["params"])
    here = jax.tree.map(lambda x: jax.sharding.SingleDeviceSharding(jax.devices()[0]), target)
    for read in ("read", "meta", "arrays", "restore", "restore_params"):
        with Checkpoints(run) as checkpoints, pytest.raises(CheckpointError, match=r"checkpoints/3: state/.*were writ"):
            getattr(checkpoints, read)(*((target, here) if read.startswith("restore") else ()), step=3)


def test_training_goes_on_and_saves_that_step_again(run):
    flip(files_of(run, 3)[0])
    with Checkpoints(run, KEEP, create=True) as checkpoints:
        assert checkpoints.latest == 2
        save(checkpoints, 3)
    assert newest(run) == 3
    assert [p.name for p in (run / DAMAGED).iterdir()] == ["3"]
    flip(files_of(run, 3)[0])
    with Checkpoints(run, KEEP, create=True) as checkpoints:
        assert checkpoints.latest == 2
    assert sorted(p.name for p in (run / DAMAGED).iterdir()) == ["3", "3.1"]


def test_when_none_is_whole_nothing_begins_anew_in_silence(run):
    for step in STEPS:
        flip(files_of(run, step)[-2])
    for _ in range(2):
        refused = pytest.raises(CheckpointError, match="no earlier checkpoint is whole")
        with Checkpoints(run, create=True) as checkpoints, refused:
            checkpoints.latest  # noqa: B018


def test_checkpoints_of_before_there_were_checksums_are_used(run, caplog):
    directory = run / CHECKPOINTS / "3"
    os.remove(directory / checksums.LIST)
    metadata = json.loads((directory / "_CHECKPOINT_METADATA").read_text())
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata | {"custom_metadata": {}}))
    with caplog.at_level(logging.INFO, "irope_jax"):
        assert newest(run) == 3
    assert "before there were checksums" in caplog.text


def test_going_back(run):
    with Checkpoints(run, KEEP, create=True) as checkpoints:
        assert [checkpoints.newest(before) for before in (9, 3, 2, 1)] == [3, 2, 1, None]
        save(checkpoints, 4)
        checkpoints.discard_after(1)
        assert checkpoints.latest == 1
        checkpoints.save(2, value(20), {}, {})
        checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.read()[0]["params"]["y"], value(20)["params"]["y"])
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; there are \[1, 2\]"):
            checkpoints.discard_after(7)
    assert newest(run) == 2


def full(directory):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def test_a_full_disk_is_one_line_that_names_the_directory(run, monkeypatch):
    monkeypatch.setattr(checksums, "write_list", full)
    raised = pytest.raises(CheckpointError, match=r"run/checkpoints: cannot save step 4 there \(.*No space left")
    with raised as error, Checkpoints(run, KEEP, create=True) as checkpoints:
        save(checkpoints, 4)
    assert "\n" not in str(error.value)
    assert newest(run) == 3


def test_a_full_disk_may_be_survived(run, monkeypatch, caplog):
    with Checkpoints(run, CheckpointConfig(keep=2, on_save_error="continue"), create=True) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checksums, "write_list", full)
            for step in (4, 5):
                save(checkpoints, step)
            checkpoints.wait()
        assert checkpoints.latest == 3
        save(checkpoints, 6)
    assert newest(run) == 6
    assert "cannot save step 4" in caplog.text and "cannot save step 5" in caplog.text


def test_a_place_that_cannot_hold_checkpoints(tmp_path):
    (tmp_path / CHECKPOINTS).write_text("a file")
    cannot = pytest.raises(CheckpointError, match=r"checkpoints: cannot save step 1 there \(.*Not a directory")
    with cannot, Checkpoints(tmp_path, create=True) as checkpoints:
        save(checkpoints, 1)


def test_several_processes_do_not_go_on_without_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="on_save_error='continue'"):
        Checkpoints(tmp_path, CheckpointConfig(on_save_error="continue"), create=True)
