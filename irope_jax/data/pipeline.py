"""The training stream: mixture → order → packing → batch → this host's rows; stops and goes on exactly.

    grain: references of each ingredient ⟶  mix  ⟶  plan rows  ⟶  batch  ⟶  load  ⟶  prefetch thread

What flows until `load` are *references*, `(ingredient, epoch, index)`: three numbers that name a document. So every
process plans the whole global batch at little cost and loads only its own rows; the stream does not depend on the
number of processes, and the state is a handful of numbers, the same on every process.
"""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from irope_jax.core.config import ConfigError, differences, fingerprint, to_dict
from irope_jax.core.types import Batch, TokenInfo
from irope_jax.data.config import DataConfig, Ingredient
from irope_jax.data.documents import Document, Pieces, Windows, tokenized
from irope_jax.data.haystacks import TextHaystack
from irope_jax.data.packing import BestFit, BestFitPlanner, Placed, Randomised, batch_of, pack_rows
from irope_jax.data.sources import SourceSpec
from irope_jax.data.tokenizer import TokenizerSpec

Ref = tuple[int, int, int]
"""`(ingredient, epoch, index)`: names a document of the stream."""

_STATE_VERSION = 1

_ORDER, _CUTS, _LENGTHS, _CONTENT, _POSITIONS = range(5)
"""Last words of the seeds of random streams, so that no two streams of an ingredient are the same."""


class _Text:
    """Pieces of a source's documents."""

    def __init__(self, config: DataConfig, place: int):
        self.store = tokenized(config.mixture[place].source, config.tokenizer)
        cut = Pieces if isinstance(config.packing, BestFit) else Windows
        self.pieces = cut(self.store.targets, config.seq_len, (config.seed, place, _CUTS))
        self.fingerprint = self.store.fingerprint
        places = np.minimum(self.store.targets, self.pieces.counts * config.seq_len)
        self.mean_length = float(places.sum()) / len(self.pieces)
        self._key = (config.seed, place, _ORDER)
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def draw(self, count: int) -> tuple[int, int]:
        """`(epoch, index)` of the piece that comes after `count` others: each epoch has an order of its own."""
        epoch, place = divmod(count, len(self.pieces))
        return epoch, int(self._order(epoch)[place])

    def _draw_order(self, epoch: int) -> np.ndarray:
        # not grain's shuffle: a look-up in it takes milliseconds when there are only a few pieces
        return np.random.default_rng([*self._key, epoch]).permutation(len(self.pieces))

    def length(self, epoch: int, index: int) -> int:
        return self.pieces.span(epoch, index)[2]

    def load(self, epoch: int, index: int) -> Document:
        document, first, targets = self.pieces.span(epoch, index)
        begin = int(self.store.starts[document]) + first
        tokens = self.store.flat[begin : begin + targets + 1].astype(np.int32)
        return Document(tokens, np.ones(len(tokens), np.float32))


class _Samples:
    """Samples of a task; index i is always the same sample."""

    def __init__(self, config: DataConfig, place: int):
        ingredient: Ingredient = config.mixture[place]
        self.task, self.tokenizer = ingredient.source, config.tokenizer
        self.low, self.high = ingredient.sample_lengths(config.seq_len)
        self.key = (config.seed, place)
        haystack = getattr(self.task, "haystack", None)
        reads = isinstance(haystack, TextHaystack)
        self.fingerprint = tokenized(haystack.source, config.tokenizer).fingerprint if reads else ""
        self.mean_length = (self.low + self.high) / 2 - 1

    def draw(self, count: int) -> tuple[int, int]:
        """`(0, index)`: samples never repeat."""
        return 0, count

    def length(self, epoch: int, index: int) -> int:
        if self.low == self.high:
            return self.low - 1
        return int(np.random.default_rng([*self.key, _LENGTHS, index]).integers(self.low, self.high + 1)) - 1

    def load(self, epoch: int, index: int) -> Document:
        rng = np.random.default_rng([*self.key, _CONTENT, index])
        return self.task.sample(rng, self.length(epoch, index) + 1, self.tokenizer).document


def _references(place: int, documents: _Text | _Samples) -> grain.MapDataset:
    """Endless references of one ingredient."""
    return grain.MapDataset.range(1).repeat().map_with_index(lambda index, _: (place, *documents.draw(index)))


