"""Token shards: what `irope prepare` writes and `Shards` reads, on disk or in a bucket.

    OUT/plan.json                  what is made of what, written first; a restart must ask for the same
    OUT/shard-00000/tokens/        zarr3 `[tokens]`, one object; pieces of `PIECE` tokens, each with its CRC
    OUT/shard-00000/starts/        zarr3 int64 `[documents + 1]`, the first token of each document, then the end
    OUT/shard-00000/shard.json     counts and checksum, written when the two arrays are there
    OUT/manifest.json              the plan and all shards, written last: without it nothing is whole

Paths are local, `gs://…` or `s3://…`; everything goes through tensorstore, so there is one code for all. A document
never spans two shards. Which texts are made into shards, and when, belongs to `prepare`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from irope_jax.core.config import ConfigError
from irope_jax.data.reading import SourceError
from irope_jax.data.sources import Shards
from irope_jax.data.tokenizer import TokenIds, TokenizerFile, TokenizerSpec

log = logging.getLogger(__name__)

VERSION = 1
"""Of the format; a reader refuses others."""

MANIFEST, PLAN, RECORD = "manifest.json", "plan.json", "shard.json"

PIECE = 1 << 15
"""Tokens that are read and checked together."""

_CACHE_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """One shard, as its record and the manifest say.

    Attributes:
      name: its directory.
      documents, tokens: how many.
      sha256: of the starts (int64) and then the tokens, little-endian, whatever their compression.
      bad_records: records of the sources that were left out on the way to its last document.
      empty_records: the same for records without text.
      next: where the next shard begins: (file of the plan, records of that file that are done).
    """

    name: str
    documents: int
    tokens: int
    sha256: str
    bad_records: int
    empty_records: int
    next: tuple[int, int]


def token_type(tokenizer: TokenizerSpec) -> np.dtype:
    """The smallest that holds every id of a document."""
    largest = max(tokenizer.text_vocab_size - 1, tokenizer.bos_id, tokenizer.eos_id)
    return np.dtype(np.uint16 if largest < 1 << 16 else np.uint32)


def token_documents(texts: Sequence[str], tokenizer: TokenizerSpec) -> Iterator[np.ndarray]:
    """bos, the ids of the text, eos, for each text; of `token_type`."""
    dtype = token_type(tokenizer)
    for ids in tokenizer.encode_batch(texts):
        document = np.empty(len(ids) + 2, dtype)
        document[0], document[1:-1], document[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
        yield document


def text_fingerprint(tokenizer: TokenizerSpec) -> str:
    """What of a tokenizer decides the ids of documents: padding is in none, and symbols lie past all others."""
    free = {"num_symbols": 0, "pad": ""} if isinstance(tokenizer, TokenizerFile) else {"num_symbols": 0}
    if isinstance(tokenizer, TokenIds):
        return tokenizer.fingerprint
    return dataclasses.replace(tokenizer, **free).fingerprint


def checksum(starts: np.ndarray, tokens: np.ndarray) -> str:
    digest = hashlib.sha256(starts.astype("<i8").tobytes())
    digest.update(np.ascontiguousarray(tokens, tokens.dtype.newbyteorder("<")))
    return digest.hexdigest()


@functools.cache
def _context() -> ts.Context:
    return ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})


class ShardDirectory:
    """The files of one set of shards.

    Args:
      path: a local directory, `gs://bucket/…` or `s3://bucket/…`.

    Raises:
      SourceError: the path is no place tensorstore can open, there or in any method.
    """

    def __init__(self, path: str):
        self.path = path.rstrip("/")
        local = "://" not in path
        self._url = (Path(path).expanduser().absolute().as_uri() if local else self.path) + "/"
        try:
            self._files = ts.KvStore.open(self._url, context=_context()).result()
        except (ValueError, OSError) as error:
            raise SourceError(path, None, f"cannot open ({_short(error)})") from None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object in a file, or `None` if there is no such file."""
        try:
            found = self._files.read(name).result()
            value = json.loads(found.value) if found.state == "value" else None
        except (ValueError, OSError) as error:
            raise SourceError(f"{self.path}/{name}", None, f"cannot be read ({_short(error)})") from None
        if value is not None and not isinstance(value, dict):
            raise SourceError(f"{self.path}/{name}", None, "expected a JSON object")
        return value

    def write_json(self, name: str, value: Any) -> None:
        """Write a file; it appears when it is whole."""
        self._do(name, lambda: self._files.write(name, json.dumps(value, indent=1).encode() + b"\n").result())

    def write_shard(self, record: ShardRecord, starts: np.ndarray, tokens: np.ndarray) -> None:
        """Both arrays, over whatever an interrupted run left there, and then the record."""
        for part, array in ("tokens", tokens), ("starts", starts):
            spec = self._spec(f"{record.name}/{part}") | {"metadata": _metadata(array)}
            # a piece of zeros is written too, so that a missing one is noticed
            spec["store_data_equal_to_fill_value"] = True
            self._do(f"{record.name}/{part}", lambda spec=spec, array=array: _write(spec, array))
        self.write_json(f"{record.name}/{RECORD}", dataclasses.asdict(record))

    def shard(self, name: str) -> ShardRecord | None:
        """The record of a shard that was written to its end, or `None`."""
        values = self.read_json(f"{name}/{RECORD}")
        return None if values is None else record_of(values, f"{self.path}/{name}/{RECORD}")

    def open_shard(self, record: ShardRecord) -> tuple[Any, np.ndarray]:
        """(tokens as a tensorstore, starts); the borders and the first tokens are read.

        Raises:
          SourceError: something of it is missing, damaged or not as the record says.
        """
        where = f"{self.path}/{record.name}"
        try:
            opened = [ts.open(self._spec(f"{record.name}/{part}"), context=_context()) for part in ("tokens", "starts")]
            tokens, starts = (future.result() for future in opened)
            first = starts.read()
            tokens[:1].read().result()
            starts = first.result()
        except (ValueError, OSError) as error:
            raise SourceError(where, None, f"unreadable shard ({_short(error)})") from None
        whole = starts.shape == (record.documents + 1,) and tokens.shape == (record.tokens,)
        if not whole or starts[0] != 0 or starts[-1] != record.tokens or (np.diff(starts) < 2).any():
            raise SourceError(where, None, "unreadable shard (its documents are not those of its record)")
        return tokens, starts

    def verify_shard(self, record: ShardRecord) -> None:
        """Read all of a shard.

        Raises:
          SourceError: as `open_shard`, or the checksum differs.
        """
        tokens, starts = self.open_shard(record)
        if checksum(starts, start_reading(tokens, f"{self.path}/{record.name}")()) != record.sha256:
            raise SourceError(f"{self.path}/{record.name}", None, "damaged shard (its checksum is not that recorded)")

    def _spec(self, name: str) -> dict[str, Any]:
        return {"driver": "zarr3", "kvstore": f"{self._url}{name}/", "fill_missing_data_reads": False}

    def _do(self, name: str, work) -> None:
        try:
            work()
        except (ValueError, OSError) as error:
            raise SourceError(f"{self.path}/{name}", None, f"cannot be written ({_short(error)})") from None


