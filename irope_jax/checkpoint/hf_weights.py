"""Weights of a Hugging Face folder as blocks of our parameters: safetensors only, nothing is executed.

Names and axes are `hf_names`, which tensor fills what is `hf_places`; here files are opened, checked and read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from irope_jax.checkpoint.hf_names import Row
from irope_jax.checkpoint.hf_places import Place, layouts, repaired, shapes_of, wanted_tensors
from irope_jax.checkpoint.native import CheckpointError
from irope_jax.checkpoint.streams import BLOCK_BYTES, Keys, Layout, Piece
from irope_jax.model.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OTHER_PARTS = ("vision_model.", "multi_modal_projector.", "model.vision_model.", "model.multi_modal_projector.")
"""Of models that also see; only their text part is read."""

_REOPEN_BYTES = 4 * BLOCK_BYTES


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      CheckpointError: no such file, or not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return values


class SafetensorsFolder:
    """Tensors of a folder by name, of which blocks can be read.

    Raises:
      CheckpointError: no safetensors, a damaged file, an index that names a file outside of the folder or a tensor that
        is not where it says.
    """

    def __init__(self, folder: Path):
        try:
            import safetensors
        except ImportError:
            raise CheckpointError(
                "reading Hugging Face weights needs the library safetensors: `pip install 'irope-jax[hf]'`"
            ) from None
        self._safetensors, self.folder, self._open = safetensors, folder, {}
        self._prefixed: dict[str, str] = {}
        self._touched: dict[str, int] = {}
        self._places = self._locate()

    def _locate(self) -> dict[str, str]:
        """File by name of tensor."""
        index = self.folder / INDEX
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
                raise CheckpointError(f"{index}: has no weight_map of names to files")
            for file in sorted(set(places.values())):
                if Path(file).name != file or file in ("", ".", ".."):
                    raise CheckpointError(f"{index}: names {file!r}, which is not a file of this folder")
                there = set(self._file(file).keys())
                if missing := [name for name, at in places.items() if at == file and name not in there]:
                    raise CheckpointError(f"{self.folder / file}: lacks {missing[0]!r}, which the index puts there")
            return places
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        others = [p.name for p in sorted(self.folder.glob("*")) if p.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {others[0]} is a pickle, which is not read: convert it to safetensors" if others else ""
        raise CheckpointError(f"{self.folder}: holds neither {SINGLE} nor {INDEX}{hint}")

    def _file(self, file: str):
        if file not in self._open:
            path = self.folder / file
            try:
                self._open[file] = self._safetensors.safe_open(path, framework="numpy")
            except (self._safetensors.SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from None
        return self._open[file]

    @property
    def names(self) -> Sequence[str]:
        return list(self._places)

    def text_only(self) -> None:
        """Of a model that also sees: forget the other parts, and the prefix that names of the text part have."""
        text = {}
        for name in self._places:
            if name.startswith(OTHER_PARTS):
                continue
            text[re.sub(r"^(model\.)?language_model\.", r"\1" if name.startswith("model.") else "", name)] = name
        self._prefixed, self._places = text, {short: self._places[name] for short, name in text.items()}

    @property
    def where(self) -> str:
        return str(self.folder)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def rows(self, name: str, rows: slice) -> np.ndarray:
        file = self._places[name]
        try:
            found = self._slice(name)[rows.start : rows.stop]
        except (self._safetensors.SafetensorError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.folder / file}: cannot read {name!r} ({error})") from None
        # pages of a mapped file stay in memory as long as it is open
        self._touched[file] = self._touched.get(file, 0) + found.nbytes
        if self._touched[file] > _REOPEN_BYTES:
            del self._open[file], self._touched[file]
        return found

    def _slice(self, name: str):
        return self._file(self._places[name]).get_slice(self._prefixed.get(name, name))


class Source(Protocol):
    """Tensors by name, of which rows can be read alone."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def where(self) -> str:
        """For messages."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows of a tensor along its first axis, the others whole."""


