"""Where documents come from: frozen specs, each a list of files and the records of each, in a fixed order.

A record is a text, or the `SourceError` that names file and line of one that cannot be read; what becomes of those is
the `damaged` policy. `open_source(spec)` reads a whole source into memory. Tokenizing, cutting and shuffling belong to
`documents` and `pipeline`; decompressing and line reading to `reading`; token shards to `shards`.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.resources
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from irope_jax.core.config import ConfigError, nearest
from irope_jax.data.reading import SourceError, lines_of, read_lines, read_text, text_of

log = logging.getLogger(__name__)

CORPUS_SHA256 = "6f34b96b83d5aefe3b7f7863c16a39bb84f5cb2256bcae3467cf559c9427ad9d"
HELD_OUT = {"validation": ("Persuasion",), "test": ("Moby-Dick",)}
"""Titles of the shipped corpus that no training split contains."""
_SHIPPED = importlib.resources.files("irope_jax.data") / "corpus" / "pd_novels.jsonl.xz"

Damaged = Literal["error", "skip"]
"""What to do with a document that cannot be read: stop with its file and line, or leave it out and count it."""

Record = str | SourceError
"""A document, or what is wrong with one."""


@dataclass(frozen=True)
class Corpus:
    """The novels that ship with the package, one document each (see `corpus/PROVENANCE.md`).

    Attributes:
      split: `train` is five novels of Jane Austen (3.6 MB), `validation` is *Persuasion*, `test` is *Moby-Dick*.
    """

    split: Literal["train", "validation", "test"] = "train"
    kind: ClassVar[str] = "corpus"

    def __post_init__(self):
        if self.split not in ("train", *HELD_OUT):
            raise ConfigError("split", self.split, nearest(str(self.split), ("train", *HELD_OUT)))

    @property
    def damaged(self) -> Damaged:
        return "error"

    def files(self) -> list[Path]:
        return [Path(str(_SHIPPED))]

    def records(self, path: Path) -> Iterator[Record]:
        held_out = {title for titles in HELD_OUT.values() for title in titles}
        for title, text in _corpus():
            if (title in HELD_OUT[self.split]) if self.split in HELD_OUT else (title not in held_out):
                yield text


@functools.cache
def _corpus() -> tuple[tuple[str, str], ...]:
    with importlib.resources.as_file(_SHIPPED) as path:
        if not path.exists():
            raise SourceError(path, None, "the shipped corpus is missing; reinstall the package")
        if hashlib.sha256(path.read_bytes()).hexdigest() != CORPUS_SHA256:
            raise SourceError(path, None, "the shipped corpus is damaged (sha256 differs); reinstall the package")
        return tuple((d["title"], d["text"]) for d in (json.loads(line) for _, line in read_lines(path)))


@dataclass(frozen=True)
class TextFile:
    """Plain UTF-8 text files, possibly compressed (.xz, .gz, .bz2, .zst).

    Attributes:
      path: a file or a glob pattern; files are taken in sorted order.
      separator: text between documents of one file; empty makes each file one document.
      damaged: what to do with a file that is not UTF-8 text.
    """

    path: str
    separator: str = ""
    damaged: Damaged = "error"
    kind: ClassVar[str] = "text_file"

    def __post_init__(self):
        _check_path(self.path)
        _check_damaged(self.damaged)

    def files(self) -> list[Path]:
        return _files(self.path)

    def records(self, path: Path) -> Iterator[Record]:
        text = _text_or_error(path)
        if isinstance(text, SourceError) or not self.separator:
            yield text
        else:
            yield from text.split(self.separator)


@dataclass(frozen=True)
class Jsonl:
    """JSON lines, possibly compressed; one document per line.

    Attributes:
      path: a file or a glob pattern; files are taken in sorted order.
      field: the key that holds the text.
      damaged: what to do with a line that is not an object with that text.
    """

    path: str
    field: str = "text"
    damaged: Damaged = "error"
    kind: ClassVar[str] = "jsonl"

    def __post_init__(self):
        _check_path(self.path)
        _check_damaged(self.damaged)

    def files(self) -> list[Path]:
        return _files(self.path)

    def records(self, path: Path) -> Iterator[Record]:
        for number, line in lines_of(path):
            if isinstance(line, SourceError):
                yield line
            elif line.strip():
                try:
                    record = text_of(_json_object(path, number, line), self.field, path, number)
                except SourceError as error:
                    record = error
                yield record


@dataclass(frozen=True)
class Parquet:
    """Parquet files, one document per row; needs `pyarrow` (extra `text`).

    Attributes:
      path: a file or a glob pattern; files are taken in sorted order.
      field: the column that holds the text.
      damaged: what to do with a row whose text is null, or a row group that cannot be read.
    """

    path: str
    field: str = "text"
    damaged: Damaged = "error"
    kind: ClassVar[str] = "parquet"

    def __post_init__(self):
        _check_path(self.path)
        _check_damaged(self.damaged)

    def files(self) -> list[Path]:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ConfigError(
                "kind", self.kind, "needs the library `pyarrow`; install irope-jax[text] or convert to jsonl"
            ) from None
        return _files(self.path)

    def records(self, path: Path) -> Iterator[Record]:
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
            names = file.schema_arrow.names
        except (pyarrow.ArrowException, OSError) as error:
            yield SourceError(path, None, f"not a parquet file ({_one_line(error)})", ends_file=True)
            return
        with file:
            if self.field not in names:
                raise SourceError(path, None, f"has no column {self.field!r}; {nearest(self.field, names)}")
            first = 0
            for group in range(file.num_row_groups):
                yield from self._rows(file, path, group, first, pyarrow)
                first += file.metadata.row_group(group).num_rows

    def _rows(self, file, path: Path, group: int, first: int, pyarrow) -> Iterator[Record]:
        """The rows of a row group, the first of which is row `first` of the file, from 0."""
        row, end = first, first + file.metadata.row_group(group).num_rows
        batches = file.iter_batches(columns=[self.field], row_groups=[group])
        while True:
            try:
                batch = next(batches, None)
                values = None if batch is None else batch.column(0).to_pylist()
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                yield SourceError(path, row + 1, f"damaged parquet data ({_one_line(error)})", lost=end - row)
                return
            if values is None:
                return
            for value in values:
                row += 1
                try:
                    record = text_of({self.field: value}, self.field, path, row)
                except SourceError as error:
                    record = error
                yield record


@dataclass(frozen=True)
class Directory:
    """A tree of text files, one document per file, sorted by relative path; compressed files are read through.

    Attributes:
      path: the directory.
      pattern: which files, relative to it; `**` goes through subdirectories.
      damaged: what to do with a file that is not UTF-8 text.
    """

    path: str
    pattern: str = "**/*.txt*"
    damaged: Damaged = "error"
    kind: ClassVar[str] = "directory"

    def __post_init__(self):
        _check_path(self.path)
        _check_damaged(self.damaged)
        if not self.pattern or Path(self.pattern).is_absolute():
            raise ConfigError("pattern", self.pattern, "give a relative pattern such as '**/*.txt'")

    def files(self) -> list[Path]:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise SourceError(root, None, "no such directory")
        files = [p for p in root.glob(self.pattern) if p.is_file()]
        files.sort(key=lambda p: p.relative_to(root).as_posix())
        if not files:
            raise SourceError(root, None, f"no file matches {self.pattern!r}")
        return files

    def records(self, path: Path) -> Iterator[Record]:
        yield _text_or_error(path)


@dataclass(frozen=True)
class Shards:
    """Documents that `irope prepare` turned into tokens; read piece by piece, never as a whole.

    Attributes:
      path: the directory, `gs://…` or `s3://…` that holds `manifest.json`.
      damaged: what to do with a shard that cannot be read when the source is opened: stop with its name, or leave it
        out and count it. Other documents are other data: a run begun without that shard goes on only without it.
      verify: `quick` reads the borders of the documents and the first tokens of each shard; `full` reads everything and
        compares the checksums of the manifest. Whatever is read later is checked as it is read.
    """

    path: str
    damaged: Damaged = "error"
    verify: Literal["quick", "full"] = "quick"
    kind: ClassVar[str] = "shards"

    def __post_init__(self):
        _check_path(self.path)
        _check_damaged(self.damaged)
        if self.verify not in ("quick", "full"):
            raise ConfigError("verify", self.verify, nearest(str(self.verify), ("quick", "full")))

    def files(self) -> list[Path]:
        raise SourceError(self.path, None, "holds tokens, not text; name the source it was made from")

    def records(self, path: Path) -> Iterator[Record]:
        raise NotImplementedError


TextSource = Corpus | TextFile | Jsonl | Parquet | Directory
SourceSpec = TextSource | Shards


def texts_of(spec: TextSource) -> Iterator[str]:
    """Every record of a source that is a text, also empty ones, in order; what is left out is counted in the log.

    Raises:
      SourceError: a file is missing, or a record is damaged and the policy is `error`.
    """
    lost, first = 0, None
    for path in spec.files():
        for record in spec.records(path):
            if not isinstance(record, SourceError):
                yield record
            elif spec.damaged == "error":
                raise record from None
            else:
                lost, first = lost + record.lost, first or record
    if first is not None:
        log.warning("left out %d damaged records of %s; the first: %s", lost, spec.path, first)


def open_source(spec: SourceSpec) -> Sequence[str]:
    """Every non-empty document of a source, in its fixed order.

    Raises:
      SourceError: a file is missing, damaged or empty; the message names it, the line where there is one, and the fix.
    """
    documents = [text for text in texts_of(spec) if text]
    if not documents:
        raise SourceError(getattr(spec, "path", spec.kind), None, "holds no text; every document is empty")
    return documents


def _check_path(path: str) -> None:
    if not path:
        raise ConfigError("path", path, "give the path of a file")


def _check_damaged(value: str) -> None:
    if value not in ("error", "skip"):
        raise ConfigError("damaged", value, nearest(str(value), ("error", "skip")))


def _files(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise SourceError(path, None, "is a directory; use a source of kind 'directory'")
    if path.exists():
        return [path]
    if not glob.has_magic(pattern):
        raise SourceError(path, None, "no such file")
    found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not found:
        raise SourceError(path, None, "no file matches")
    return found


def _text_or_error(path: Path) -> Record:
    try:
        return read_text(path)
    except SourceError as error:
        return error


def _json_object(path: Path, number: int, line: str) -> dict:
    try:
        value = json.loads(line)
    except RecursionError:
        raise SourceError(path, number, "JSON nested too deep") from None
    except ValueError as error:
        raise SourceError(path, number, f"not JSON ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise SourceError(path, number, f"expected a JSON object, got {type(value).__name__}")
    return value


def _one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).replace("\n", " ")[:120]
