"""A run that is asked to stop: by signals, by a machine that has to go, by the votes of other processes."""

import os
import signal
import threading

import jax
import numpy as np

from irope_jax.core import stopping
from irope_jax.core.notices import NoticeWatch
from irope_jax.core.stopping import StopRequest


def test_votes_are_read_one_step_late_unless_the_step_is_waited_for(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    vote = lambda number: np.asarray(number, np.int32)
    late = StopRequest()
    heard = []
    for number in (0, 15, 15):
        late.hear(vote(number), newest=False)
        heard.append(late.signal)
    assert heard == [None, None, signal.SIGTERM]
    at_once = StopRequest()
    at_once.hear(vote(0), newest=False)
    at_once.hear(vote(15), newest=True)
    assert at_once.signal == signal.SIGTERM


def test_a_vote_is_the_signal_that_came_and_alone_there_is_none(monkeypatch):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    with StopRequest() as stop:
        assert stop.vote(mesh) is None and not stop.ask()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM and stop.ask() and stop.vote(mesh) is None
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        assert stop.signal is None  # not agreed yet
        np.testing.assert_array_equal(np.asarray(stop.vote(mesh)), np.full(8, 15))


def test_a_notice_stops_a_run_like_sigterm(monkeypatch):
    monkeypatch.setattr(stopping, "tpu_chips", lambda: True)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    came = threading.Event()

    class Told(NoticeWatch):
        def __init__(self, called):
            super().__init__(lambda text: (called(text), came.set()), lambda entry: "TRUE")

    monkeypatch.setattr(stopping, "NoticeWatch", Told)
    with StopRequest() as stop:
        assert came.wait()
        assert stop.signal == signal.SIGTERM and stop.ask()


def test_slurms_signal_stops_a_run():
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal == signal.SIGUSR1 and stop.ask()
    assert signal.getsignal(signal.SIGUSR1) == before
