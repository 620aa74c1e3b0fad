"""The loop: where it starts, what it saves, how it is stopped, and when it gives up. On eight devices."""

import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from irope_jax.checkpoint.native import CheckpointConfig, CheckpointError, Checkpoints
from irope_jax.core.config import ConfigError
from irope_jax.core.numerics import assert_equal_trees
from irope_jax.core.records import NullWriter
from irope_jax.evals.evaluator import Measurement
from irope_jax.stages import settings_of
from irope_jax.train.loop import Outcome, TrainingError, check_finite, train
from irope_jax.train.meter import Meter
from tests import tiny


class Notes(NullWriter):
    """Keeps what it is told; raises SIGTERM at the n-th call named in `stop_at`, such as ("train", 3)."""

    def __init__(self, stop_at=None):
        self.calls, self._stop_at = [], stop_at

    def _note(self, what, step, *details):
        self.calls.append((what, step, *details))
        if (what, step) == self._stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def start(self, step, /, **details):
        self._note("start", step)

    def train(self, step, scalars):
        self._note("train", step, scalars)

    def measure(self, step, evaluation, name, value, count, where=None):
        self._note("measure", step, name, value, evaluation)

    def event(self, step, name, /, **details):
        self._note(name, step, details)

    def steps(self, what):
        return [call[1] for call in self.calls if call[0] == what]


class Fingerprints:
    """An evaluation without a model: two numbers that no two sets of parameters share."""

    def __init__(self, name="fingerprints"):
        self.name = name

    def run(self, params):
        for name, leaf in (("first", jax.tree.leaves(params)[0]), ("last", jax.tree.leaves(params)[-1])):
            yield Measurement(name, float(np.abs(np.asarray(leaf, np.float64)).sum()), 1)


def go(directory, *overrides, writer=None, stop_at=None, evaluators=None):
    experiment = tiny.experiment(*overrides)
    writer = writer or Notes(stop_at)
    settings = settings_of(experiment, jax.device_count())
    outcome = train(
        directory,
        [replace(setting, evaluators=evaluators or [Fingerprints()]) for setting in settings],
        checkpoint=experiment.checkpoint,
        seed=experiment.seed,
        writer=writer,
        meta={"who": "test"},
    )
    return outcome, writer


def saved(directory, step=None):
    with Checkpoints(directory) as checkpoints:
        return checkpoints.read(step)


@pytest.fixture(scope="module")
def handlers():
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, handlers):
    directory = tmp_path_factory.mktemp("whole")
    return directory, *go(directory, ("checkpoint.keep", "9"))


def test_what_an_uninterrupted_run_does_in_which_order(whole):
    directory, outcome, notes = whole
    assert outcome == Outcome(tiny.STEPS)
    kinds = [call[:2] for call in notes.calls if call[0] != "spent"]
    evaluated = lambda step: [("measure", step)] * 2
    assert kinds == [
        ("start", 0), *[("train", s) for s in (1, 2, 3)], *evaluated(3),
        *[("train", s) for s in (4, 5, 6)], *evaluated(6), ("finished", 6),
    ]  # fmt: skip
    with Checkpoints(directory) as checkpoints:
        assert sorted(int(p.name) for p in checkpoints.directory.iterdir() if p.name.isdigit()) == [2, 4, 6]
    assert saved(directory)[2]["who"] == "test"
    told = [(call[1], call[2]) for call in notes.calls if call[0] == "spent"]
    assert [step for step, _ in told] == [2, 4, 6, 6] and {"steps", "start-up", "compile", "data"} <= told[0][1].keys()
    assert all(seconds >= 0 for _, spent in told for seconds in spent.values())


def test_only_evaluations_that_are_named_are_taken_on_the_way_and_all_at_the_end(tmp_path):
    """Cut in the one on the way, it is done again, and the other is still taken at the end only."""
    evaluators = [Fingerprints(), Fingerprints("retrieval")]
    named, directory = ("train.eval_during", "('retrieval',)"), tmp_path / "run"
    outcome, notes = go(directory, named, evaluators=evaluators, stop_at=("measure", 3))
    assert outcome.stopped_by and notes.steps("measure") == [3]
    _, notes = go(directory, named, evaluators=evaluators)
    taken = [(call[1], call[4]) for call in notes.calls if call[0] == "measure"]
    assert taken == [(3, "retrieval")] * 2 + [(6, "fingerprints")] * 2 + [(6, "retrieval")] * 2
    with pytest.raises(ConfigError, match=r"eval_during.*set eval_every"):
        tiny.experiment(named, ("train.eval_every", "None"))
    with pytest.raises(ConfigError, match=r"config.train.eval_during='retreival'.*did you mean 'retrieval'"):
        settings_of(tiny.experiment(("train.eval_during", "('retreival',)")), jax.device_count())


