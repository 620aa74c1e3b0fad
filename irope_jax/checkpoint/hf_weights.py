"""Weights of a Hugging Face folder into our parameters, tensor by tensor: safetensors only, nothing is executed.

Names and axes are `hf_names`; here files are opened, checked and read into stacked arrays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from irope_jax.checkpoint.hf_names import Row
from irope_jax.checkpoint.native import CheckpointError
from irope_jax.core.config import ConfigError
from irope_jax.model.config import ModelConfig
from irope_jax.model.cost import abstract_params

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OTHER_PARTS = ("vision_model.", "multi_modal_projector.", "model.vision_model.", "model.multi_modal_projector.")
"""Of models that also see; only their text part is read."""


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
        self._prefixed: dict[str, str] = {}
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

    def text_only(self) -> None:
        """Of a model that also sees: forget the other parts, and the prefix that names of the text part have."""
        text = {}
        for name in self._places:
            if name.startswith(OTHER_PARTS):
                continue
            text[re.sub(r"^(model\.)?language_model\.", r"\1" if name.startswith("model.") else "", name)] = name
        self._prefixed, self._places = text, {short: self._places[name] for short, name in text.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._places[name]
        try:
            return self._file(file).get_tensor(self._prefixed.get(name, name))
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
      model: what is to be read.
      names: tensors the source has.
      tensor: reads one by its name.
      idle: patterns of names that may be there and are not read.
      where: the source, for messages.
      advance: called after each tensor.

    Raises:
      CheckpointError: tensors that are missing, not known, of another shape, of whole numbers or not finite; all
        unknown ones are listed.
    """
    wanted = wanted_tensors(rows, model)
    names = set(names)
    unknown = sorted(n for n in names - wanted.keys() if not any(re.fullmatch(pattern, n) for pattern in idle))
    if unknown:
        listed = ", ".join(unknown[:20]) + (f" and {len(unknown) - 20} more" if len(unknown) > 20 else "")
        raise CheckpointError(f"{where}: tensors that this model does not have: {listed}")
    if missing := sorted(wanted.keys() - names):
        raise CheckpointError(f"{where}: tensors are missing: {', '.join(missing[:20])}")
    dtype = np.dtype(model.precision.params) if model.precision.params != "bfloat16" else _bfloat16()
    abstract, period, params = _abstract(model), len(model.period), {}
    for name, places in wanted.items():
        row, layer = places[0].row, places[0].layer
        found = tensor(name, row)
        if found.shape != row.source_shape(model, layer):
            want = row.source_shape(model, layer)
            raise CheckpointError(f"{where}: {name} has shape {list(found.shape)}, the config asks for {list(want)}")
        if found.dtype.kind in "iub":
            raise CheckpointError(f"{where}: {name} holds {found.dtype} numbers; quantised weights are not read")
        if not np.isfinite(found.astype(np.float32, copy=False)).all():
            raise CheckpointError(f"{where}: {name} holds values that are not finite")
        for row, layer, expert in places:
            *parents, leaf = path = _path(row, layer, period)
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            if leaf not in node:
                node[leaf] = np.empty(_at(abstract, path).shape, dtype)
            place = ((layer // period,) if row.per_layer else ()) + ((expert,) if row.per_expert else ())
            node[leaf][place or ...] = row.read(found, model, layer)
        advance()
    return params


class Place(NamedTuple):
    """What of a tensor goes where: the row of the table, the layer, the expert (0 where there is none)."""

    row: Row
    layer: int
    expert: int


def wanted_tensors(rows: Sequence[Row], model: ModelConfig) -> dict[str, list[Place]]:
    """Tensors of a model by name, each with the places it fills.

    Raises:
      ConfigError: a parameter for which the table has no name.
    """
    abstract, period = _abstract(model), len(model.period)
    wanted: dict[str, list[Place]] = {}
    named = set()
    for row in rows:
        for layer in range(model.num_layers) if row.per_layer else (0,):
            path = _path(row, layer, period)
            leaf = _at(abstract, path)
            if leaf is None or len(leaf.shape) - row.per_layer != row.axes_of_ours:
                continue
            named.add(path)
            for expert in range(model.layers[layer].ffn.num_experts) if row.per_expert else (0,):
                wanted.setdefault(row.name.format(i=layer, e=expert), []).append(Place(row, layer, expert))
    for keys, _ in jax.tree_util.tree_leaves_with_path(abstract):
        if (path := tuple(key.key for key in keys)) not in named:
            raise ConfigError("model", "/".join(path), "the format has no place for this parameter")
    return wanted


def layout_of(tables: Sequence[Sequence[Row]], model: ModelConfig, names: Iterable[str]) -> Sequence[Row]:
    """The table by which a source has most of its tensors: experts in one tensor, or one by one."""
    there = set(names)
    return max(tables, key=lambda rows: len(there & wanted_tensors(rows, model).keys()))


@lru_cache(maxsize=8)
def _abstract(model: ModelConfig) -> Any:
    """Shapes of a model's parameters; cached, for tracing a deep period takes a second."""
    return nn.meta.unbox(abstract_params(model))


def _path(row: Row, layer: int, period: int) -> tuple[str, ...]:
    return ("periods", f"layer_{layer % period}", *row.path) if row.per_layer else row.path


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


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
