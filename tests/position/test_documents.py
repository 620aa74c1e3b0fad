"""Lengths of documents from coordinates, in any order and with padding."""

import numpy as np
import pytest

from irope_jax.core.types import TokenInfo
from irope_jax.position.documents import document_lengths


@pytest.mark.parametrize("multiple", [0, 1])
def test_lengths_follow_the_document_in_any_order(multiple):
    if multiple:
        lengths, segments = [[3] * 3 + [4] * 4 + [1], [8] * 8], [[1] * 3 + [2] * 4 + [0], [5] * 8]
        positions = [[0, 1, 2, 0, 1, 2, 3, 0], list(range(8))]
    else:
        lengths, segments, positions = [[5] * 5 + [1] * 3], [[1] * 5 + [0] * 3], [[0, 1, 2, 3, 4, 0, 0, 0]]
    rows = np.broadcast_to(np.arange(8), np.shape(positions))
    info = TokenInfo(*(np.asarray(x, np.int32) for x in (positions, segments, rows)), document_multiple=multiple)
    np.testing.assert_array_equal(document_lengths(info), lengths)
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_array_equal(document_lengths(info.take(order)), np.asarray(lengths)[:, order])
