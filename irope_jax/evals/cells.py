"""Results of a grid that may be cut short: one JSON line per finished cell, and the same command goes on after them.

    FINGERPRINT.jsonl   first line: what the results are of; then {"cell": {...}, "scores": [...], "said": [...], ...}

What differs in anything that decides a result (task, tokenizer, model, weights, way of answering) has another file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import irope_jax
from irope_jax.core.config import fingerprint, to_dict
from irope_jax.core.hosts import gather, is_main_process, to_host
from irope_jax.core.records import RecordError
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.model.config import ModelConfig

FORMAT = 1


def weights_mark(params: Any) -> str:
    """Twelve hex digits from names, shapes and up to 64 values of every array: other training, another mark.

    It is the same on any mesh, since no sums are taken.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        row = leaf[(0,) * (leaf.ndim - 1)][:64] if leaf.ndim else leaf
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        row = to_host(row) if isinstance(row, jax.Array) else row
        digest.update(np.asarray(row, np.float32).tobytes())
    return digest.hexdigest()[:12]


def decided_by(model: ModelConfig, tokenizer: TokenizerSpec, params: Any) -> dict[str, Any]:
    """What decides any answer of a model, beside what it is asked."""
    return {
        "version": irope_jax.__version__,
        "tokenizer": tokenizer.fingerprint,
        "model": to_dict(model),
        "weights": weights_mark(params),
    }


class Cells:
    """The finished cells of one evaluation; kept in a file if there is a directory. All processes open it together.

    Args:
      directory: where; None keeps nothing.
      about: plain values that decide the results.

    Raises:
      RecordError: the file is damaged, or cannot be written.
    """

    def __init__(self, directory: Path | None, about: dict[str, Any]):
        self.path = None if directory is None else directory / f"{fingerprint(about)}.jsonl"
        self._about, self._file = about, None
        loaded = self._by_main_process(self._load)
        self._done = {_key(entry["cell"]): entry for entry in loaded or ()}

    def _by_main_process(self, work: Callable[[], Any]) -> Any:
        """What process 0 makes of the file, on every process; if it cannot, no process goes on."""
        if self.path is None:
            return None
        made, refused = None, None
        if is_main_process():
            try:
                made = work()
            except RecordError as error:
                refused = str(error)
        made, refused = gather([made, refused])[0]
        if refused is not None:
            raise RecordError(refused)
        return made

    def __enter__(self) -> Cells:
        self._by_main_process(self._open)
        return self

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise RecordError(f"{self.path}: cannot be written ({error.strerror})") from None
        if self._file.tell() == 0:
            self._write({"format": FORMAT, "about": self._about})

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def get(self, cell: dict[str, Any]) -> dict[str, Any] | None:
        """What was found for a cell, if it is finished."""
        return self._done.get(_key(cell))

    def add(self, cell: dict[str, Any], found: dict[str, Any]) -> None:
        """Remember a finished cell."""
        entry = {"cell": cell} | found
        self._done[_key(cell)] = entry
        if self._file is not None:
            self._write(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()

    def _load(self) -> list[dict[str, Any]]:
        """Entries of the file; a line that a kill tore is cut off."""
        if not self.path.exists():
            return []
        whole = self.path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            os.truncate(self.path, len(kept))
        entries = []
        for number, line in enumerate(kept.splitlines(), 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    if entry["format"] != FORMAT:
                        raise RecordError(f"{self.path}: format {entry['format']}, this version reads {FORMAT}")
                else:
                    entries.append({"cell": entry["cell"], "scores": list(map(float, entry["scores"]))})
            except (ValueError, KeyError, TypeError):
                fix = "not a result; remove that line, or the file to begin anew"
                raise RecordError(f"{self.path}, line {number}: {fix}") from None
        return entries


def _key(cell: dict[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True)
