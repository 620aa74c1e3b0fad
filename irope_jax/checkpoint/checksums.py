"""Checksums of a checkpoint directory: written before it gets its name, compared before it is read.

    STEP/checksums.json   {"files": {"meta/metadata": [SIZE, SHA256], ...}, "format": 1, "sum": SHA256 of "files"}

Orbax writes its own `_CHECKPOINT_METADATA` in a thread of its own, beside the rest and once more, with the time, at the
very end: the list waits for all of it but the time, and it is compared but for that. A file that is shorter, changed or
gone is found by it, also where the format that stores the arrays would read it without a word. Files that are not in
the list do not matter. No jax: any machine can judge a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIST = "checksums.json"
MARK = {"irope_checksums": 1}
"""What the metadata of a checkpoint says that has a list: without one, such a checkpoint is damaged, not old."""

_METADATA = "_CHECKPOINT_METADATA"  # orbax's own file, where the mark lies
_COMMITTED = "commit_timestamp_nsecs"
_THREADS = 8


def write_list(directory: Path, patience: float = 120.0) -> None:
    """List every file below `directory`; the list is there whole or not at all.

    Raises:
      TimeoutError: orbax's metadata are not whole after `patience` seconds.
    """
    until = time.monotonic() + patience
    while not _described(directory):
        if time.monotonic() > until:
            raise TimeoutError(f"{directory / _METADATA} is not whole after {patience:g} s")
        time.sleep(0.01)
    names = sorted(_names(directory))
    sums = _all(directory, names)
    temporary = directory / f".{LIST}"
    with open(temporary, "wb") as file:
        file.write(_text(dict(zip(names, sums, strict=True))))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / LIST)


def has_list(directory: Path) -> bool:
    """Whether a checkpoint has checksums, or ought to have."""
    if (directory / LIST).exists():
        return True
    try:
        said = json.loads((directory / _METADATA).read_bytes())["custom_metadata"]
        return MARK.items() <= said.items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return True  # what cannot be read does not pass for old


def fault(directory: Path) -> str | None:
    """The first thing wrong with a checkpoint that `has_list`, one line that names the file; None if it is whole."""
    try:
        text = (directory / LIST).read_bytes()
    except OSError:
        return f"{LIST} is missing"
    try:
        files = json.loads(text)["files"]
        wanted = {name: (int(size), str(digest)) for name, (size, digest) in files.items()}
        if text != _text(wanted):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{LIST} is damaged"
    for name, (size, _) in wanted.items():  # cheap, so first
        try:
            found = (directory / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size and name != _METADATA:
            return f"{name} has {found} bytes, {size} were written"
    try:
        sums = _all(directory, list(wanted))
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    changed = [name for name, found in zip(wanted, sums, strict=True) if found != wanted[name]]
    return f"{changed[0]} is not what was written (checksum)" if changed else None


def _described(directory: Path) -> bool:
    """Whether orbax has written what each item is: the last that it adds, but for the time."""
    try:
        return bool(json.loads((directory / _METADATA).read_bytes())["item_handlers"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _names(directory: Path) -> Iterable[str]:
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if name not in (LIST, f".{LIST}") and path.is_file():
            yield name


def _all(directory: Path, names: list[str]) -> list[tuple[int, str]]:
    """Size and checksum of each file; several at a time, as hashing and reading let other threads run."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda name: _sum(directory / name), names))


def _sum(path: Path) -> tuple[int, str]:
    if path.name == _METADATA:
        text = _untimed(path.read_bytes())
        return len(text), hashlib.sha256(text).hexdigest()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return os.fstat(file.fileno()).st_size, digest


def _untimed(text: bytes) -> bytes:
    """Orbax's metadata in one spelling, without the time of the end; whatever else it is, as it is."""
    try:
        return json.dumps(json.loads(text) | {_COMMITTED: None}, sort_keys=True).encode()
    except (ValueError, TypeError):
        return text


def _text(files: dict[str, tuple[int, str]]) -> bytes:
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "format": 1, "sum": own}, sort_keys=True, indent=0).encode()