class _BestFitRows(grain.IterDataset):
    """Rows planned from the stream of references: each element is `[(start, reference), …]`."""

    def __init__(self, references: grain.MapDataset, seq_len: int, spec: BestFit, length_of):
        super().__init__(references)
        self._settings = (references, seq_len, spec, length_of)

    def __iter__(self) -> _BestFitIterator:
        return _BestFitIterator(*self._settings)


class _BestFitIterator(grain.DatasetIterator):
    """State: how many references were taken, and which of them wait in open rows."""

    def __init__(self, references: grain.MapDataset, seq_len: int, spec: BestFit, length_of):
        super().__init__()
        self._references, self._length_of = references, length_of
        self._planner = BestFitPlanner(seq_len, spec)
        self._taken = 0

    def __next__(self) -> list[tuple[int, Ref]]:
        row = None
        while row is None:
            row = self._planner.add(self._taken, self._length(self._taken))
            self._taken += 1
        return [(start, self._references[name]) for name, start in row]

    def _length(self, name: int) -> int:
        return self._length_of(self._references[name])

    def get_state(self) -> dict[str, Any]:
        return {"taken": self._taken, "open": self._planner.names}

    def set_state(self, state: dict[str, Any]) -> None:
        self._taken = int(state["taken"])
        self._planner.restore(state["open"], self._length)


class _Stream:
    """Documents of a config and the grain pipeline over them; what its iterators hold is not here."""

    def __init__(self, config: DataConfig, rows: slice):
        self.config, self.rows = config, rows
        kinds = [_Samples if ingredient.is_task else _Text for ingredient in config.mixture]
        self.documents = [kind(config, place) for place, kind in enumerate(kinds)]
        self.content = {
            "config": _stream_config(to_dict(config)),
            "data": [documents.fingerprint for documents in self.documents],
            "tokenizer": config.tokenizer.fingerprint,
        }

    def dataset(self) -> grain.IterDataset:
        config = self.config
        parts = [_references(place, documents) for place, documents in enumerate(self.documents)]
        references = parts[0]
        if len(parts) > 1:
            # grain mixes by documents; weights are shares of predicted tokens
            shares = [i.weight / d.mean_length for i, d in zip(config.mixture, self.documents)]
            references = grain.MapDataset.mix(parts, shares)
        if isinstance(config.packing, BestFit):
            rows = _BestFitRows(references, config.seq_len, config.packing, self.length)
        else:
            alone = references.map(lambda ref: [(0, ref)])
            rows = alone.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        batches = rows.batch(config.batch_size, drop_remainder=True, batch_fn=list).map(self.load)
        if config.prefetch:
            batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.prefetch)
        return batches

    def length(self, ref: Ref) -> int:
        return self.documents[ref[0]].length(*ref[1:])

    def load(self, rows: Sequence[Sequence[tuple[int, Ref]]]) -> Batch:
        placed: list[list[Placed]] = [
            [(start, self.documents[ref[0]].load(*ref[1:])) for start, ref in row] for row in rows[self.rows]
        ]
        config = self.config
        batch = pack_rows(placed, config.seq_len, config.tokenizer.pad_id, config.packing.document_multiple)
        if isinstance(config.positions, Randomised):
            batch = batch.replace(info=self._randomised(batch.info, rows[self.rows]))
        return batch

    def _randomised(self, info: TokenInfo, rows: Sequence[Sequence[tuple[int, Ref]]]) -> TokenInfo:
        """The same coordinates with positions drawn anew; a document's depend on nothing but which document it is."""
        config, positions = self.config, info.positions.copy()
        for b, row in enumerate(rows):
            for segment, (start, (place, epoch, index)) in enumerate(row, 1):
                count = int((info.segments[b] == segment).sum())
                rng = np.random.default_rng([config.seed, place, _POSITIONS, epoch, index])
                positions[b, start : start + count] = config.positions.draw(rng, count)
        return info.replace(positions=positions, document_multiple=1)  # positions and rows no longer count together


