"""Loss spikes: what counts as one, where to go back to, and that a run that was cut decides as one that was not."""

import json
import math

import pytest

from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.train.spikes import GoBack, Ignore, RollBack, Skip, SpikeDetector, SpikeError, SpikePolicy

BACK = RollBack(factor=2, window=4, patience=2, jump_batches=10, limit=2)
CALM = [3.0, 2.8, 3.1, 2.9]


def feed(detector, losses, first=1):
    """What each loss led to."""
    return [detector.saw(step, loss) for step, loss in enumerate(losses, first)]


def after(losses, policy=BACK):
    detector = SpikeDetector(policy)
    assert feed(detector, losses) == [None] * len(losses)
    return detector


def test_two_high_losses_in_a_row_go_back_to_before_the_first():
    detector = after(CALM)
    assert feed(detector, [5.9, 6.1, 2.9, 6.1], 5) == [None] * 4  # at and above twice the median, not in a row
    assert feed(detector, [2.9, math.nan, 50.0], 9) == [None, None, GoBack(10, 11, 10, 1, 2.9)]


def test_batches_to_pass_over_are_those_seen_and_the_jump():
    assert GoBack(before=10, step=11, jump=10, count=1, usual=3.0).batches(checkpoint=8) == 11 - 8 + 10


def test_high_losses_do_not_raise_what_is_usual():
    detector = after([*CALM, 100.0])
    assert detector.usual == CALM


def test_nothing_is_high_before_the_window_is_full_but_what_is_not_finite():
    assert feed(SpikeDetector(BACK), [1.0, 90.0, 1.0, 90.0])[-1] is None
    assert feed(SpikeDetector(BACK), [math.inf, math.nan])[-1].before == 1


def test_the_second_spike_in_a_row_jumps_farther_and_the_third_is_an_error():
    detector = after(CALM)
    saved, action = detector.state(), feed(detector, [9.0, 9.0], 5)[-1]
    for count in (1, 2):
        assert (action.count, action.jump) == (count, 10 * count)
        detector = SpikeDetector.at(BACK, saved, action)
        assert detector.usual == CALM and detector.saw(5, 9.0) is None
        if count == 1:
            action = detector.saw(6, 9.0)
    with pytest.raises(SpikeError, match=r"step 6: loss 9, the usual is 2\.95; gone back 2 times in a row \(limit 2\)"):
        detector.saw(6, 9.0)


def test_a_window_of_usual_losses_ends_the_row():
    detector = after(CALM)
    detector = SpikeDetector.at(BACK, detector.state(), feed(detector, [9.0, 9.0], 5)[-1])
    feed(detector, CALM[:3], 5)
    assert detector.count == 1
    feed(detector, CALM[3:], 8)
    assert detector.count == 0


@pytest.mark.parametrize("policy", [BACK, Skip(threshold=2, window=4), Ignore()])
@pytest.mark.parametrize("cut", range(1, 12))
def test_a_detector_that_was_cut_decides_as_one_that_was_not(policy, cut):
    losses = [3.1, 2.7, 1 / 3, 2.9, 3.0, 8.0, 2.9, 8.0, 9.0, 2.9, 8.1, math.nan]
    whole, first = SpikeDetector(policy), SpikeDetector(policy)
    told = feed(whole, losses)
    said = feed(first, losses[:cut])
    second = SpikeDetector.at(policy, json.loads(json.dumps(first.state())))
    assert second.limit == first.limit
    assert said + feed(second, losses[cut:], cut + 1) == told
    assert second == whole
    assert any(told) == (policy is BACK)


def test_skipping_gives_a_limit_once_there_is_a_median():
    detector = SpikeDetector(Skip(threshold=1.5, window=4))
    feed(detector, CALM[:3])
    assert detector.limit == math.inf
    detector.saw(4, CALM[3])
    assert detector.limit == pytest.approx(2.95 * 1.5)
    assert detector.saw(5, 90.0) is None and detector.usual == CALM
    assert after(CALM).limit == math.inf


@pytest.mark.parametrize("policy", [BACK, Skip(), Ignore()])
def test_policies_in_configs(policy):
    assert from_dict(SpikePolicy, to_dict(policy)) == policy


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Skip(threshold=1.0), "threshold=1.0"),
        (lambda: RollBack(factor=math.nan), "factor=nan"),
        (lambda: Skip(window=1), "window=1"),
        (lambda: RollBack(patience=0), "patience=0"),
        (lambda: RollBack(jump_batches=0), "jump_batches=0"),
    ],
)
def test_impossible_policies(make, field):
    with pytest.raises(ConfigError, match=field):
        make()