def _metadata(array: np.ndarray) -> dict[str, Any]:
    pieces = max(1, -(-len(array) // PIECE))
    order = [{"name": "bytes", "configuration": {"endian": "little"}}]
    codecs = [*order, {"name": "zstd", "configuration": {"level": 3}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [PIECE], "codecs": codecs, "index_codecs": [*order, {"name": "crc32c"}]}
    return {
        "data_type": array.dtype.name,
        "shape": [len(array)],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [pieces * PIECE]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def _write(spec: dict[str, Any], array: np.ndarray) -> None:
    ts.open(spec, context=_context(), create=True, delete_existing=True).result().write(array).result()


def start_reading(tokens: Any, where: str) -> Callable[[], np.ndarray]:
    """Begin to read a tensorstore, or a part of one; what is returned waits for the array.

    It raises `SourceError` if a piece is missing or its CRC differs.
    """
    reading = tokens.read()

    def finish() -> np.ndarray:
        try:
            return reading.result()
        except (ValueError, OSError) as error:
            fix = f"unreadable shard ({_short(error)}); make it anew, or open with verify 'full' and damaged 'skip'"
            raise SourceError(where, None, fix) from None

    return finish


def record_of(values: dict[str, Any], where: str) -> ShardRecord:
    try:
        return ShardRecord(**{**values, "next": tuple(values["next"])})
    except (TypeError, KeyError):
        raise SourceError(where, None, "is not the record of a shard of this version") from None


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest; its `shards` become `ShardRecord`s.

    Raises:
      SourceError: there is none, or it is of another version.
    """
    where = f"{path.rstrip('/')}/{MANIFEST}"
    values = ShardDirectory(path).read_json(MANIFEST)
    if values is None:
        raise SourceError(where, None, "no such file; make the shards with `irope prepare`, or let it end")
    if values.get("version") != VERSION:
        raise SourceError(where, None, f"is of version {values.get('version')}; this program reads {VERSION}")
    return values | {"shards": [record_of(shard, where) for shard in values["shards"]]}


class ShardedTokens:
    """The tokens of all shards as one sequence of which slices are read when asked for.

    Args:
      shards: tensorstores `[tokens]`.
      names: what to call each in errors.
    """

    def __init__(self, shards: Sequence[Any], names: Sequence[str]):
        self._shards, self._names = shards, names
        self._ends = np.cumsum([shard.shape[0] for shard in shards])
        self.dtype = shards[0].dtype.numpy_dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        return self.start(place)()

    def start(self, place: slice) -> Callable[[], np.ndarray]:
        """Begin to read; what is returned waits for it and gives it. Many reads at once wait for a network once."""
        begin, end, step = place.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read in order, not in steps of {step}")
        parts = []
        while begin < end:
            shard = int(np.searchsorted(self._ends, begin, side="right"))
            first = int(self._ends[shard]) - self._shards[shard].shape[0]
            stop = min(end, int(self._ends[shard]))
            parts.append(start_reading(self._shards[shard][begin - first : stop - first], self._names[shard]))
            begin = stop
        return lambda: np.concatenate([part() for part in parts]) if parts else np.zeros(0, self.dtype)


def open_shards(spec: Shards, tokenizer: TokenizerSpec) -> tuple[ShardedTokens, np.ndarray, str]:
    """(tokens, starts of all documents and the end, fingerprint of what was opened).

    Raises:
      SourceError: no manifest, a shard that cannot be read where the policy is `error`, or none that can.
      ConfigError: the shards were made with another tokenizer.
    """
    manifest, files = read_manifest(spec.path), ShardDirectory(spec.path)
    if manifest["tokenizer"] != text_fingerprint(tokenizer):
        fix = f"{spec.path} was made with {manifest['tokenizer']}, this is {text_fingerprint(tokenizer)}; use that one"
        raise ConfigError("tokenizer", tokenizer.kind, fix)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # each waits for the network, not for the processor
        found = list(pool.map(lambda record: _opened_or_error(files, record, spec.verify), manifest["shards"]))
    lost = [(record, error) for record, error in found if isinstance(error, SourceError)]
    opened = [(record, *parts) for record, parts in found if not isinstance(parts, SourceError)]
    if lost and spec.damaged == "error":
        raise lost[0][1]
    if lost:
        documents = sum(record.documents for record, _ in lost)
        log.warning("left out %d shards, %d documents; the first: %s", len(lost), documents, lost[0][1])
    if not opened:
        raise SourceError(spec.path, None, "no shard can be read")
    digest = hashlib.sha256(manifest["tokenizer"].encode())
    ends, starts = 0, [np.zeros(1, np.int64)]
    for record, _, own in opened:
        digest.update(record.sha256.encode())
        starts.append(own[1:] + ends)
        ends += record.tokens
    flat = ShardedTokens([tokens for _, tokens, _ in opened], [f"{files.path}/{record.name}" for record, *_ in opened])
    return flat, np.concatenate(starts), digest.hexdigest()[:16]


def _opened_or_error(files: ShardDirectory, record: ShardRecord, verify: str) -> tuple[ShardRecord, Any]:
    try:
        if verify == "full":
            files.verify_shard(record)
        return record, files.open_shard(record)
    except SourceError as error:
        return record, error


def _short(error: Exception) -> str:
    """What tensorstore says without the specs it appends."""
    return str(error).split(" [")[0].replace("\n", " ")[:300]
