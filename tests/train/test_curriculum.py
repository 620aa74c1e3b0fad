"""Stages: what they change, when they end, and that no border, gate or kill leaves a trace. On eight devices."""

from dataclasses import replace

import jax
import pytest

from irope_jax.checkpoint import checksums
from irope_jax.core.config import ConfigError, to_dict
from irope_jax.core.numerics import assert_equal_trees
from irope_jax.evals.evaluator import Measurement
from irope_jax.experiment import resolve
from irope_jax.stages import experiment_at, settings_of, stage_experiments
from irope_jax.train.curriculum import Condition, Gate, judge
from irope_jax.train.loop import Outcome, TrainingError, train
from tests import tiny
from tests.quickly import thorough
from tests.train.test_loop import Fingerprints, Notes, saved

LENGTH = 32
YARN = {"kind": "yarn", "factor": 2.0, "original_length": 16}
STAGES = (
    dict(name="short", steps=3),
    dict(
        name="long", steps=3, length=2 * LENGTH, batch_tokens=16 * LENGTH,
        change={
            "model.pattern.*.position.scaling": YARN,
            "model.pattern.*.mask.size": 16,
            "train.optimizer.learning_rate": 1e-3,
        },
    ),
    dict(name="wide", steps=2, change={"mesh.fsdp": 1, "mesh.data": 8}, optimizer_state="reset", schedule="run"),
)  # fmt: skip


class Counting(Fingerprints):
    """Also a number that falls with every call: 1, 1/2, 1/3 …"""

    name = "counting"

    def __init__(self):
        self.calls = 0

    def run(self, params):
        self.calls += 1
        yield Measurement("nll_by_length", 1 / self.calls, 4, {"length": 32})


def go(directory, stages, stop_at=None, evaluators=None, overrides=()):
    experiment = resolve(to_dict(tiny.experiment(*overrides)) | {"stages": list(stages)})
    writer, evaluators = Notes(stop_at), evaluators or [Fingerprints()]
    settings = [replace(one, evaluators=evaluators) for one in settings_of(experiment, jax.device_count())]
    outcome = train(
        directory, settings, checkpoint=experiment.checkpoint, seed=experiment.seed, writer=writer, meta={},
    )  # fmt: skip
    return outcome, writer


def test_each_stage_is_the_config_with_what_changed():
    experiment = resolve(to_dict(tiny.experiment()) | {"stages": list(STAGES)})
    short, long, wide = stage_experiments(experiment)
    assert [one.train.steps for one in (short, long, wide)] == [3, 3, 2]
    assert (long.data.seq_len, long.data.batch_size) == (2 * LENGTH, 8)
    assert {layer.position.scaling.kind for layer in long.model.layers if layer.position.kind == "rope"} == {"yarn"}
    assert [layer.position.kind for layer in long.model.layers] == [layer.position.kind for layer in short.model.layers]
    assert wide.model == long.model and wide.train.optimizer.learning_rate == 1e-3  # what one stage says stays
    assert long.data.seed == short.data.seed + 1 and wide.data.seed == long.data.seed  # another stream, and the same
    with pytest.raises(ConfigError, match=r"config.stages.0: .*d_modell"):
        stage_experiments(replace(experiment, stages=(replace(experiment.stages[0], change={"model.d_modell": 4}),)))
    with pytest.raises(ConfigError, match=r"stages.0.change.model.pattern.\*.mask.width.*no entry"):
        stage_experiments(
            replace(experiment, stages=(replace(experiment.stages[0], change={"model.pattern.*.mask.width": 4}),))
        )
    other = (experiment.stages[0], replace(experiment.stages[1], change={"model.d_model": 64}))
    with pytest.raises(ConfigError, match=r"stages.1.change.*the stage before has"):
        stage_experiments(replace(experiment, stages=other))
    with pytest.raises(ConfigError, match=r"stages.0.gate.conditions.0.evaluation='x'"):
        gate = Gate((Condition("x", "accuracy", at_least=1.0),))
        stage_experiments(replace(experiment, stages=(replace(experiment.stages[0], gate=gate),)))
    with pytest.raises(ConfigError, match=r"batch_tokens=7: must be whole rows"):
        stage_experiments(replace(experiment, stages=(replace(experiment.stages[0], batch_tokens=7),)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stages")
    return directory, *go(directory, STAGES)


def test_stages_follow_one_another_in_one_lineage(whole):
    directory, outcome, notes = whole
    assert outcome == Outcome(8)
    assert notes.steps("stage") == [0, 3, 6]
    assert [call[2]["stage"] for call in notes.calls if call[0] == "stage"] == ["short", "long", "wide"]
    tokens = [call[2]["tokens"] for call in notes.calls if call[0] == "train"]
    assert tokens == [8 * LENGTH * n for n in (1, 2, 3, 5, 7, 9, 11, 13)]
    rates = [call[2]["learning_rate"] for call in notes.calls if call[0] == "train"]
    assert rates[3] < rates[0] and rates[6] == pytest.approx(rates[6])
    state, _, meta = saved(directory)
    assert meta["curriculum"]["stage"] == 2 and meta["curriculum"]["reset_at"] == 6
    assert int(state["step"]) == 8
    counts = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state["opt_state"]) if "count" in str(path)]
    assert {int(count) for count in counts} == {2}  # the last stage began afresh
    experiment = resolve(to_dict(tiny.experiment()) | {"stages": list(STAGES)})
    assert experiment_at(directory, experiment) == stage_experiments(experiment)[2]