def test_loss_falls(whole):
    losses = [call[2]["loss"] for call in whole[2].calls if call[0] == "train"]
    assert losses[-1] < losses[0] - 0.1


def test_stopped_in_training_in_an_evaluation_and_in_the_last_one_it_ends_as_if_nothing_had_been(tmp_path, whole):
    stops = [("train", 1), ("measure", 3), ("measure", 3), ("train", 5), ("measure", 6), None]
    reached, notes = [], []
    for stop_at in stops:
        outcome, writer = go(tmp_path, ("checkpoint.keep", "9"), stop_at=stop_at)
        reached.append((outcome.step, outcome.stopped_by))
        notes.append(writer)
    sigterm = int(signal.SIGTERM)
    assert reached == [(1, sigterm), (3, sigterm), (3, sigterm), (5, sigterm), (6, sigterm), (6, None)]
    assert [w.steps("start") for w in notes] == [[0], [1], [3], [3], [5], [6]]
    assert [w.steps("train") for w in notes] == [[1], [2, 3], [], [4, 5], [6], []]
    # An evaluation that was cut is taken up again before anything else, and one that was not is not repeated.
    assert [w.steps("measure") for w in notes] == [[], [3], [3], [3, 3], [6], [6, 6]]
    for found, wanted in zip(saved(tmp_path)[:2], saved(whole[0])[:2], strict=True):
        assert_equal_trees(found, wanted)
    told = lambda writers, step: [c[2:] for w in writers for c in w.calls if c[:2] == ("measure", step)][-2:]
    assert [told(notes, s) for s in (3, 6)] == [told([whole[2]], s) for s in (3, 6)]


def test_the_signal_handlers_are_given_back(handlers, whole):
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_init_from_starts_with_the_parameters_of_another_run_and_nothing_else_of_it(tmp_path, whole):
    frozen = [("train.init_from", str(whole[0])), ("train.steps", "1"), ("train.optimizer.learning_rate", "1e-30")]
    go(tmp_path, *frozen)
    state, _, _ = saved(tmp_path)
    assert_equal_trees(state["params"], saved(whole[0])[0]["params"])
    assert int(state["step"]) == 1


def test_init_from_other_parameters_names_the_first_that_differs(tmp_path, whole):
    start = ("train.init_from", str(whole[0]))
    for change, message in (
        (("model.pattern.1.qk_norm", "learned"), "has nothing at periods/layer_1/attention/key_norm"),
        (("model.head_dim", "10"), r"shape \(1, 16, 2, 8\) at periods/layer_0/attention/key,.* \(1, 16, 2, 10\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            go(tmp_path, start, change)


def test_too_many_steps_that_are_not_finite_stop_the_run(tmp_path):
    """A rate of 1e30 throws the parameters out of range at once; every later step is skipped."""
    notes = Notes()
    wild = [("train.optimizer.learning_rate", "1e30"), ("train.optimizer.clip_norm", "none")]
    with pytest.raises(TrainingError, match=r"step 4: 3 steps in a row .* train.max_skipped_in_a_row=3.*learning_rate"):
        go(tmp_path, *wild, ("train.max_skipped_in_a_row", "3"), writer=notes)
    assert notes.steps("train") == [1, 2, 3, 4] and "finished" not in [call[0] for call in notes.calls]


def test_a_few_such_steps_do_not():
    check_finite({"skipped_in_a_row": 2, "skipped": 5}, step=9, limit=3)
    with pytest.raises(TrainingError, match="step 9: 3 steps in a row"):
        check_finite({"skipped_in_a_row": 3, "skipped": 5}, step=9, limit=3)


def test_keep_policy(tmp_path):
    state = {"x": np.arange(3)}
    with Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_every=4), create=True) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, state, {"step": step}, {})
        checkpoints.wait()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [4, 6, 7]


def test_the_meter_leaves_compiling_and_pauses_out(monkeypatch):
    now = iter([0.0, 100.0, 102.0, 150.0, 151.0])  # made, first step, second, evaluation over, third
    monkeypatch.setattr("irope_jax.train.meter.time", SimpleNamespace(monotonic=lambda: next(now)))
    meter = Meter(tokens_per_step=10, flops_per_token=7.0)
    assert "tokens_per_second" not in meter.read(1)
    assert meter.read(2)["tokens_per_second"] == 5.0
    meter.pause(2)
    figures = meter.read(3)
    assert (figures["step_seconds"], figures["tokens_per_second"], figures["flops_per_second"]) == (1.0, 10.0, 70.0)
    assert figures["tokens"] == 30.0
