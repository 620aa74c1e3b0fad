"""Hanging runs, dead processes and machines that have to go: turns taken by hand, and clocks that are set."""

import json
import os
import threading

import jax
import pytest

from irope_jax.core import hosts
from irope_jax.core.config import ConfigError
from irope_jax.core.notices import NoticeWatch
from irope_jax.core.pulse import SILENT, Pulse
from irope_jax.core.watchdog import Watchdog, WatchdogConfig


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


# ---- watchdog ----------------------------------------------------------------------------------------------------


def test_silence_is_told_once_per_period_with_step_phase_host_and_stacks(clock, tmp_path, caplog):
    left = []
    with open(tmp_path / "stacks", "w+") as out:
        dog = Watchdog(WatchdogConfig(seconds=60), clock=clock, out=out, leave=left.append)
        told = []
        for now in (0, 59, 60, 100, 119, 120):
            clock.now = now
            told.append(dog.check())
        assert told == [False, False, True, False, False, True] and left == []
        assert "test_silence_is_told" in (tmp_path / "stacks").read_text()
    assert "nothing finished for 60 s: start-up after step 0, process 0 of 1 on " in caplog.text


def test_a_beat_begins_anew_and_names_what_comes(clock, tmp_path, caplog):
    with open(tmp_path / "stacks", "w") as out:
        dog = Watchdog(WatchdogConfig(seconds=10), clock=clock, out=out)
        clock.now = 9
        dog.beat(7, "evaluation")
        clock.now = 18
        assert not dog.check()
        clock.now = 19
        assert dog.check()
    assert "for 10 s: evaluation after step 7" in caplog.text


def test_it_leaves_if_told_to(clock, tmp_path):
    left = []
    with open(tmp_path / "stacks", "w") as out:
        dog = Watchdog(WatchdogConfig(seconds=1, exit_code=70), clock=clock, out=out, leave=left.append)
        clock.now = 1
        dog.check()
    assert left == [70]


def test_its_thread_looks_and_ends(clock, tmp_path):
    called = threading.Event()
    with open(tmp_path / "stacks", "w") as out:
        config = WatchdogConfig(seconds=0.01, exit_code=70)
        with Watchdog(config, clock=clock, out=out, leave=lambda code: called.set()) as dog:
            clock.now = 1
            assert called.wait()
        assert not dog._thread.is_alive()
    with Watchdog(WatchdogConfig(seconds=None)) as off:
        assert off._thread is None and not off.check()


@pytest.mark.parametrize(("fields", "said"), [(dict(seconds=0), "seconds=0"), (dict(exit_code=2), "exit_code=2")])
def test_impossible_watchdogs(fields, said):
    with pytest.raises(ConfigError, match=said):
        WatchdogConfig(**fields)


# ---- signs of life -----------------------------------------------------------------------------------------------


class Store:
    """What jax's store does, in one process."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, key):
        return [(k, v) for k, v in self.values.items() if k.startswith(key)]


@pytest.fixture
def pulses(clock):
    store = Store()
    return [Pulse(store, process, clock=clock) for process in range(3)]


def turn(pulses, clock, now):
    clock.now = now
    return [pulse.turn() for pulse in pulses]


def test_a_process_that_falls_silent_is_named_by_all_others(pulses, clock):
    assert turn([*pulses, pulses[0]], clock, 0) == [None] * 4  # now process 0 has heard of all
    others = pulses[:2]
    assert turn(others, clock, SILENT - 1) == [None] * 2
    first, second = turn(others, clock, SILENT)
    assert first == second and first.startswith(f"process 2 (pid {os.getpid()} on ")
    assert others[1].who(0) == first


def test_those_who_breathe_or_left_are_not_named(pulses, clock):
    turn([*pulses, pulses[0]], clock, 0)
    pulses[1].leave()
    for k in range(1, 10):
        assert turn([pulses[0], pulses[2]], clock, k * SILENT * 0.9) == [None] * 2
    assert json.loads(pulses[0]._store.values["irope/alive/1"])[1] == "left"


def test_only_errors_about_others_wait_for_a_name(pulses, clock, monkeypatch):
    assert hosts.lost_process(RuntimeError("Gloo all-reduce failed: connection closed by peer")) is None  # alone
    monkeypatch.setattr(hosts, "_pulse", pulses[0])
    assert hosts.lost_process(ValueError("out of memory")) is None  # at once
    turn([*pulses, pulses[0]], clock, 0)
    turn(pulses[:1], clock, SILENT)
    assert "is gone" in hosts.lost_process(RuntimeError("Gloo all-reduce failed: Connection closed by peer"))


# ---- notices -----------------------------------------------------------------------------------------------------


def absent(entry):
    raise OSError("no such server")


@pytest.mark.parametrize(
    ("read", "notice"),
    [
        ({"maintenance-event": "NONE", "preempted": "FALSE"}.get, None),
        ({"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "FALSE"}.get, "maintenance-event: TERM"),
        ({"maintenance-event": "NONE", "preempted": "TRUE"}.get, "preempted: TRUE"),
        (absent, None),
    ],
)
def test_what_the_metadata_server_says(read, notice):
    found = NoticeWatch(lambda text: None, read).look()
    assert found is None if notice is None else found.startswith(notice)


def test_alone_nothing_is_watched():
    assert jax.process_count() == 1 and hosts._pulse is None
