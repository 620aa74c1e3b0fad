"""Documents into rows of one length: coordinates, weights, and which documents share a row.

`BestFitPlanner` decides from lengths alone which documents share a row, so planning is cheap, every host can plan for
all and its whole state is a few document numbers. `pack_rows` fills the arrays. grain's own best-fit packing closes all
its bins at once when a document fits none, and stores the arrays of other hosts too; this one closes only the fullest
row. Where documents come from and what order they come in belongs to `pipeline`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.core.types import PAD_SEGMENT, Batch, TokenInfo
from irope_jax.data.documents import Document


@dataclass(frozen=True)
class OnePerRow:
    """Each row is one document from row 0 on; text comes in whole windows of the row length.

    `TokenInfo.document_multiple` is 0, so chunk borders are known while tracing. Documents shorter than the row leave
    padding: use `best_fit` when many are.
    """

    kind: ClassVar[str] = "one_per_row"

    @property
    def document_multiple(self) -> int:
        return 0


@dataclass(frozen=True)
class BestFit:
    """Several documents per row, each put where it leaves the least room.

    Attributes:
      open_rows: rows that wait for more documents; more of them waste less and mix documents over a longer stretch.
      document_multiple: every document starts at a row index divisible by this. The chunk size of the model here makes
        chunk borders by document fall on known rows; it costs half of it in padding per document on average.
    """

    open_rows: int = 32
    document_multiple: int = 1
    kind: ClassVar[str] = "best_fit"

    def __post_init__(self):
        if self.open_rows < 1:
            raise ConfigError("open_rows", self.open_rows, "must be at least 1")
        if self.document_multiple < 1:
            raise ConfigError("document_multiple", self.document_multiple, "must be at least 1; 1 promises nothing")


PackingSpec = OnePerRow | BestFit


@dataclass(frozen=True)
class Counted:
    """Positions count the tokens of a document: 0, 1, 2 …"""

    kind: ClassVar[str] = "counted"


@dataclass(frozen=True)
class Randomised:
    """Positions are a random growing selection of `0 … limit - 1`, drawn anew for each document (arXiv 2305.16843).

    In training only: a model that saw large positions on short documents meets nothing new on long ones. They are what
    rotations, temperatures and chunks by document go by; evaluation counts.

    Attributes:
      limit: positions to choose from, at least the row length: the length the model is to be used at.
    """

    limit: int
    kind: ClassVar[str] = "randomised"

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return np.sort(rng.choice(self.limit, count, replace=False, shuffle=False)).astype(np.int32)


TrainingPositions = Counted | Randomised
"""What a training document numbers its tokens by."""

Placed = tuple[int, Document]
"""`(first row index, document)`."""


class BestFitPlanner:
    """Online best-fit over a bounded number of open rows.

    A document goes into the open row that it leaves the least room in; when none has room and `open_rows` are open,
    the fullest is closed. A row in which nothing can follow is closed at once.

    Args:
      seq_len: length of a row.
      spec: open rows and alignment.
    """

    def __init__(self, seq_len: int, spec: BestFit):
        self.seq_len, self.spec = seq_len, spec
        self._open: list[tuple[int, list[tuple[Any, int]]]] = []  # (first free start, [(name, start)]), by free start

    def add(self, name: Any, length: int) -> list[tuple[Any, int]] | None:
        """Place a document that takes `length` places; the row this closes, `[(name, start), …]`, or `None`."""
        length, multiple = int(length), self.spec.document_multiple  # numpy integers would not go into a JSON state
        if not 1 <= length <= self.seq_len:
            raise ValueError(f"document {name} takes {length} places, a row has {self.seq_len}")
        # the last open row with start + length <= seq_len is the fullest that still has room
        place = bisect.bisect_right(self._open, self.seq_len - length, key=lambda row: row[0]) - 1
        start, members = self._open.pop(place) if place >= 0 else (0, [])
        members.append((name, start))
        free = -(-(start + length) // multiple) * multiple
        if free >= self.seq_len:
            return members
        fullest = self._open.pop()[1] if len(self._open) >= self.spec.open_rows else None
        bisect.insort(self._open, (free, members), key=lambda row: row[0])
        return fullest

    @property
    def names(self) -> list[list[list[Any]]]:
        """What is waiting: per open row `[[name, start], …]`, fullest last. JSON-able as names are; for `restore`."""
        return [[list(member) for member in members] for _, members in self._open]

    def restore(self, names: Sequence[Sequence[Sequence[Any]]], length_of) -> None:
        """Put back what `names` gave; `length_of(name)` must give the length the document was added with."""
        multiple, self._open = self.spec.document_multiple, []
        for members in names:
            name, start = members[-1]
            free = -(-(int(start) + length_of(name)) // multiple) * multiple
            self._open.append((free, [(name, int(start)) for name, start in members]))


def pack_rows(rows: Sequence[Sequence[Placed]], seq_len: int, pad_id: int, document_multiple: int) -> Batch:
    """The arrays of a batch from documents and their places.

    A document of n tokens takes n - 1 places: inputs `tokens[:-1]`, targets `tokens[1:]`, weights `weights[1:]`.
    Positions restart at 0 in each document, segments count from 1 in each row, `rows` is the index in the row whatever
    stands there. Padding has segment 0, position 0, weight 0 and `pad_id` as token and target.

    Args:
      rows: per batch row the documents with their first row index, in order.
      seq_len: T.
      pad_id: token of padding.
      document_multiple: the promise of `TokenInfo`; it is checked.

    Returns:
      Batch of numpy arrays `[len(rows), seq_len]` with `first_row=0`.

    Raises:
      ValueError: a document overlaps another, leaves the row, or breaks the promise.
    """
    shape = (len(rows), seq_len)
    tokens, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    weights = np.zeros(shape, np.float32)
    positions, segments = np.zeros(shape, np.int32), np.full(shape, PAD_SEGMENT, np.int32)
    for b, members in enumerate(rows):
        free = 0
        for segment, (start, document) in enumerate(members, 1):
            count = len(document.tokens) - 1
            end = start + count
            if start < free or end > seq_len:
                raise ValueError(
                    f"row {b}: the document at {start}:{end} overlaps another or leaves the row of {seq_len}"
                )
            tokens[b, start:end] = document.tokens[:-1]
            targets[b, start:end] = document.tokens[1:]
            weights[b, start:end] = document.weights[1:]
            positions[b, start:end] = np.arange(count)
            segments[b, start:end] = segment
            free = end
    index = np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape).copy()
    info = TokenInfo(positions, segments, index, first_row=0, document_multiple=document_multiple)
    check_promise(info)
    return Batch(tokens, targets, weights, info)


def check_promise(info: TokenInfo) -> None:
    """Raises `ValueError` if the documents of `info` do not start where its `document_multiple` says they do."""
    positions, segments, rows = (np.asarray(x) for x in (info.positions, info.segments, info.rows))
    real = segments != PAD_SEGMENT
    origin = np.where(real, rows - positions, 0)  # the row a token's document starts at
    same = real[:, 1:] & (segments[:, 1:] == segments[:, :-1])
    broken = (origin % info.document_multiple != 0) if info.document_multiple else (origin != 0)
    broken[:, 1:] |= same & (origin[:, 1:] != origin[:, :-1])
    if broken.any():
        b, t = np.argwhere(broken)[0]
        raise ValueError(
            f"batch row {b}, place {t}: its document starts at row {origin[b, t]}, "
            f"against the promise document_multiple={info.document_multiple}"
        )


def batch_of(documents: Sequence[Document], seq_len: int, pad_id: int, *, rows: int | None = None) -> Batch:
    """One document per row (`document_multiple=0`); up to `rows` rows of padding follow."""
    missing = (rows if rows is not None else len(documents)) - len(documents)
    if missing < 0:
        raise ValueError(f"{len(documents)} documents do not fit into rows={rows}")
    return pack_rows([[(0, document)] for document in documents] + [[]] * missing, seq_len, pad_id, 0)
