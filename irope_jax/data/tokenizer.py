"""Text to token ids and back: bytes, or any Hugging Face `tokenizer.json`; plus ids that no text produces.

A tokenizer here is its own frozen spec: it may stand in a config, and it encodes. Beyond ordinary text ids every
tokenizer has bos, eos and pad, and may have *markers* (`set`, `get`, ...) and opaque *symbols*, which synthetic tasks
use as keys and values: single tokens that never occur in text. Reading files belongs to `sources`, tasks to
`synthetic`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from irope_jax.core.config import ConfigError, nearest

MARKERS = ("set", "get", "let", "copy", "spare4", "spare5", "spare6", "spare7")
"""Task markers in id order. The spare ones keep symbol ids (and checkpoints) in place when a task needs a new one."""


class Tokenizer(Protocol):
    """What the rest of the package may ask of a tokenizer. Ids are `0 … vocab_size - 1`."""

    num_symbols: int

    @property
    def vocab_size(self) -> int: ...

    @property
    def text_vocab_size(self) -> int:
        """Ids below this are ordinary text tokens."""

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Changes when the mapping between text and ids changes."""

    def marker(self, name: str) -> int:
        """Id of a task marker, one of `MARKERS`."""

    def symbols(self, start: int, count: int) -> np.ndarray:
        """int32 `[count]`: the ids of symbols `start … start + count - 1`."""

    def encode(self, text: str) -> np.ndarray:
        """int32 `[n]`; never a special id, whatever the text says. bos and eos are not added."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, any integer dtype; in parallel where the library can."""

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids; specials as `<bos>`, markers as `<set>`, symbols as `<k12>`, broken UTF-8 as U+FFFD."""


class _Extras:
    """Markers and symbols: consecutive ids from `first_marker_id` on."""

    num_symbols: int

    @property
    def first_marker_id(self) -> int:
        raise NotImplementedError

    @property
    def has_markers(self) -> bool:
        return True

    @property
    def vocab_size(self) -> int:
        return self.first_marker_id + (len(MARKERS) if self.has_markers else 0) + self.num_symbols

    def marker(self, name: str) -> int:
        if name not in MARKERS:
            raise ConfigError("marker", name, nearest(name, MARKERS))
        if not self.has_markers:
            raise ConfigError("tokenizer.num_symbols", 0, "this task needs markers and symbols; set it to 128 or more")
        return self.first_marker_id + MARKERS.index(name)

    def symbols(self, start: int, count: int) -> np.ndarray:
        if not 0 <= start <= start + count <= self.num_symbols:
            raise ConfigError("tokenizer.num_symbols", self.num_symbols, f"set it to at least {start + count}")
        first = self.first_marker_id + len(MARKERS) + start
        return np.arange(first, first + count, dtype=np.int32)

    def _extra_name(self, token: int) -> str:
        place = token - self.first_marker_id
        if not 0 <= place < self.vocab_size - self.first_marker_id:
            return f"<?{token}>"
        return f"<{MARKERS[place]}>" if place < len(MARKERS) else f"<k{place - len(MARKERS)}>"


def _check_symbols(count: int) -> None:
    if count < 0:
        raise ConfigError("num_symbols", count, "must be 0 or more")


@dataclass(frozen=True)
class ByteTokenizer(_Extras):
    """UTF-8 bytes as ids 0 … 255, then bos 256, eos 257, pad 258, eight markers, then the symbols.

    Attributes:
      num_symbols: how many opaque tokens follow; tasks with 64 keys and 64 values need 128.
    """

    num_symbols: int = 0
    kind: ClassVar[str] = "bytes"

    text_vocab_size: ClassVar[int] = 256
    bos_id: ClassVar[int] = 256
    eos_id: ClassVar[int] = 257
    pad_id: ClassVar[int] = 258
    first_marker_id: ClassVar[int] = 259

    def __post_init__(self):
        _check_symbols(self.num_symbols)

    @property
    def fingerprint(self) -> str:
        return f"bytes:{self.num_symbols}"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: np.ndarray) -> str:
        names = {self.bos_id: "<bos>", self.eos_id: "<eos>", self.pad_id: "<pad>"}
        return _decode_runs(
            ids,
            lambda token: 0 <= token < 256,
            lambda run: bytes(run).decode("utf-8", errors="replace"),
            lambda token: names.get(token) or self._extra_name(token),
        )


@dataclass(frozen=True)
class TokenizerFile(_Extras):
    """Any Hugging Face `tokenizer.json`, read by the `tokenizers` library (extra `text`).

    Special tokens are named by their text in the file; one left empty gets an id of its own past the file's vocabulary
    (bos, eos, pad in that order), then eight markers and the symbols follow if `num_symbols` is not 0.

    Attributes:
      path: the file.
      bos, eos, pad: their texts in the file, such as `<|begin_of_text|>`; empty reserves a new id.
      num_symbols: opaque tokens past the vocabulary.
      sha256: hex digest the file must have; empty accepts any. `pinned()` fills it in, so a changed file is noticed.
    """

    path: str
    bos: str = ""
    eos: str = ""
    pad: str = ""
    num_symbols: int = 0
    sha256: str = ""
    kind: ClassVar[str] = "file"

    def __post_init__(self):
        _check_symbols(self.num_symbols)
        if not self.path:
            raise ConfigError("path", self.path, "give the path of a tokenizer.json")

    @functools.cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.content()).hexdigest()

    def content(self) -> bytes:
        """The file."""
        try:
            return Path(self.path).expanduser().read_bytes()
        except OSError as error:
            raise ConfigError("path", self.path, f"cannot read the tokenizer file ({error.strerror})") from None

    @functools.cached_property
    def _loaded(self):
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(
                "kind", self.kind, "needs the library `tokenizers`; install irope-jax[text] or use kind 'bytes'"
            ) from None
        if self.sha256 and self._digest != self.sha256:
            raise ConfigError("sha256", self.sha256, f"{self.path} has changed, it is now {self._digest}")
        try:
            loaded = tokenizers.Tokenizer.from_str(self.content().decode("utf-8"))
        except Exception as error:  # the library raises bare Exception; UnicodeDecodeError for binary files
            raise ConfigError("path", self.path, f"not a tokenizer.json ({error})") from None
        loaded.encode_special_tokens = True  # text that spells a special token stays text
        loaded.no_truncation()
        loaded.no_padding()
        return loaded

    @functools.cached_property
    def _vocab(self) -> dict[str, int]:
        return self._loaded.get_vocab(with_added_tokens=True)

    @functools.cached_property
    def text_vocab_size(self) -> int:
        return max(self._vocab.values()) + 1

    @functools.cached_property
    def _special_ids(self) -> dict[str, int]:
        ids, free = {}, self.text_vocab_size
        for name in ("bos", "eos", "pad"):
            text = getattr(self, name)
            if not text:
                ids[name], free = free, free + 1
            elif text in self._vocab:
                ids[name] = self._vocab[text]
            else:
                special = [token.content for token in self._loaded.get_added_tokens_decoder().values()]
                fix = nearest(text, special) if special else "leave it empty for a new id"
                raise ConfigError(name, text, f"the tokenizer file has no such token; {fix}")
        return ids | {"free": free}

    @property
    def bos_id(self) -> int:
        return self._special_ids["bos"]

    @property
    def eos_id(self) -> int:
        return self._special_ids["eos"]

    @property
    def pad_id(self) -> int:
        return self._special_ids["pad"]

    @property
    def first_marker_id(self) -> int:
        return self._special_ids["free"]

    @property
    def has_markers(self) -> bool:
        return self.num_symbols > 0

    @property
    def fingerprint(self) -> str:
        return f"file:{self._digest}:{self.bos}:{self.eos}:{self.pad}:{self.num_symbols}"

    def pinned(self) -> TokenizerFile:
        """The same spec with the file's digest written down: using it after the file changed is an error."""
        return TokenizerFile(self.path, self.bos, self.eos, self.pad, self.num_symbols, self._digest)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._loaded.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._loaded.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: np.ndarray) -> str:
        names = {self._special_ids[name]: f"<{name}>" for name in ("bos", "eos", "pad")}
        return _decode_runs(
            ids,
            lambda token: 0 <= token < self.text_vocab_size and token not in names,
            lambda run: self._loaded.decode(run, skip_special_tokens=False),
            lambda token: names.get(token) or self._extra_name(token),
        )


