"""GGUF files: opened, checked, and their weights dequantised, through the `gguf` library.

What a header says is `gguf_models`, the tokenizer `gguf_tokenizer`. llama.cpp turns neighbouring entries of a head
together. Of architecture `llama` rows of q and k were re-ordered for that; ours, as those of transformers, turn halves.
Undoing this is the one thing that no error would tell: without it a model speaks, badly.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from irope_jax.checkpoint.gguf_models import (
    ARCHITECTURES,
    FREQUENCY_FACTORS,
    Header,
    as_in_the_file,
    check_keys,
    model_of,
)
from irope_jax.checkpoint.gguf_tokenizer import companions, special_tokens, tokenizer_json
from irope_jax.checkpoint.hf_weights import Reading, open_reading
from irope_jax.checkpoint.native import CheckpointError
from irope_jax.model.config import ModelConfig


def gguf_library(doing: str) -> Any:
    """The library.

    Raises:
      CheckpointError: it is missing.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{doing} GGUF needs the library gguf: `pip install 'irope-jax[hf]'`") from None
    return gguf


class GgufFile:
    """One file, opened and its header read.

    Raises:
      CheckpointError: the library is missing, or it is not a whole GGUF file of a known architecture.
    """

    def __init__(self, path: Path):
        self._gguf, self.path = gguf_library("reading"), path
        try:
            self._reader = self._gguf.GGUFReader(path)
            self._tensors = {str(tensor.name): tensor for tensor in self._reader.tensors}
        except Exception as error:  # the library raises many kinds for damaged files
            raise CheckpointError(f"{path}: not a whole GGUF file ({error or type(error).__name__})") from None
        check_keys(self.header)

    @cached_property
    def header(self) -> Header:
        vocab = self._tensors.get("token_embd.weight")
        factors = FREQUENCY_FACTORS in self._tensors
        return Header(
            self.where,
            {name: found.contents() for name, found in self._reader.fields.items()},
            vocab_size=None if vocab is None or len(vocab.shape) != 2 else int(vocab.shape[1]),
            untied="output.weight" in self._tensors,
            factors=tuple(map(float, self.tensor(FREQUENCY_FACTORS).reshape(-1))) if factors else None,
        )

    @property
    def context_length(self) -> int:
        return self.header.whole("context_length")

    def model(self) -> ModelConfig:
        """The model it describes; raises `CheckpointError` as `gguf_models.model_of`."""
        return model_of(self.header)

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    @property
    def where(self) -> str:
        return str(self.path)

    def shape(self, name: str) -> tuple[int, ...]:
        """Axes as llama.cpp's source format (transformers') has them."""
        return tuple(int(size) for size in self._tensors[name].shape[::-1])

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows of a tensor, dequantised to float32."""
        found, shape = self._tensors[name], self.shape(name)
        data = np.asarray(found.data)
        if len(shape) > 1 and data.ndim > 1 and data.shape[0] == shape[0]:
            data, shape = data[rows], (len(range(*rows.indices(shape[0]))), *shape[1:])
            rows = slice(None)
        try:
            values = self._gguf.quants.dequantize(data, found.tensor_type)
            return np.asarray(values, np.float32).reshape(shape)[rows]
        except Exception as error:
            raise CheckpointError(f"{self.path}: cannot read {name!r} ({error or type(error).__name__})") from None

    def tensor(self, name: str) -> np.ndarray:
        """All of a tensor."""
        return self.rows(name, slice(None))

    def reading(self, model: ModelConfig) -> Reading:
        """What is to be read; raises `CheckpointError` as `hf_weights.open_reading`."""
        rows = ARCHITECTURES[self.header.arch].rows
        return open_reading(rows, as_in_the_file(model), self, self.names, idle=(r"rope_freqs\.weight",))

    def tokenizer_json(self) -> str | None:
        """The tokenizer as a Hugging Face `tokenizer.json`; see `gguf_tokenizer.tokenizer_json`."""
        return tokenizer_json(self.header)

    def special_tokens(self) -> dict[str, str]:
        """Texts of `bos`, `eos` and `pad`, as far as the header names them."""
        return special_tokens(self.header)

    def companions(self) -> dict[str, bytes]:
        """What it tells of other files of Hugging Face, by name."""
        return companions(self.header)