CUTS = [
    pytest.param(("train", 2), marks=thorough),
    ("measure", 3),
    ("train", 4),
    pytest.param(("train", 7), marks=thorough),
]


@pytest.mark.parametrize("stop_at", CUTS)
def test_cut_in_a_stage_or_at_its_border_it_ends_as_if_nothing_had_been(tmp_path, whole, stop_at):
    outcome, _ = go(tmp_path, STAGES, stop_at=stop_at)
    assert outcome.stopped_by
    outcome, notes = go(tmp_path, STAGES)
    assert outcome == Outcome(8)
    for want, got in zip(saved(whole[0]), saved(tmp_path), strict=True):
        assert_equal_trees(got, want)
    last = lambda notes: [call for call in notes.calls if call[0] == "measure" and call[1] == 8]
    assert last(notes) == last(whole[2])


def test_a_stage_does_not_begin_from_another_checkpoint_than_that_at_its_border(tmp_path, monkeypatch, whole):
    """One that is damaged as it is written; the same command then ends as if nothing had been."""
    written = checksums.write_list

    def harmed(directory):
        written(directory)
        if directory.name.partition(".")[0] == "3":
            (directory / "meta" / "metadata").write_text("{}")

    monkeypatch.setattr(checksums, "write_list", harmed)
    with pytest.raises(TrainingError, match="step 3: stage 'short' has left no whole checkpoint"):
        go(tmp_path, STAGES)
    monkeypatch.undo()
    assert go(tmp_path, STAGES)[0] == Outcome(8)
    for want, got in zip(saved(whole[0]), saved(tmp_path), strict=True):
        assert_equal_trees(got, want)


GATED = (
    dict(
        name="short", steps=6,
        gate=dict(
            conditions=[dict(evaluation="counting", measure="nll_by_length", where={"length": 32}, at_most=0.4)],
            every=1,
        ),
    ),
    dict(
        name="long", steps=6, change={"model.pattern.*.mask.size": 16},
        gate=dict(conditions=[dict(evaluation="counting", measure="nll_by_length", within=-0.3)], every=2),
    ),
)  # fmt: skip
EVALS = [("evals", "[{'kind': 'perplexity', 'name': 'counting', 'lengths': (32,), 'tokens': 64}]")]


def test_gates_end_stages_early(tmp_path):
    """Measured 1, 1/2, 1/3: the first opens after three steps; the second asks for 30 % below what was then."""
    outcome, notes = go(tmp_path, GATED, evaluators=[Counting()], overrides=EVALS)
    gates = [(step, details["opens"]) for what, step, details in (c[:3] for c in notes.calls if c[0] == "gate")]
    assert gates == [(1, False), (2, False), (3, True), (5, False), (7, True)]
    assert outcome == Outcome(7) and notes.steps("finished") == [7]
    assert notes.steps("measure") == [1, 2, 3, 5, 6, 7]  # once a step; 6 is asked for by eval_every


def test_a_gate_that_must_open_stops_the_run(tmp_path):
    gate = dict(conditions=[dict(evaluation="counting", measure="nll_by_length", at_most=0.0)], at_limit="stop")
    with pytest.raises(TrainingError, match=r"the gate of stage 'short' did not open in its 2 steps \(counting.nll"):
        go(tmp_path, [dict(name="short", steps=2, gate=gate)], evaluators=[Counting()], overrides=EVALS)


def test_conditions_weigh_cells_by_their_counts_and_name_what_is_not_measured():
    found = [
        ("e", Measurement("accuracy", 1.0, 1, {"length": 8})),
        ("e", Measurement("accuracy", 0.0, 3, {"length": 8})),
    ]
    found += [("e", Measurement("accuracy", 1.0, 9, {"length": 16}))]
    gate = Gate((Condition("e", "accuracy", {"length": 8}, at_least=0.25),))
    assert judge(gate, found, {}) == (True, {"e.accuracy[length=8]": 0.25})
    assert not Condition("e", "x", within=0.02).holds(1.03, 1.0) and Condition("e", "x", within=0.02).holds(1.01, 1.0)
    with pytest.raises(ConfigError, match=r"e.nll: nothing of the kind|conditions='e.nll'"):
        Condition("e", "nll", at_most=1.0).value(found)
    with pytest.raises(ConfigError, match="exactly one"):
        Condition("e", "nll", at_most=1.0, at_least=0.0)
