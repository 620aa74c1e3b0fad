"""The training stream: mixture → order → packing → batch → this host's rows; stops and goes on exactly.

    plan: draw from each ingredient by weight  ⟶  rows  ⟶  a batch of them   |   load  ⟶  prefetch thread (grain)

What is planned are *references*, `(ingredient, epoch, index)`: three numbers that name a document. So every process
plans the whole global batch at little cost and loads only its own rows. The stream of rows depends neither on the
number of processes nor on the size of a batch, which is only how many of them are taken at once. Each planned batch
carries the state after it, a handful of numbers that are the same on every process, through the prefetch thread.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from irope_jax.core.config import ConfigError, differences, fingerprint, to_dict
from irope_jax.core.types import Batch, TokenInfo
from irope_jax.data.config import DataConfig
from irope_jax.data.documents import Document, tokenized
from irope_jax.data.mixing import POSITIONS, Mixer, Ref, Samples, TextDocuments
from irope_jax.data.packing import BestFit, BestFitPlanner, Placed, Randomised, batch_of, pack_rows
from irope_jax.data.sources import SourceSpec
from irope_jax.data.tokenizer import TokenizerSpec

_STATE_VERSION = 2

_FREE = ("prefetch", "path", "sha256", "batch_size", "verify")
"""Fields of a data config that do not change the stream of rows: it may go on with others."""

Row = list[tuple[Ref, int]]
"""`[(reference, first place), …]`."""


class _Plan:
    """The stream of rows, and everything of it that moves.

    Its state: `batch`, how many batches were planned; `drawn`, per ingredient the epoch and how many of it are drawn;
    `served`, per ingredient the predicted tokens drawn since the weights changed last; `open`, rows that wait for more
    documents, with these.
    """

    def __init__(self, config: DataConfig, documents: Sequence[TextDocuments | Samples]):
        self._config, self._documents = config, documents
        self._mixer = Mixer(documents)
        self._planner = BestFitPlanner(config.seq_len, config.packing) if isinstance(config.packing, BestFit) else None
        self._batch = 0

    def __next__(self) -> list[Row]:
        """The rows of the next global batch."""
        self._mixer.set_weights(self._config.weights_at(self._batch))
        rows = [self._row() for _ in range(self._config.batch_size)]
        self._batch += 1
        return rows

    def _row(self) -> Row:
        if self._planner is None:
            return [(self._mixer.draw()[0], 0)]
        row = None
        while row is None:
            row = self._planner.add(*self._mixer.draw())
        return row

    def get_state(self) -> dict[str, Any]:
        waiting = self._planner.names if self._planner is not None else []
        return {"batch": self._batch, **self._mixer.get_state(), "open": waiting}

    def set_state(self, state: dict[str, Any]) -> None:
        self._batch = int(state["batch"])
        self._mixer.set_state(state)
        if self._planner is not None:
            waiting = [[(tuple(ref), start) for ref, start in members] for members in state["open"]]
            self._planner.restore(waiting, lambda ref: self._documents[ref[0]].length(*ref[1:]))


class _Planned(grain.IterDataset):
    """Batches of a plan, each with the state after it."""

    def __init__(self, make_plan):
        super().__init__()
        self._make_plan = make_plan

    def __iter__(self) -> _PlannedIterator:
        return _PlannedIterator(self._make_plan())


class _PlannedIterator(grain.DatasetIterator):
    def __init__(self, plan: _Plan):
        super().__init__()
        self._plan = plan

    def __next__(self) -> tuple[list[Row], dict[str, Any]]:
        return next(self._plan), self._plan.get_state()

    def get_state(self) -> dict[str, Any]:
        return {}  # the state travels with the batches: grain has none to keep

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("begin anew from a plan")


class _Stream:
    """Documents of a config and how they become batches; what moves is in `_Plan`."""

    def __init__(self, config: DataConfig, rows: slice):
        self.config, self.rows = config, rows
        kinds = [Samples if ingredient.is_task else TextDocuments for ingredient in config.mixture]
        self.documents = [kind(config, place) for place, kind in enumerate(kinds)]
        self.content = {
            "config": _stream_config(to_dict(config)),
            "data": [documents.fingerprint for documents in self.documents],
            "tokenizer": config.tokenizer.fingerprint,
        }

    def plan(self, state: dict[str, Any] | None) -> _Plan:
        plan = _Plan(self.config, self.documents)
        if state is not None:
            plan.set_state(state)
        return plan

    def batches(self, state: dict[str, Any]) -> grain.DatasetIterator:
        """Endless `(batch, state after it)` from a state on."""
        batches = _Planned(lambda: self.plan(state)).map(lambda planned: (self.load(planned[0]), planned[1]))
        if self.config.prefetch:
            batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=self.config.prefetch)
        return iter(batches)

    def load(self, rows: Sequence[Row]) -> Batch:
        begun = [[(start, self.documents[ref[0]].start(*ref[1:])) for ref, start in row] for row in rows[self.rows]]
        placed: list[list[Placed]] = [[(start, loaded()) for start, loaded in row] for row in begun]
        config = self.config
        batch = pack_rows(placed, config.seq_len, config.tokenizer.pad_id, config.packing.document_multiple)
        if isinstance(config.positions, Randomised):
            batch = batch.replace(info=self._randomised(batch.info, rows[self.rows]))
        return batch

    def _randomised(self, info: TokenInfo, rows: Sequence[Row]) -> TokenInfo:
        """The same coordinates with positions drawn anew; a document's depend on nothing but which document it is."""
        config, positions = self.config, info.positions.copy()
        for b, row in enumerate(rows):
            for segment, ((place, epoch, index), start) in enumerate(row, 1):
                count = int((info.segments[b] == segment).sum())
                rng = np.random.default_rng([config.seed, place, POSITIONS, epoch, index])
                positions[b, start : start + count] = config.positions.draw(rng, count)
        return info.replace(positions=positions, document_multiple=1)  # positions and rows no longer count together