class BatchIterator(Iterator[Batch]):
    """Endless batches of numpy arrays; make it with `make_iterator`.

    `get_state` describes the place after the batch handed out last, whatever was prefetched, and is JSON-able; it is
    equal on all processes and may be restored under another number of processes. Not for use by several threads.
    """

    def __init__(self, config: DataConfig, process_index: int, process_count: int):
        self.config = config
        local = config.batch_size // process_count
        stream = _Stream(config, slice(process_index * local, (process_index + 1) * local))
        self._content, self._running = stream.content, [iter(stream.dataset())]
        # runs at interpreter exit too: a prefetch thread still alive then aborts the process, and an iterator of grain
        # that outlives grain's modules complains, so the only reference to it is dropped here
        self._finalizer = weakref.finalize(self, _shut, self._running)

    @property
    def _iterator(self) -> grain.DatasetIterator:
        if not self._running:
            raise ValueError("this batch iterator is closed; make a new one")
        return self._running[0]

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """JSON-able; names the config and the data it belongs to."""
        # a round trip: what is handed out is plain JSON and shares nothing with the running iterator
        place = json.loads(json.dumps(self._iterator.get_state()))
        return {"version": _STATE_VERSION, "content": self._content, "place": place}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of `get_state`: the next batch is bit-equal to the one that followed it.

        Raises:
          ConfigError: the state was saved with another config, tokenizer or data; the message says which differs.
        """
        if state.get("version") != _STATE_VERSION:
            raise ConfigError("data.state.version", state.get("version"), f"this program reads {_STATE_VERSION}")
        changed = differences(state["content"], json.loads(json.dumps(self._content)))
        if changed:
            fix = f"saved by another stream ({changed[0]}); restore with the same data config or start anew"
            raise ConfigError("data.state", fingerprint(state["content"]), fix)
        self._iterator.set_state(state["place"])

    def close(self) -> None:
        """Stop the background thread."""
        self._finalizer()


def _shut(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()


def _stream_config(value: Any) -> Any:
    """The part of the config that decides the stream: how far to prefetch does not, nor where files lie."""
    if isinstance(value, dict):
        return {name: _stream_config(v) for name, v in value.items() if name not in ("prefetch", "path", "sha256")}
    return [_stream_config(v) for v in value] if isinstance(value, list) else value


def make_iterator(config: DataConfig, *, process_index: int = 0, process_count: int = 1) -> BatchIterator:
    """Endless training batches of this process.

    The rows of the processes are disjoint, consecutive parts of the global batch: put together in process order they
    are the batch a single process would give.

    Args:
      config: the stream.
      process_index, process_count: which part of each batch to load.

    Raises:
      ConfigError: the batch does not divide, or a source cannot be read.
    """
    if process_count < 1 or config.batch_size % process_count:
        raise ConfigError("batch_size", config.batch_size, f"must be a multiple of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ConfigError("process_index", process_index, f"must be below process_count={process_count}")
    return BatchIterator(config, process_index, process_count)


def eval_text(
    source: SourceSpec, tokenizer: TokenizerSpec, length: int, count: int, *, batch_size: int = 1
) -> Iterator[Batch]:
    """Consecutive, non-overlapping windows of a source, for perplexity; the same every time.

    Each document gives its whole windows of `length` predictions from its start (bos); what is left at its end is not
    used. Batches have `batch_size` rows; rows of padding (weight 0) fill the last.

    Args:
      source: usually `Corpus("validation")`.
      tokenizer: text to ids.
      length: T.
      count: how many windows.
      batch_size: rows of a batch.

    Raises:
      ConfigError: the source has fewer than `count` windows of this length.
    """
    store = tokenized(source, tokenizer)
    places = [(d, k * length) for d, targets in enumerate(store.targets) for k in range(int(targets) // length)]
    if len(places) < count:
        fix = f"the source has {len(places)} windows of {length} tokens; lower it or the length"
        raise ConfigError("count", count, fix)
    return _windows(store, places[:count], tokenizer.pad_id, length, batch_size)


def _windows(store, places, pad_id, length, batch_size) -> Iterator[Batch]:
    for first in range(0, len(places), batch_size):
        tokens = [store[d][begin : begin + length + 1] for d, begin in places[first : first + batch_size]]
        yield batch_of([Document(t, np.ones(len(t), np.float32)) for t in tokens], length, pad_id, rows=batch_size)
