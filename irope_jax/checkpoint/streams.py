"""A model that passes by: arrays described beforehand and given block by block, so that no whole one need be in memory.

Every format in and out goes through this: what reads a source gives `Piece`s, what stores them knows each array's
`Layout`. Nothing here knows a format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Keys = tuple[str, ...]
"""Keys from the root of a tree of parameters to a leaf."""

BLOCK_BYTES = 32 * 2**20
"""About how much of a tensor is in memory at a time."""


@dataclass(frozen=True)
class Layout:
    """What an array will be.

    Attributes:
      shape, dtype: of the whole.
      chunk: shape of what is stored as one; pieces fill whole chunks.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


class Piece(NamedTuple):
    """A block of one array: where it lies, and its values."""

    path: Keys
    index: tuple[int | slice, ...]
    values: np.ndarray


def nested(leaves: Mapping[Keys, Any]) -> dict[str, Any]:
    """The tree of dictionaries with these leaves."""
    tree: dict[str, Any] = {}
    for (*parents, name), leaf in leaves.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def gathered(layouts: Mapping[Keys, Layout], pieces: Iterable[Piece]) -> dict[str, Any]:
    """Everything in memory after all, as numpy: for small models."""
    arrays = {path: np.empty(layout.shape, layout.dtype) for path, layout in layouts.items()}
    for path, index, values in pieces:
        arrays[path][index] = values
    return nested(arrays)