class BatchIterator(Iterator[Batch]):
    """Endless batches of numpy arrays; make it with `make_iterator`.

    `get_state` describes the place after the batch handed out last, whatever was prefetched, and is JSON-able; it is
    equal on all processes. It may be restored under another number of processes and another `batch_size`: the rows go
    on where they stopped, none lost and none twice. Not for use by several threads.
    """

    def __init__(self, config: DataConfig, process_index: int, process_count: int):
        self.config = config
        local = config.batch_size // process_count
        self._stream = _Stream(config, slice(process_index * local, (process_index + 1) * local))
        self._place = _plain(self._stream.plan(None).get_state())
        self._running = [self._stream.batches(self._place)]
        # runs at interpreter exit too: a prefetch thread still alive then aborts the process, and an iterator of grain
        # that outlives grain's modules complains, so the only reference to it is dropped here
        self._finalizer = weakref.finalize(self, _shut, self._running)

    def __next__(self) -> Batch:
        if not self._running:
            raise ValueError("this batch iterator is closed; make a new one")
        batch, self._place = next(self._running[0])
        return batch

    def get_state(self) -> dict[str, Any]:
        """JSON-able; names the config and the data it belongs to."""
        return _plain({"version": _STATE_VERSION, "content": self._stream.content, "place": self._place})

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of `get_state`: the next row is bit-equal to the one that followed it.

        Raises:
          ConfigError: the state was saved with another stream of rows; the message says what differs.
        """
        if state.get("version") != _STATE_VERSION:
            raise ConfigError("data.state.version", state.get("version"), f"this program reads {_STATE_VERSION}")
        changed = differences(state["content"], _plain(self._stream.content))
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            fix = f"saved by another stream ({changed[0]}{more}); restore with the same data config or start anew"
            raise ConfigError("data.state", fingerprint(state["content"]), fix)
        self._go_on(state["place"])

    def skip(self, batches: int) -> None:
        """Pass over the next batches without loading them, as if they had been handed out."""
        plan = self._stream.plan(self._place)
        for _ in range(batches):
            next(plan)
        self._go_on(plan.get_state())

    def _go_on(self, place: dict[str, Any]) -> None:
        if not self._running:
            raise ValueError("this batch iterator is closed; make a new one")
        self._place = _plain(place)
        _shut(self._running)
        self._running.append(self._stream.batches(self._place))

    def close(self) -> None:
        """Stop the background thread."""
        self._finalizer()


def _plain(value: Any) -> Any:
    """What JSON makes of it, which shares nothing with it."""
    return json.loads(json.dumps(value))


def _shut(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()


def _stream_config(value: Any) -> Any:
    """The part of the config that decides the stream of rows."""
    if isinstance(value, dict):
        return {name: _stream_config(v) for name, v in value.items() if name not in _FREE}
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
