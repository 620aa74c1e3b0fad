"""Aggregation: means weighted by hand, intervals by solving their definition, the runs a reader must be warned of."""

import math

import pytest

from irope_jax.core.records import Measurement, RecordError, RunWriter
from irope_jax.study import collect
from irope_jax.study.collect import aggregate, load_arms, smooth, wilson
from irope_jax.study.tables import retrieval_table
from tests.study.fake_runs import make_run


def measured(value, count, **where):
    return Measurement(1, 0.0, "e", "n", value, count, where)


def test_means_are_weighted_by_count():
    some = [measured(1.0, 1, length=8, depth=0.1), measured(0.0, 3, length=8, depth=0.9), measured(0.5, 2, length=4)]
    cells = aggregate(some, ("length",))
    assert [(c.where, c.value, c.count) for c in cells] == [({"length": 4}, 0.5, 2), ({"length": 8}, 0.25, 4)]
    assert [c.where for c in aggregate(some, ("length", "depth"))] == [
        {"length": 8, "depth": 0.1},
        {"length": 8, "depth": 0.9},
    ]
    (whole,) = aggregate(some, ())
    assert whole.value == pytest.approx(2 / 6) and whole.count == 6


def test_a_nan_that_was_measured_stays_and_one_of_nothing_does_not():
    some = [measured(math.nan, 5, length=4), measured(1.0, 5, length=4), measured(1.0, 5, length=8)]
    cells = aggregate(some, ("length",))
    assert math.isnan(cells[0].value) and cells[1].value == 1.0
    cells = aggregate([measured(math.nan, 0, length=4), measured(1.0, 5, length=4)], ("length",))
    assert cells[0].value == 1.0 and cells[0].count == 5


@pytest.mark.parametrize(("right", "count"), [(0, 10), (1, 10), (5, 10), (97, 100), (64, 64), (1, 1)])
def test_wilson_bounds_solve_their_definition(right, count):
    """Bounds are the fractions p whose normal test just rejects what was seen: |seen - p| = z sqrt(p (1 - p) / n)."""
    seen = right / count
    low, high = wilson(seen, count)
    assert 0 <= low <= seen <= high <= 1 and high - low > 0
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(seen - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / count), rel=1e-6)
    assert wilson(1 - seen, count) == pytest.approx((1 - high, 1 - low))


def test_wilson_of_nothing_is_everything():
    assert wilson(math.nan, 0) == (0.0, 1.0)


def test_smoothing_is_an_unbiased_mean_that_passes_over_nan():
    steps = list(range(0, 100, 5))
    assert smooth(steps, [3.0] * 20, span=10) == pytest.approx([3.0] * 20)
    holed = smooth([0, 1, 2, 3], [math.nan, 1.0, math.inf, 1.0], span=2)
    assert math.isnan(holed[0]) and holed[1:] == pytest.approx([1.0, 1.0, 1.0])
    decay = math.exp(-0.5)
    assert smooth([0, 1], [0.0, 1.0], span=2)[1] == pytest.approx(1 / (1 + decay))
    assert smooth([0, 2], [0.0, 1.0], span=2)[1] > smooth([0, 1], [0.0, 1.0], span=2)[1]


def test_only_the_last_measurement_of_an_evaluation_speaks(tmp_path):
    with RunWriter(tmp_path, {"data": {"seq_len": 8}}, "a", tensorboard=False) as w:
        w.measure(5, "retrieval", "accuracy", 0.1, 10, {"length": 8, "straddle": False})
        w.measure(5, "perplexity", "nll_by_length", 2.0, 10, {"length": 8})
        w.measure(10, "retrieval", "accuracy", 0.9, 10, {"length": 8, "straddle": False})
        w.measure(10, "retrieval", "accuracy", 0.3, 30, {"length": 8, "straddle": True})
        w.measure(10, "retrieval", "accuracy", 0.5, 10, {"length": 16})
    (arm,) = load_arms([tmp_path])
    assert [(c.where["length"], c.value) for c in collect.retrieval(arm)] == [(8, pytest.approx(0.45)), (16, 0.5)]
    assert [(c.value, c.count) for c in collect.retrieval(arm, "inside")] == [(0.9, 10)]
    assert [(c.value, c.count) for c in collect.retrieval(arm, "straddling")] == [(0.3, 30)]
    assert [c.value for c in collect.nll_by_length(arm)] == [2.0]
    assert (arm.measured_at("retrieval"), arm.measured_at("perplexity"), arm.measured_at("other")) == (10, 5, None)


def test_an_evaluation_of_another_name_is_found_by_its_kind(tmp_path):
    specs = [{"kind": "retrieval", "name": "far"}, {"kind": "retrieval", "name": "near"}, {"kind": "x", "name": "y"}]
    with RunWriter(tmp_path, {"data": {"seq_len": 8}, "evals": specs}, "a", tensorboard=False) as w:
        w.measure(1, "near", "accuracy", 0.9, 10, {"length": 8})
        w.measure(1, "far", "accuracy", 0.2, 10, {"length": 8})
        w.measure(1, "y", "accuracy", 0.0, 10, {"length": 8})
    (arm,) = load_arms([tmp_path])
    assert arm.evaluations("retrieval") == ["far", "near"] and arm.measured_at("retrieval") == 1
    assert [c.value for c in collect.retrieval(arm)] == [0.2]
    ((name, (view,)),) = collect.further([arm], "retrieval")
    assert name == "near" and [c.value for c in collect.retrieval(view)] == [0.9]
    with RunWriter(tmp_path, {"data": {"seq_len": 8}, "evals": specs}, "a", tensorboard=False) as w:
        w.measure(1, "retrieval", "accuracy", 0.5, 10, {"length": 8})
    (arm,) = load_arms([tmp_path])
    assert [c.value for c in collect.retrieval(arm)] == [0.5]