@dataclass(frozen=True)
class Reading:
    """A source checked against a model: nothing is read yet, and what there will be is known.

    Attributes:
      source: where the tensors are.
      wanted: the model's tensors by name.
      there: the model as the source has it.
    """

    source: Source
    wanted: Mapping[str, Sequence[Place]]
    there: ModelConfig

    def layouts(self, ours: ModelConfig) -> dict[Keys, Layout]:
        """The arrays that `pieces` fills."""
        return layouts(self.wanted, self.there, ours)

    def pieces(self, ours: ModelConfig) -> Iterator[Piece]:
        """Blocks of our parameters, in the order in which the source has them.

        Args:
          ours: the same layers; another period, and other pairs of a head's entries, are seen to.

        Raises:
          CheckpointError: a tensor that cannot be read, is of whole numbers or not finite.
        """
        source, dtypes = self.source, shapes_of(ours)
        for name, places in self.wanted.items():
            row, layer = places[0].row, places[0].layer
            itemsize = dtypes[places[0].path(ours)].dtype.itemsize
            for steps in row.blocks(self.there, layer, itemsize):
                found = source.rows(name, row.rows(self.there, layer, steps))
                if found.dtype.kind in "iub":
                    raise CheckpointError(
                        f"{source.where}: {name} holds {found.dtype} numbers; quantised weights are not read"
                    )
                if not np.isfinite(found).all():
                    raise CheckpointError(f"{source.where}: {name} holds values that are not finite")
                for place in places:
                    values = place.row.read(found, self.there, layer, len(steps))
                    values = repaired(values, place.row, layer, self.there, ours)
                    path = place.path(ours)
                    yield Piece(path, place.index(ours, steps), values.astype(dtypes[path].dtype, copy=False))


def open_reading(
    rows: Sequence[Row], there: ModelConfig, source: Source, names: Iterable[str], *, idle: Sequence[str] = ()
) -> Reading:
    """What is to be read of a source.

    Args:
      rows: the family's table.
      there: the model as the source has it.
      source: the tensors.
      names: those of them that count.
      idle: patterns of names that may be there and are not read.

    Raises:
      CheckpointError: tensors that are missing, not known or of another shape; all unknown ones are listed.
    """
    wanted, names, where = wanted_tensors(rows, there), set(names), source.where
    unknown = sorted(n for n in names - wanted.keys() if not any(re.fullmatch(pattern, n) for pattern in idle))
    if unknown:
        listed = ", ".join(unknown[:20]) + (f" and {len(unknown) - 20} more" if len(unknown) > 20 else "")
        raise CheckpointError(f"{where}: tensors that this model does not have: {listed}")
    if missing := sorted(wanted.keys() - names):
        raise CheckpointError(f"{where}: tensors are missing: {', '.join(missing[:20])}")
    for name, places in wanted.items():
        want, found = places[0].row.source_shape(there, places[0].layer), source.shape(name)
        if found != want:
            raise CheckpointError(f"{where}: {name} has shape {list(found)}, the config asks for {list(want)}")
    return Reading(source, wanted, there)


def without_tied_head(tensors: SafetensorsFolder, model: ModelConfig) -> Sequence[str]:
    """Names of the tensors; a tied model's output matrix, which some files hold a second time, is left out.

    Raises:
      CheckpointError: it is not the embedding. transformers 4 ties the two all the same, 5 uses both.
    """
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if model.output_head == "untied" or head not in tensors.names:
        return tensors.names
    if embedding in tensors.names and not _same(tensors, head, embedding):
        raise CheckpointError(
            f"{tensors.folder}: {head} is not {embedding}, as tie_word_embeddings of config.json says; "
            f"set that to false if both are trained, or remove {head}"
        )
    return [name for name in tensors.names if name != head]


def _same(tensors: SafetensorsFolder, one: str, other: str) -> bool:
    shape = tensors.shape(one)
    if shape != tensors.shape(other) or not shape:
        return False
    each = max(1, BLOCK_BYTES // (4 * math.prod(shape[1:]) or 1))
    cuts = (slice(at, min(at + each, shape[0])) for at in range(0, shape[0], each))
    return all(np.array_equal(tensors.rows(one, cut), tensors.rows(other, cut)) for cut in cuts)