@dataclass(frozen=True)
class TokenIds(_Extras):
    """Ids and no text: what a model has that came without a tokenizer. Text is an error that says how to give one.

    Attributes:
      size: how many ids there are.
      bos, eos, pad: those that begin, end and fill.
    """

    size: int
    bos: int = 0
    eos: int = 0
    pad: int = 0
    num_symbols: ClassVar[int] = 0
    kind: ClassVar[str] = "ids"

    has_markers: ClassVar[bool] = False

    def __post_init__(self):
        for name in ("bos", "eos", "pad"):
            if not 0 <= getattr(self, name) < self.size:
                raise ConfigError(name, getattr(self, name), f"an id is 0 to size - 1 = {self.size - 1}")

    @property
    def text_vocab_size(self) -> int:
        return self.size

    @property
    def first_marker_id(self) -> int:
        return self.size

    @property
    def bos_id(self) -> int:
        return self.bos

    @property
    def eos_id(self) -> int:
        return self.eos

    @property
    def pad_id(self) -> int:
        return self.pad

    @property
    def fingerprint(self) -> str:
        return f"ids:{self.size}:{self.bos}:{self.eos}:{self.pad}"

    def encode(self, text: str) -> np.ndarray:
        fix = "there is no tokenizer; give one: --config.data.tokenizer=\"{'kind': 'file', 'path': 'tokenizer.json'}\""
        raise ConfigError("data.tokenizer.kind", self.kind, fix)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: np.ndarray) -> str:
        return " ".join(map(str, np.asarray(ids).reshape(-1).tolist()))


TokenizerSpec = ByteTokenizer | TokenizerFile | TokenIds


def _decode_runs(ids, is_text, decode_text, name_of) -> str:
    parts, run = [], []
    for token in np.asarray(ids).reshape(-1).tolist():
        if is_text(token):
            run.append(token)
            continue
        if run:
            parts.append(decode_text(run))
            run = []
        parts.append(name_of(token))
    return "".join([*parts, decode_text(run) if run else ""])