def test_another_evaluation_is_not_shown_among_those_called_retrieval(tmp_path):
    spec = lambda *names: [{"kind": "retrieval", "name": name} for name in names]
    for run, names in (("a", ("retrieval", "far")), ("b", ("far",))):
        config = {"name": run, "data": {"seq_len": 8}, "evals": spec(*names)}
        with RunWriter(tmp_path / run, config, run, tensorboard=False) as w:
            for name in names:
                w.measure(1, name, "accuracy", 0.5 if name == "far" else 0.9, 10, {"length": 8})
    a, b = arms = load_arms([tmp_path / "a", tmp_path / "b"])
    assert collect.together(arms, "retrieval") == [a] and collect.together([b], "retrieval") == [b]
    assert [row[0] for row in retrieval_table(arms).rows] == ["a"]
    ((name, own),) = collect.further(arms, "retrieval")
    assert name == "far" and [[c.value for c in collect.retrieval(arm)] for arm in own] == [[0.5], [0.5]]


def test_loss_by_position_is_that_of_the_longest_context(tmp_path):
    (arm,) = load_arms([make_run(tmp_path, "a", lengths=(128, 512))])
    cells = collect.nll_by_position(arm)
    assert {c.where["length"] for c in cells} == {512}
    assert [c.where["from"] for c in cells] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256] and cells[-1].where["to"] == 512


def test_what_an_arm_says_of_itself(tmp_path):
    (arm,) = load_arms([make_run(tmp_path, "a", steps=40, done=20, chance=0.125)])
    assert (arm.training_length, arm.planned_steps, arm.finished, arm.multiple(512)) == (128, 40, False, 4.0)
    assert arm.recorded("parameters") == 1_234_567 and arm.recorded("colour") is None
    assert collect.chance([arm]) == 0.125
    (bare,) = load_arms([make_run(tmp_path, "b", config={"data": {}, "train": 3}, chance=None)])
    assert (bare.training_length, bare.planned_steps, bare.finished) == (None, None, False)
    assert collect.chance([bare]) is None and collect.chance([arm, bare]) == 0.125
    assert not collect.in_multiples([arm, bare]) and collect.in_multiples([arm])


def test_the_length_of_an_imported_model_is_what_it_says_until_it_is_trained_on(tmp_path):
    with RunWriter(tmp_path / "a", {"data": {"seq_len": 1024}}, "x", tensorboard=False) as w:
        w.event(0, "imported", source="there", context=8192)
    (arm,) = load_arms([tmp_path / "a"])
    assert arm.training_length == 8192
    with RunWriter(tmp_path / "a", {"data": {"seq_len": 1024}}, "x", tensorboard=False) as w:
        w.train(1, {"loss": 1.0})
    (arm,) = load_arms([tmp_path / "a"])
    assert arm.training_length == 1024


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [make_run(tmp_path / d, n, done=0, evaluations=()) for d, n in (("x", "a"), ("y", "a"), ("y", "b"))]
    (tmp_path / "y" / "a").rename(tmp_path / "y" / "c")
    paths[1] = tmp_path / "y" / "c"
    arms = load_arms(paths)
    assert [arm.label for arm in arms] == ["a (a)", "a (c)", "b"] and [arm.index for arm in arms] == [0, 1, 2]
    again = load_arms([paths[0], paths[0]])
    assert len({arm.label for arm in again}) == 2


def test_no_run_is_an_error():
    with pytest.raises(RecordError, match="name at least one"):
        load_arms([])


def test_what_is_missing_is_said(tmp_path):
    whole = make_run(tmp_path, "whole", steps=20)
    assert collect.missing(load_arms([whole])) == []
    stopped = make_run(tmp_path, "stopped", steps=20, done=10, evaluations=("perplexity",))
    never = make_run(tmp_path, "never", steps=20, done=0, evaluations=())
    longer = make_run(tmp_path, "longer", length=256, steps=20, lengths=(256, 1024))
    stale = make_run(tmp_path, "stale", steps=10, config={"train": {"steps": 20}})
    with RunWriter(stale, {}, "x", tensorboard=False, on_config_change="accept") as w:
        w.train(20, {"loss": 1.0})
    notes = collect.missing(load_arms([whole, stopped, never, longer, stale]))
    for expected in (
        "stopped: not finished, stopped at step 10 of 20.",
        "stopped: retrieval was not measured.",
        "never: recorded no training step.",
        "never: perplexity was not measured.",
        "stale: retrieval was last measured at step 10, training is at 20.",
        "stale: its config does not say the training length (data.seq_len).",
        "The runs were trained at different lengths (whole 128, stopped 128, never 128, longer 256); "
        "multiples are of each run's own.",
        "longer: retrieval was not measured at 128, 512, 2,048, 8,192 tokens, as it was for other runs.",
    ):
        assert expected in notes
    assert not [note for note in notes if note.startswith("whole: not")]
    notes = collect.missing(load_arms([whole, longer]))
    assert "longer: retrieval was not measured at 16, 64 × the training length, as it was for other runs." in notes


def test_what_another_evaluation_was_asked_is_not_missing(tmp_path):
    near = make_run(tmp_path, "near", lengths=(128,))
    other = [{"kind": "retrieval", "name": "far"}]
    with RunWriter(tmp_path / "far", {"name": "far", "data": {"seq_len": 128}, "evals": other}, "far") as writer:
        writer.start(0)
        writer.train(1, {"loss": 1.0})
        writer.measure(1, "far", "accuracy", 0.5, 10, {"length": 8192, "straddle": False})
    notes = collect.missing(load_arms([near, tmp_path / "far"]))
    assert not any("retrieval was not measured at" in note for note in notes)
