"""Which tokens lie on which device of the context axis: contiguous pieces, or zigzag.

    contiguous, 4 devices   | 0 1 | 2 3 | 4 5 | 6 7 |     device r holds piece r
    zigzag, 4 devices       | 0 7 | 1 6 | 2 5 | 3 4 |     the row is cut in 8 halves; device r holds halves r and 7 - r

Under a causal mask a late token sees more than an early one; zigzag gives every device the same work (Zhu 2024). A
layout is a permutation of places. Tokens carry their rows with them, so nothing else has to know of it; the promise
`TokenInfo.zigzag` lets attention know while tracing which blocks nobody sees. Nothing here touches devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.core.types import Batch, TokenInfo


@dataclass(frozen=True)
class ContextLayout:
    """A permutation of the places of a row, cut into equal pieces.

    Attributes:
      kind: `contiguous` or `zigzag`.
      parts: pieces, one per device of the context axis.
    """

    kind: Literal["contiguous", "zigzag"]
    parts: int

    def __post_init__(self):
        if self.kind not in ("contiguous", "zigzag"):
            raise ConfigError("layout", self.kind, "choose one of: contiguous, zigzag")
        if self.parts < 1:
            raise ConfigError("parts", self.parts, "a row is cut into at least 1 piece")

    @property
    def runs_per_piece(self) -> int:
        """Runs of consecutive rows that a piece consists of."""
        return 2 if self.kind == "zigzag" and self.parts > 1 else 1

    @property
    def multiple(self) -> int:
        """What the length of a row must be a multiple of."""
        return self.parts * self.runs_per_piece

    def check(self, length: int) -> None:
        """Raises `ConfigError` if a row of `length` tokens cannot be cut."""
        if length % self.multiple:
            fix = f"a {self.kind} layout over context={self.parts} needs a multiple of {self.multiple}"
            raise ConfigError("length", length, fix)

    def runs(self, piece):
        """Numbers of the runs that `piece` holds, in the order of its places: run `a` is rows `a * n … a * n + n - 1`.

        `piece` may be traced.
        """
        return (piece,) if self.runs_per_piece == 1 else (piece, 2 * self.parts - 1 - piece)

    def holder(self, run: int) -> tuple[int, int]:
        """`(piece, index within it)` of a run."""
        if self.runs_per_piece == 1:
            return run, 0
        return (run, 0) if run < self.parts else (2 * self.parts - 1 - run, 1)

    def order(self, length: int) -> np.ndarray:
        """Row at each place, int `[length]`.

        Raises:
          ConfigError: the length cannot be cut.
        """
        self.check(length)
        runs = np.arange(length).reshape(self.multiple, -1)
        return np.concatenate([runs[a] for piece in range(self.parts) for a in self.runs(piece)])

    def place(self, tree, axis: int = 1):
        """Rows in order to places: a `Batch`, a `TokenInfo`, or any tree of arrays with the sequence on `axis`.

        Coordinates get the promise of the layout. Numpy arrays stay numpy.

        Raises:
          ConfigError: the length cannot be cut, or the coordinates do not stand in row order from row 0.
        """
        return self._permute(tree, axis, lambda length: self.order(length), self._promise)

    def unplace(self, tree, axis: int = 1):
        """Places back to rows in order; undoes `place`."""
        return self._permute(
            tree, axis, lambda length: np.argsort(self.order(length)), lambda info: info.replace(zigzag=None)
        )

    def _promise(self, info: TokenInfo) -> TokenInfo:
        if info.first_row != 0:
            fix = "only coordinates in row order from row 0 can be placed; this batch was placed before, or is a piece"
            raise ConfigError("first_row", info.first_row, fix)
        return info.replace(first_row=None, zigzag=self.parts) if self.runs_per_piece == 2 else info

    def _permute(self, tree, axis, order, promise):
        if self.runs_per_piece == 1:
            jax.tree.map(lambda x: self.check(x.shape[axis]), tree)
            return tree

        def move(x):
            index = order(x.shape[axis])
            return np.take(x, index, axis=axis) if isinstance(x, np.ndarray) else x.take(index, axis=axis)

        def convert(node):
            if isinstance(node, TokenInfo):
                moved = promise(node).map(move)
                return moved if moved.zigzag else moved.replace(first_row=0)
            if isinstance(node, Batch):
                return node.replace(
                    tokens=move(node.tokens), targets=move(node.targets), weights=move(node.weights),
                    info=convert(node.info),
                )  # fmt: skip
            return move(node)

        return jax.tree.map(convert, tree, is_leaf=lambda x: isinstance(x, (TokenInfo, Batch)))


def layout_of(info: TokenInfo, parts: int) -> ContextLayout | None:
    """The layout over `parts` pieces that the promises of `info` tell of; `None` if they tell of none."""
    if info.zigzag is not None:
        return ContextLayout("zigzag", parts) if info.zigzag == parts else None
    return ContextLayout("contiguous", parts) if info.first_row == 0 else None


def picture(layout: ContextLayout, length: int) -> str:
    """A drawing: the rows on each device."""
    pieces: Sequence[np.ndarray] = np.split(layout.order(length), layout.parts)
    return "\n".join(f"device {r}: {' '.join(map(str, piece))}" for r, piece in enumerate(pieces))
