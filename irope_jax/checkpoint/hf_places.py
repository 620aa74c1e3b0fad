"""Where the tensors of a file lie among our parameters: the tables of `hf_names` applied to a model.

Belongs here: what reading and writing share. Two configs meet: `there` is the model as the file has it, `ours` the same
layers as our parameters are stacked, perhaps with another period or with the entries of a head paired another way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from irope_jax.checkpoint.hf_names import Row
from irope_jax.checkpoint.streams import Keys, Layout
from irope_jax.core.config import ConfigError
from irope_jax.model.config import ModelConfig
from irope_jax.model.cost import abstract_params
from irope_jax.position import encoding
from irope_jax.position.rope import Pairing


class Place(NamedTuple):
    """What of a tensor goes where: the row of the table, the layer, the expert (0 where there is none)."""

    row: Row
    layer: int
    expert: int

    def path(self, ours: ModelConfig) -> Keys:
        """The parameter."""
        return _path(self.row, self.layer, len(ours.period))

    def index(self, ours: ModelConfig, steps: range) -> tuple[int | slice, ...]:
        """Where steps of the tensor's outermost axis lie in the stacked parameter."""
        repeat = (self.layer // len(ours.period),) if self.row.per_layer else ()
        expert = (self.expert,) if self.row.per_expert else ()
        return (*repeat, *expert, *self.row.index(steps))


def wanted_tensors(rows: Sequence[Row], model: ModelConfig) -> dict[str, list[Place]]:
    """Tensors of a model by name, each with the places it fills.

    Raises:
      ConfigError: a parameter for which the table has no name.
    """
    abstract, period = shapes_of(model), len(model.period)
    wanted: dict[str, list[Place]] = {}
    named = set()
    for row in rows:
        for layer in range(model.num_layers) if row.per_layer else (0,):
            path = _path(row, layer, period)
            leaf = abstract.get(path)
            if leaf is None or len(leaf.shape) - row.per_layer != row.axes_of_ours:
                continue
            named.add(path)
            for expert in range(model.layers[layer].ffn.num_experts) if row.per_expert else (0,):
                wanted.setdefault(row.name.format(i=layer, e=expert), []).append(Place(row, layer, expert))
    for path in abstract:
        if path not in named:
            raise ConfigError("model", "/".join(path), "the format has no place for this parameter")
    return wanted


def layout_of(tables: Sequence[Sequence[Row]], model: ModelConfig, names: Iterable[str]) -> Sequence[Row]:
    """The table by which a source has most of its tensors: experts in one tensor, or one by one."""
    there = set(names)
    return max(tables, key=lambda rows: len(there & wanted_tensors(rows, model).keys()))


def layouts(wanted: Mapping[str, Sequence[Place]], there: ModelConfig, ours: ModelConfig) -> dict[Keys, Layout]:
    """How our parameters are to be stored if they come by these tensors: in the blocks in which those are read."""
    found: dict[Keys, Layout] = {}
    shapes = shapes_of(ours)
    for places in wanted.values():
        for place in places:
            path, row, layer = place.path(ours), place.row, place.layer
            if path not in found:
                whole = shapes[path]
                steps = row.block_steps(there, layer, whole.dtype.itemsize)
                block = row.our_shape(there, layer, steps)
                chunk = (1,) * (len(whole.shape) - len(block)) + block
                found[path] = Layout(whole.shape, np.dtype(whole.dtype), chunk)
    return found


@lru_cache(maxsize=8)
def shapes_of(model: ModelConfig) -> dict[Keys, jax.ShapeDtypeStruct]:
    """A model's parameters as shapes, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(abstract_params(model)))
    return {tuple(key.key for key in keys): leaf for keys, leaf in leaves}


def repaired(values: np.ndarray, row: Row, layer: int, has: ModelConfig, wants: ModelConfig) -> np.ndarray:
    """A block of our parameter, entries of heads in the order in which `wants` pairs them in this layer.

    A layer that does not rotate, or rotates in both alike, is as it was: `q · k` does not depend on the order.
    """
    old, new = pairing_of(has, layer), pairing_of(wants, layer)
    if not row.rotated or old is None or new is None or old == new:
        return values
    order = np.arange(has.head_dim)
    order = order.reshape(2, -1).T if new == "interleaved" else order.reshape(-1, 2).T
    return np.take(values, order.reshape(-1), axis=values.ndim - len(row.ours) + row.ours.index("H"))


def pairing_of(model: ModelConfig, layer: int) -> Pairing | None:
    """How a layer pairs the entries of a head; None where it does not rotate."""
    rotation = encoding.rotation(model.layers[layer].position)
    return None if rotation is None else rotation.pairing


def _path(row: Row, layer: int, period: int) -> Keys:
    return ("periods", f"layer_{layer % period}", *row.path) if row.per_layer else row.path
