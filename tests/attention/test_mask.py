"""Masks as drawings, counts and bounds."""

import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.attention import Chunked, Global, Sliding, allowed, phase_positions, picture, reach, visible_pairs
from irope_jax.attention.mask import key_bounds
from irope_jax.core.config import ConfigError, from_dict
from irope_jax.core.types import TokenInfo


def info(segments, positions=None, rows=None):
    segments = np.array([segments])
    if positions is None:
        positions = [[list(row[:t]).count(row[t]) for t in range(len(row))] for row in segments]
    rows = np.arange(segments.shape[1])[None] if rows is None else np.array([rows])
    return TokenInfo(*(jnp.asarray(x, jnp.int32) for x in (positions, segments, rows)), first_row=None)


def drawn(text):
    return "\n".join(line.strip() for line in text.strip().splitlines())


PICTURES = [
    (Global(), [1] * 6, """
        100000
        110000
        111000
        111100
        111110
        111111"""),
    (Chunked(3), [1] * 6, """
        100000
        110000
        111000
        000100
        000110
        000111"""),
    (Chunked(3, shift=1), [1] * 6, """
        100000
        110000
        001000
        001100
        001110
        000001"""),
    (Sliding(3), [1] * 6, """
        100000
        110000
        111000
        011100
        001110
        000111"""),
    (Global(), [1, 1, 2, 2, 2, 0], """
        100000
        110000
        001000
        001100
        001110
        000000"""),
    (Chunked(2), [1, 1, 1, 2, 2, 2], """
        100000
        110000
        001000
        000100
        000110
        000001"""),
    (Chunked(2, by="row"), [1, 1, 1, 2, 2, 2], """
        100000
        110000
        001000
        000100
        000010
        000011"""),
    (Sliding(2), [1, 1, 1, 2, 2, 0], """
        100000
        110000
        011000
        000100
        000110
        000000"""),
]  # fmt: skip


@pytest.mark.parametrize("mask, segments, want", PICTURES, ids=lambda x: str(x) if not isinstance(x, str) else "")
def test_pictures(mask, segments, want):
    tokens = info(segments)
    assert picture(mask, tokens, tokens) == drawn(want)


def test_order_of_places_does_not_matter():
    tokens = info([1] * 4)
    assert picture(Global(), tokens, tokens.take(np.array([3, 1, 0, 2]))) == drawn("""
        0010
        0110
        0111
        1111""")


COUNTED = [Global(), Chunked(5), Chunked(5, shift=2), Chunked(64), Sliding(1), Sliding(7), Sliding(99)]


@pytest.mark.parametrize("mask", COUNTED)
@pytest.mark.parametrize("length", [1, 4, 5, 23])
def test_visible_pairs_counts_ones(mask, length):
    tokens = TokenInfo.single(1, length)
    assert visible_pairs(mask, length) == picture(mask, tokens, tokens).count("1")


@pytest.mark.parametrize("mask", [Global(), Chunked(5), Chunked(5, shift=2), Sliding(7)])
def test_reach_is_the_longest_line(mask):
    tokens = TokenInfo.single(1, 20)
    longest = max(line.count("1") for line in picture(mask, tokens, tokens).splitlines())
    assert longest == (20 if reach(mask) is None else reach(mask))


@pytest.mark.parametrize("mask", [Global(), Chunked(4), Chunked(6, shift=1), Chunked(4, by="row"), Sliding(3)])
def test_phases_keep_distances_between_visible_pairs(mask):
    tokens = info([1] * 9 + [2] * 8)
    phases = phase_positions(mask, tokens)

    def difference(x):
        return np.asarray(x)[0][:, None] - np.asarray(x)[0][None]

    seen = np.asarray(allowed(mask, tokens, tokens))[0]
    assert (difference(phases) == difference(tokens.positions))[seen].all()
    if isinstance(mask, Chunked):
        assert int(phases.max()) < mask.size and int(phases.min()) >= 0


@pytest.mark.parametrize("mask", [Global(), Chunked(4), Chunked(6, by="row", shift=1), Sliding(3)])
def test_key_bounds_hold_what_is_seen(mask):
    tokens = info([1] * 9 + [2] * 5 + [0] * 6)
    low, high = (np.asarray(x)[0] for x in key_bounds(mask, tokens, 4))
    seen = np.asarray(allowed(mask, tokens, tokens))[0]
    for block in range(5):
        rows = np.flatnonzero(seen[4 * block : 4 * block + 4].any(0))
        assert all(low[block] <= r <= high[block] for r in rows)
    assert low[4] > high[4]


@pytest.mark.parametrize(
    "data, field",
    [
        ({"kind": "chunked", "size": 0}, "size"),
        ({"kind": "chunked", "size": 4, "by": "line"}, "by"),
        ({"kind": "chunked", "size": 4, "shift": 4}, "shift"),
        ({"kind": "sliding", "size": -1}, "size"),
        ({"kind": "diagonal"}, "kind"),
    ],
)
def test_impossible_masks_name_the_field(data, field):
    with pytest.raises(ConfigError) as error:
        from_dict(Global | Chunked | Sliding, data, "mask")
    assert error.value.field == f"mask.{field}"
