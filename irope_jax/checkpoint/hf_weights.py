"""Weights of a Hugging Face folder into our parameters, tensor by tensor: safetensors only, nothing is executed.

Names and axes are `hf_names`; here files are opened, checked and read into stacked arrays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irope_jax.checkpoint.hf_names import Row
from irope_jax.checkpoint.native import CheckpointError
from irope_jax.model.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
    """Tensors of a folder by name, read one at a time. Use it as a context manager.

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
    def names(self) -> list[str]:
        return list(self._places)

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._places[name]
        try:
            return self._file(file).get_tensor(name)
        except (self._safetensors.SafetensorError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.folder / file}: cannot read {name!r} ({error})") from None

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()


def read_params(
    rows: Sequence[Row],
    model: ModelConfig,
    names: Iterable[str],
    tensor: Callable[[str, Row], np.ndarray],
    *,
    idle: Sequence[str] = (),
    where: str | Path = "",
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Our parameters from a source's tensors; beside the result, one tensor is in memory at a time.

    Args:
      rows: the family's table.
      model: what is to be read; its period is one layer.
      names: tensors the source has.
      tensor: reads one by its name.
      idle: patterns of names that may be there and are not read.
      where: the source, for messages.
      advance: called after each tensor.

    Raises:
      CheckpointError: tensors that are missing, not known, of another shape, of whole numbers or not finite; all
        unknown ones are listed.
    """
    if len(model.period) != 1:
        raise CheckpointError(f"{where}: a period of {len(model.period)} layers; the table is of one kind of layer")
    rows = [row for row in rows if row.path != ("head",) or model.output_head == "untied"]
    layers = lambda row: range(model.num_layers) if row.per_layer else (0,)
    wanted = {row.name.format(i=i): (row, i) for row in rows for i in layers(row)}
    names = set(names)
    unknown = sorted(n for n in names - wanted.keys() if not any(re.fullmatch(pattern, n) for pattern in idle))
    if unknown:
        listed = ", ".join(unknown[:20]) + (f" and {len(unknown) - 20} more" if len(unknown) > 20 else "")
        raise CheckpointError(f"{where}: tensors that this model does not have: {listed}")
    if missing := sorted(wanted.keys() - names):
        raise CheckpointError(f"{where}: tensors are missing: {', '.join(missing[:20])}")
    dtype = np.dtype(model.precision.params) if model.precision.params != "bfloat16" else _bfloat16()
    params: dict[str, Any] = {}
    for name, (row, layer) in wanted.items():
        found = tensor(name, row)
        if found.shape != row.source_shape(model):
            want = row.source_shape(model)
            raise CheckpointError(f"{where}: {name} has shape {list(found.shape)}, the config asks for {list(want)}")
        if found.dtype.kind in "iub":
            raise CheckpointError(f"{where}: {name} holds {found.dtype} numbers; quantised weights are not read")
        if not np.isfinite(found.astype(np.float32, copy=False)).all():
            raise CheckpointError(f"{where}: {name} holds values that are not finite")
        ours = row.read(found, model)
        path = ("periods", "layer_0", *row.path) if row.per_layer else row.path
        *parents, leaf = path
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        if row.per_layer:
            if leaf not in node:
                node[leaf] = np.empty((model.num_layers, *ours.shape), dtype)
            node[leaf][layer] = ours
        else:
            node[leaf] = np.ascontiguousarray(ours.astype(dtype))
        advance()
    return params


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def without_tied_head(tensors: SafetensorsFolder, model: ModelConfig) -> list[str]:
    """Names of the tensors; a tied model's output matrix, which some files hold a second time, is left out.

    Raises:
      CheckpointError: it is not the embedding. transformers 4 ties the two all the same, 5 uses both.
    """
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if model.output_head == "untied" or head not in tensors.names:
        return tensors.names
    if embedding in tensors.names and not np.array_equal(tensors[head], tensors[embedding]):
        raise CheckpointError(
            f"{tensors.folder}: {head} is not {embedding}, as tie_word_embeddings of config.json says; "
            f"set that to false if both are trained, or remove {head}"
        )
    return [name for name in tensors.names if name != head]
