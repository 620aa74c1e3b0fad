import numpy as np
import pytest

from irope_jax.data.samples import draw_between, draw_distinct, scatter


def test_scatter_picture():
    filler = np.array([1, 2, 3, 4], np.int32)
    events = np.array([[70, 71], [80, 81], [90, 91]], np.int32)
    tokens, starts, gaps = scatter(filler, events, np.array([1.0, 0.0, 0.5]), 9)
    assert tokens.tolist() == [9, 80, 81, 1, 2, 90, 91, 3, 4, 70, 71]
    assert starts.tolist() == [9, 1, 5] and gaps.tolist() == [4, 0, 2]


def test_scatter_keeps_the_order_of_events_at_one_place_and_needs_no_filler():
    events = np.array([[1], [2], [3]], np.int32)
    tokens, starts, _ = scatter(np.zeros(0, np.int32), events, np.array([0.3, 0.3, 0.3]), 9)
    assert tokens.tolist() == [9, 1, 2, 3] and starts.tolist() == [1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_scatter_loses_nothing(seed):
    rng = np.random.default_rng(seed)
    filler = rng.integers(100, 200, rng.integers(0, 50)).astype(np.int32)
    events = rng.integers(200, 300, (rng.integers(1, 9), 3)).astype(np.int32)
    at = rng.random(len(events)).round(1)
    tokens, starts, gaps = scatter(filler, events, at, 9)
    assert len(tokens) == 1 + len(filler) + events.size and tokens[0] == 9
    assert tokens[tokens < 200][1:].tolist() == filler.tolist()
    for start, event, gap in zip(starts, events, gaps):
        assert tokens[start : start + 3].tolist() == event.tolist()
        assert (tokens[1:start] < 200).sum() == gap
    assert (np.diff(starts[np.argsort(at, kind="stable")]) >= 3).all()


@pytest.mark.parametrize(
    "base, digits, count", [(8, 1, 8), (8, 1, 3), (10, 5, 4), (64, 3, 200), (2, 12, 1024), (3, 2, 9)]
)
def test_distinct_strings_are_distinct(base, digits, count):
    rng = np.random.default_rng(0)
    drawn = [draw_distinct(rng, base, digits, count) for _ in range(3)]
    for strings in drawn:
        assert strings.shape == (count, digits) and strings.min() >= 0 and strings.max() < base
        assert len({tuple(s) for s in strings.tolist()}) == count
    assert (drawn[0] != drawn[1]).any()


def test_every_gap_is_equally_likely():
    """With f filler tokens there are f + 1 gaps, the one after the last token included."""
    at = np.random.default_rng(0).random(4000)
    _, _, gaps = scatter(np.zeros(3, np.int32), np.zeros((4000, 1), np.int32), at, 9)
    assert np.bincount(gaps).tolist() == pytest.approx([1000] * 4, rel=0.1)


def test_ranges_include_both_ends():
    rng = np.random.default_rng(0)
    assert {draw_between(rng, (2, 4)) for _ in range(100)} == {2, 3, 4}
