"""Our parameters as safetensors of a Hugging Face folder, block by block: no tensor need be in memory as a whole.

The library writes what is in memory; a file may be far larger. So the few bytes before the numbers are written here,
as https://github.com/huggingface/safetensors describes them, and files are read back by the library in tests and by
`irope export --verify`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from irope_jax.checkpoint.hf_names import Row
from irope_jax.checkpoint.hf_places import Place, repaired, wanted_tensors
from irope_jax.checkpoint.hf_weights import INDEX, SINGLE
from irope_jax.checkpoint.native import CheckpointError
from irope_jax.checkpoint.streams import Keys
from irope_jax.core.config import ConfigError, nearest
from irope_jax.model.config import ModelConfig

FORMATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Number formats by our names and those of the header."""


@dataclass(frozen=True)
class Writing:
    """Tensors to be written, and where their numbers come from.

    Attributes:
      arrays: our stacked parameters by path, of which blocks can be read (`Checkpoints.arrays`).
      ours: the model they belong to.
      there: the same as the file has it: `hf_writers.model_to_hf`.
      rows: the family's table.
      dtype: of the file, one of `FORMATS`.
    """

    arrays: Mapping[Keys, Any]
    ours: ModelConfig
    there: ModelConfig
    rows: Sequence[Row]
    dtype: str

    def __post_init__(self):
        if self.dtype not in FORMATS:
            raise ConfigError("--dtype", self.dtype, nearest(self.dtype, FORMATS))

    @property
    def numbers(self) -> np.dtype:
        return np.dtype(jnp.dtype(self.dtype))

    def tensors(self) -> dict[str, list[Place]]:
        """All of them by name: what is of no layer first, then layer by layer."""
        wanted = wanted_tensors(self.rows, self.there)
        layer = lambda item: (item[1][0].row.per_layer, item[1][0].layer)
        return dict(sorted(wanted.items(), key=layer))

    def shape(self, places: Sequence[Place]) -> tuple[int, ...]:
        return places[0].row.source_shape(self.there, places[0].layer)

    def blocks(self, name: str, places: Sequence[Place]) -> Iterator[np.ndarray]:
        """A tensor from its first row to its last.

        Raises:
          CheckpointError: a number that the format cannot hold.
        """
        places = sorted(places, key=lambda place: place.row.part or 0)
        row, layer = places[0].row, places[0].layer
        for steps in row.blocks(self.there, layer, self.numbers.itemsize):
            parts = []
            for place in places:
                found = self.arrays[place.path(self.ours)][place.index(self.ours, steps)].read().result()
                with np.errstate(over="ignore"):  # told below
                    found = found.astype(self.numbers, copy=False)
                parts.append(repaired(found, place.row, layer, self.ours, self.there))
            block = row.write(parts, self.there, layer, len(steps))
            if not np.isfinite(block).all():
                raise CheckpointError(
                    f"{name}: holds numbers that are not finite as {self.dtype}; choose another --dtype, or export an "
                    "older step if they are not finite at all"
                )
            yield block


def write_weights(
    folder: Path, writing: Writing, shard_bytes: int, advance: Callable[[int], None] = lambda _: None
) -> int:
    """All tensors as safetensors in `folder`, in one file or in several with an index; returns their number.

    Args:
      shard_bytes: at most so many a file, unless one tensor has more.
      advance: told the bytes of every block that is written.
    """
    tensors = writing.tensors()
    size = lambda name: math.prod(writing.shape(tensors[name])) * writing.numbers.itemsize
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name in tensors:
        if shards[-1] and size(name) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size(name)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else [SINGLE]
    for file, names in zip(files, shards):
        _write_file(folder / file, {name: tensors[name] for name in names}, writing, advance)
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(map(size, tensors))}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(tensors)


def _write_file(
    path: Path, tensors: Mapping[str, Sequence[Place]], writing: Writing, advance: Callable[[int], None]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, places in tensors.items():
        shape = writing.shape(places)
        end = at + math.prod(shape) * writing.numbers.itemsize
        header[name] = {"dtype": FORMATS[writing.dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, places in tensors.items():
            for block in writing.blocks(name, places):
                file.write(np.ascontiguousarray(block).view(np.uint8).reshape(-1))
                advance(block.nbytes)
