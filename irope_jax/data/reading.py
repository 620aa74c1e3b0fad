"""Bytes on disk to lines and texts: decompression, UTF-8, and errors that name file and line. Knows no source spec."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from irope_jax.core.config import ConfigError, nearest


class SourceError(ConfigError):
    """Data that cannot be read; one line `FILE:LINE: what is wrong`.

    Args:
      path: the file.
      line: line number from 1 (row number for parquet), or `None` when the whole file is meant.
      fix: what is wrong.
      lost: how many records are lost with it; damage in the middle of compressed data, of which nobody knows how much
        follows, counts as one.
      ends_file: nothing after it can be read in this file.
    """

    def __init__(self, path: str | Path, line: int | None, fix: str, *, lost: int = 1, ends_file: bool = False):
        super().__init__(str(path) if line is None else f"{path}:{line}", ConfigError.ABSENT, fix)
        self.lost, self.ends_file = lost, ends_file

    def within(self, path: str) -> SourceError:
        return self  # a file name stands alone; the path of a config field in front would hide it


def open_bytes(path: Path) -> BinaryIO:
    """The decompressed bytes of a file, by its last suffix."""
    try:
        match path.suffix:
            case ".xz":
                return lzma.open(path, "rb")
            case ".gz" | ".dz":  # dictzip is gzip whose blocks can be found
                return gzip.open(path, "rb")
            case ".bz2":
                return bz2.open(path, "rb")
            case ".zst":
                try:
                    import zstandard
                except ImportError:
                    raise SourceError(path, None, "needs the library `zstandard`; install irope-jax[text]") from None
                return _ZstdFrames(path.open("rb"), zstandard.ZstdDecompressor())
            case _:
                return path.open("rb")
    except OSError as error:
        raise SourceError(path, None, f"cannot open ({error.strerror or error})") from None


class _ZstdFrames(io.RawIOBase):
    """All frames of a zstandard file. The library's own stream reader ends a truncated file without an error."""

    def __init__(self, file: BinaryIO, decompressor):
        self._file, self._decompressor = file, decompressor
        self._frame, self._ahead = None, b""

    def read(self, size: int = -1) -> bytes:
        """Some decompressed bytes, about as many as asked for or more; empty at the end."""
        while True:
            data = self._ahead or self._file.read(1 << 16)
            self._ahead = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the last frame is not complete")
                return b""
            self._frame = self._frame or self._decompressor.decompressobj()
            out = self._frame.decompress(data)
            if self._frame.eof:
                self._ahead, self._frame = self._frame.unused_data, None
            if out:
                return out

    def close(self) -> None:
        self._file.close()
        super().close()


def lines_of(path: Path) -> Iterator[tuple[int, str | SourceError]]:
    """`(line number from 1, line without its end)`; lines end at newline only. A BOM at the start is dropped.

    A line with NUL bytes (binary data) or invalid UTF-8 comes as its error; so does broken compression, after which
    nothing comes. A file that cannot be opened raises.
    """
    number, unfinished = 0, []
    with open_bytes(path) as file:
        while True:
            try:
                block = _read(file, path, number + 1, 1 << 20)
            except SourceError as error:
                yield number + 1, error
                return
            first, *others = block.split(b"\n")
            unfinished.append(first)
            if block and not others:
                continue  # a line longer than the block: join its pieces once, at its end
            lines = [b"".join(unfinished), *others]
            unfinished = [lines.pop()] if block else []
            if lines == [b""] and not block:
                return
            for line in lines:
                number += 1
                try:
                    decoded = _decode(line.removesuffix(b"\r"), path, number)
                except SourceError as error:
                    decoded = error
                yield number, decoded
            if not block:
                return


def read_lines(path: Path, *, skip_damaged: bool = False) -> Iterator[tuple[int, str]]:
    """`lines_of` without errors.

    Raises:
      SourceError: the first damage; with `skip_damaged` only that which ends the file, other lines are left out.
    """
    for number, line in lines_of(path):
        if not isinstance(line, SourceError):
            yield number, line
        elif line.ends_file or not skip_damaged:
            raise line from None


def read_text(path: Path) -> str:
    """The whole file as text; line ends are kept as they are, a BOM at the start is dropped."""
    return _decode(read_bytes(path), path, 1)


def read_bytes(path: Path) -> bytes:
    """The whole file, decompressed."""
    with open_bytes(path) as file:
        parts, lines = [], 1
        while block := _read(file, path, lines, 1 << 20):
            parts.append(block)
            lines += block.count(b"\n")
    return b"".join(parts)


def text_of(record: Mapping[str, Any], field: str, path: Path, line: int) -> str:
    """The text of a record, checked: there, a string, and encodable."""
    if field not in record:
        keys = [str(key) for key in record]
        raise SourceError(path, line, f"no field {field!r}; {nearest(field, keys) if keys else 'the object is empty'}")
    text = record[field]
    if not isinstance(text, str):
        raise SourceError(path, line, f"field {field!r} should be text, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise SourceError(path, line, f"field {field!r} holds a lone surrogate, which is not text") from None
    return text


def _read(file: BinaryIO, path: Path, line: int, size: int) -> bytes:
    """Some bytes, at most `size` where that can be kept; empty at the end."""
    try:
        return getattr(file, "read1", file.read)(size)  # read1: what comes before damage is given before it raises
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        problem = error
    except Exception as error:  # zstandard's own error type exists only where the library is installed
        if type(error).__name__ != "ZstdError":
            raise
        problem = error
    raise SourceError(
        path, line, f"damaged or truncated {path.suffix or 'file'} data ({problem})", ends_file=True
    ) from None


def _decode(data: bytes, path: Path, first_line: int) -> str:
    if first_line == 1:
        data = data.removeprefix(b"\xef\xbb\xbf")
    nul = data.find(b"\0")
    if nul >= 0:
        raise SourceError(path, first_line + data.count(b"\n", 0, nul), "holds NUL bytes: binary data, not text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise SourceError(path, line, f"not UTF-8 (byte 0x{data[error.start]:02x}); convert the file") from None
