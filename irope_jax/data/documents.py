"""Token documents, in memory or in shards, and how long ones are cut into training pieces or whole windows.

A text source is tokenized once per process and kept as one flat array of the smallest integer type; shards are read
where they are asked for. Everything after that is slicing. Which piece is trained on when belongs to `mixing` and
`pipeline`, which pieces share a row to `packing`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from irope_jax.data.shards import ShardedTokens, open_shards, token_documents
from irope_jax.data.sources import Shards, SourceSpec, open_source
from irope_jax.data.tokenizer import TokenizerSpec


@dataclass(frozen=True)
class Document:
    """Tokens that belong together, at most one packed segment.

    Attributes:
      tokens: int32 `[n]`, n >= 2.
      weights: float32 `[n]`, the loss weight of predicting each token; entry 0 is never used.
    """

    tokens: np.ndarray
    weights: np.ndarray

    def __post_init__(self):
        if self.tokens.shape != self.weights.shape or self.tokens.ndim != 1 or len(self.tokens) < 2:
            shapes = f"{self.tokens.shape} and {self.weights.shape}"
            raise ValueError(f"a document needs tokens and weights of one length >= 2, got {shapes}")


class TokenStore:
    """All documents of a source as one flat array.

    Attributes:
      flat: uint16 or uint32 `[total]`, an array or what gives arrays when sliced (`shards.ShardedTokens`); each
        document is bos, its text, eos.
      starts: int64 `[D + 1]`; document d is `flat[starts[d]:starts[d + 1]]`.
      fingerprint: differs where the tokens differ; computed from arrays where none is given.
    """

    def __init__(self, flat: np.ndarray | ShardedTokens, starts: np.ndarray, fingerprint: str | None = None):
        self.flat, self.starts = flat, starts
        if fingerprint is not None:
            self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        return self.flat[self.starts[document] : self.starts[document + 1]].astype(np.int32)

    def start(self, begin: int, end: int) -> Callable[[], np.ndarray]:
        """Begin to read `flat[begin:end]` as int32; what is returned waits for it and gives it."""
        if isinstance(self.flat, ShardedTokens):
            reading = self.flat.start(slice(begin, end))
            return lambda: reading().astype(np.int32)
        return lambda: self.flat[begin:end].astype(np.int32)

    @functools.cached_property
    def targets(self) -> np.ndarray:
        """int64 `[D]`: predictions each document offers, one less than its tokens."""
        return np.diff(self.starts) - 1

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.starts.astype("<i8").tobytes())
        digest.update(np.ascontiguousarray(self.flat))
        return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def tokenized(source: SourceSpec, tokenizer: TokenizerSpec) -> TokenStore:
    """The documents of a source as tokens; opened, or read and encoded, at the first call, then remembered."""
    if isinstance(source, Shards):
        flat, starts, fingerprint = open_shards(source, tokenizer)
        return TokenStore(flat, starts, fingerprint)
    texts, parts, lengths = open_source(source), [], []
    for first in range(0, len(texts), 1024):
        for document in token_documents(texts[first : first + 1024], tokenizer):
            parts.append(document)
            lengths.append(len(document))
    return TokenStore(np.concatenate(parts), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


class Pieces:
    """Cuts documents into pieces of at most `length` predictions so that each target falls into exactly one piece.

    Neighbouring pieces share one token: the last target of one is the first input of the next. Where the cuts fall is
    random per document and epoch (at least half of all offsets occur); a document of at most `length` targets stays
    whole. The number of pieces does not depend on the epoch, so a piece has a fixed index.

    Args:
      targets: int64 `[D]`, predictions per document.
      length: most predictions of a piece.
      key: integers that seed the offsets.
    """

    def __init__(self, targets: np.ndarray, length: int, key: tuple[int, ...]):
        self.targets, self.length, self.key = targets, length, key
        self.counts, self.slack = self._count(targets, length)
        self.ends = np.cumsum(self.counts)
        self._offsets = functools.lru_cache(maxsize=2)(self._draw_offsets)

    @staticmethod
    def _count(targets, length):
        counts = -(-targets // length)
        slack = counts * length - targets
        # one piece more where the cuts have little room to move
        more = (counts > 1) & (2 * slack < length) & (slack <= length - 2)
        return counts + more, slack + more * length

    def _low_high(self) -> tuple[np.ndarray, np.ndarray]:
        """Range of the offset: first and last piece keep at least one target."""
        low = np.maximum(0, self.slack - (self.length - 1))
        high = np.minimum(self.slack, self.length - 1)
        whole = self.counts == 1
        return np.where(whole, 0, low), np.where(whole, 0, high)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _draw_offsets(self, epoch: int) -> np.ndarray:
        low, high = self._low_high()
        return np.random.default_rng([*self.key, epoch]).integers(low, high + 1)

    def span(self, epoch: int, index: int) -> tuple[int, int, int]:
        """`(document, first token, number of targets)` of a piece: its tokens are `first … first + targets`."""
        document = int(np.searchsorted(self.ends, index, side="right"))
        place = index - int(self.ends[document] - self.counts[document])
        first, last = self._cut(document, place, int(self._offsets(epoch)[document]))
        return document, first, last - first

    def _cut(self, document: int, place: int, offset: int) -> tuple[int, int]:
        begin = place * self.length - offset
        return max(0, begin), min(int(self.targets[document]), begin + self.length)


class Windows(Pieces):
    """Cuts documents into windows of exactly `length` predictions; what is left over changes from epoch to epoch.

    A document of fewer targets is one shorter window. A long document leaves out less than two windows per epoch.
    """

    @staticmethod
    def _count(targets, length):
        counts = np.maximum(1, targets // length)
        slack = np.maximum(0, targets - counts * length)
        fewer = (counts >= 4) & (2 * slack < length)
        return counts - fewer, slack + fewer * length

    def _low_high(self) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros_like(self.slack), self.slack

    def _cut(self, document: int, place: int, offset: int) -> tuple[int, int]:
        begin = place * self.length + offset
        return begin, min(int(self.targets[document]), begin + self.length)
