"""`irope show`: what a config resolves to, and where it would lie on how many devices. Nothing is allocated or run."""

from __future__ import annotations

import argparse
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from irope_jax.checkpoint.hf_families import FAMILIES
from irope_jax.checkpoint.hf_places import wanted_tensors
from irope_jax.context.layout import ContextLayout
from irope_jax.context.strategy import CallShape, Promises, decide, megabytes
from irope_jax.core.config import ConfigError, fingerprint, to_dict
from irope_jax.core.hosts import avoid_absent_tpu
from irope_jax.experiment import Experiment, check_devices, load_config, resolve
from irope_jax.model.cache import CacheSpec, cache_bytes, cache_shardings, empty_cache, fitting_capacity, row_bytes
from irope_jax.model.config import ModelConfig, draw_layers
from irope_jax.model.cost import active_parameters, parameter_counts, train_flops_per_token
from irope_jax.model.decodable import for_documents_of
from irope_jax.model.kept import layer_memory, share
from irope_jax.sharding.mesh import MeshConfig, abstract_mesh
from irope_jax.stages import stage_experiments
from irope_jax.train.optimizer import make_optimizer
from irope_jax.train.state import state_shardings


def show_verb(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    if args.devices is not None and args.devices < 1:
        raise ConfigError("--devices", args.devices, "the number of devices to lay the run out on; use 1 or more")
    avoid_absent_tpu()
    experiment = resolve(load_config(args.config), overrides)
    print(f"experiment {experiment.name}  fingerprint {fingerprint(experiment)}")
    for path, value in _leaves(to_dict(experiment), "config"):
        print(f"  {path} = {value!r}")
    counts = parameter_counts(experiment.model)
    print(f"\nlayers\n{draw_layers(experiment.model)}\n\nparameters")
    for part, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"  {part:<14}{count:>16,}")
    print(f"  {'total':<14}{sum(counts.values()):>16,}")
    active = active_parameters(experiment.model, counts)
    if active != sum(counts.values()):
        print(f"  {'for a token':<14}{active:>16,}")
    if named := names_in_hugging_face(experiment.model):
        print(f"  in Hugging Face files: {named[1]:,} tensors, named as in {named[0]}")
    print("\n" + "\n".join(training_lines(experiment, counts)))
    count = args.devices or _devices_asked_for(experiment.mesh)
    try:
        lines = layout_lines(experiment, count) + kept_lines(experiment, count)
    except ConfigError as error:
        if args.devices is not None:
            raise
        lines = [f"does not fit {_devices(count)}: {error}", "see it on another number of devices with --devices=N"]
    print("\n" + "\n".join(lines))
    if args.decode is not None:
        print("\n" + "\n".join(cache_lines(experiment, count, args.decode)))
    return 0


def training_lines(experiment: Experiment, counts: Mapping[str, int]) -> list[str]:
    """Tokens, steps and FLOPs, stage by stage where there are stages."""
    stages = stage_experiments(experiment)
    tokens = [one.train.steps * one.data.batch_size * one.data.seq_len for one in stages]
    flops = [train_flops_per_token(one.model, one.data.seq_len, counts) for one in stages]
    steps, total = sum(one.train.steps for one in stages), sum(map(operator.mul, flops, tokens))
    lines = [f"training: {sum(tokens):,} tokens in {steps:,} steps"]
    if not experiment.stages:
        return [*lines, f"  {flops[0]:.3g} FLOPs a token, {total:.3g} in all"]
    rows = [("stage", "length", "rows", "steps at most", "peak rate", "FLOPs a token", "gate")]
    for stage, one, each in zip(experiment.stages, stages, flops):
        conditions = () if stage.gate is None else stage.gate.conditions
        gate = ", ".join(condition.label for condition in conditions)
        figures = (f"{one.data.seq_len:,}", f"{one.data.batch_size:,}", f"{one.train.steps:,}")
        rows.append((stage.name, *figures, f"{one.train.optimizer.learning_rate:g}", f"{each:.3g}", gate))
    return [*lines, *_columns(rows, "lrrrrrl"), f"  {total:.3g} FLOPs in all"]


def names_in_hugging_face(model: ModelConfig) -> tuple[str, int] | None:
    """The first family that has a name for every parameter, and in how many tensors; None if there is none."""
    for name, family in FAMILIES.items():
        try:
            return name, len(wanted_tensors(family.tables[0], model))
        except ConfigError:
            continue
    return None


def layout_lines(experiment: Experiment, device_count: int) -> list[str]:
    """Where parameters, optimizer state and gradients lie on `device_count` devices, and how attention spans them.

    Raises:
      ConfigError: the mesh does not fit the devices, or something does not divide by it.
    """
    mesh = check_devices(experiment, device_count)
    optimizer = make_optimizer(experiment.train.optimizer, experiment.train.steps)
    try:
        abstract, shardings = state_shardings(experiment.model, optimizer, abstract_mesh(mesh))
    except ConfigError as error:
        raise error.within("config") from None
    leaves = list(zip(jax.tree_util.tree_leaves_with_path(abstract.params), jax.tree.leaves(shardings.params)))
    rows = [("parameter", "shape", "type", "cut along", "bytes a device")]
    for (path, leaf), sharding in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        here = _bytes_here(leaf.shape, leaf.dtype, sharding)
        rows.append((name, str(list(leaf.shape)), str(leaf.dtype), _cuts(sharding, mesh), f"{here:,}"))
    # Parts of a batch that follow one another are summed in float32; one part leaves gradients as the parameters are.
    summed = lambda dtype: jnp.float32 if experiment.train.accumulate > 1 else dtype
    trees = {
        "parameters": [(leaf.shape, leaf.dtype, sharding) for (_, leaf), sharding in leaves],
        "optimizer state": [
            (leaf.shape, leaf.dtype, sharding)
            for leaf, sharding in zip(jax.tree.leaves(abstract.opt_state), jax.tree.leaves(shardings.opt_state))
        ],
        "averaged weights": [
            (leaf.shape, leaf.dtype, sharding)
            for leaf, sharding in zip(jax.tree.leaves(abstract.averaged), jax.tree.leaves(shardings.averaged))
        ],
        "gradients": [(leaf.shape, summed(leaf.dtype), sharding) for (_, leaf), sharding in leaves],
    }
    totals = [("held", "bytes a device", "", "bytes in all", "")]
    here_all = whole_all = 0
    for name, tree in trees.items():
        if not tree:
            continue
        here = sum(_bytes_here(*leaf) for leaf in tree)
        whole = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype, _ in tree)
        totals.append((name, f"{here:,}", megabytes(here), f"{whole:,}", megabytes(whole)))
        here_all, whole_all = here_all + here, whole_all + whole
    totals.append(("together", f"{here_all:,}", megabytes(here_all), f"{whole_all:,}", megabytes(whole_all)))
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.sizes.items() if size > 1)
    lines = [f"on {_devices(device_count)}" + (f" = {sizes}" if sizes else "")]
    lines += [*_columns(rows, "llllr"), "", *_columns(totals, "lrrrr")]
    return lines + _attention_lines(experiment, mesh)


def kept_lines(experiment: Experiment, device_count: int) -> list[str]:
    """What the layers keep for their backward pass on one of `device_count` devices.

    Raises:
      ConfigError: as `layout_lines`.
    """
    mesh = check_devices(experiment, device_count)
    model, data = experiment.model.in_training(), experiment.data
    batch = data.batch_size // (experiment.train.accumulate * mesh.batch_parts)
    length, repeats = data.seq_len // mesh.context, model.num_layers // len(model.period)
    here = share(model, mesh)
    memories = {layer: layer_memory(here, layer, batch, length) for layer in here.period}  # equal layers once
    rows = [("layer", "tensor", "where", "bytes a device", "type and shape")]
    totals = {"device": 0, "host": 0}
    for i, layer in enumerate(here.period):
        memory = memories[layer]
        rows += [(str(i), kept.name, kept.where, f"{kept.bytes:,}", kept.shapes) for kept in memory.kept]
        rows += [(str(i), "computed again", "", "", ", ".join(memory.again))] if memory.again else []
        totals = {where: total + repeats * memory.bytes(where) for where, total in totals.items()}
    remat = model.remat if isinstance(model.remat, str) else "by name"
    of = f"{batch:,} row{'s' if batch > 1 else ''} of {length:,} tokens"
    title = f"kept for the backward pass of a layer, {of} on a device, remat {remat}"
    words = [f"{total:,} bytes on the {where} ({megabytes(total)})" for where, total in totals.items() if total]
    return ["", title, *_columns(rows, "lllrl"), f"  all {model.num_layers} layers: {' and '.join(words) or 'nothing'}"]


def cache_lines(experiment: Experiment, device_count: int, length: int) -> list[str]:
    """What a KV cache for rows of `length` tokens takes, by kind of layer, then in each format.

    Raises:
      ConfigError: no length, or a model that cannot be decoded.
    """
    if length < 1:
        raise ConfigError("--decode", length, "tokens of a row; use 1 or more")
    model, mesh = for_documents_of(experiment.model, length), experiment.mesh.fill(device_count)
    spec = lambda numbers, rows=1: CacheSpec(rows, fitting_capacity(length, mesh.context), numbers)
    title = f"KV cache of a row of {length:,} tokens, bfloat16"
    table = [("layers", "how many", "slots", "keys and values", "", "coordinates")]
    for kind in cache_bytes(model, spec("bfloat16")):
        sizes = (f"{kind.keys_values:,}", _gib(kind.keys_values), f"{kind.coordinates:,}")
        table.append((kind.name, f"{kind.layers:,}", f"{kind.slots:,}", *sizes))
    totals = [("numbers", "keys and values", "", "scales", "in all", "on a device")]
    for numbers in ("float32", "bfloat16", "int8", "int4"):
        kinds = cache_bytes(model, spec(numbers))
        vectors, scales = sum(kind.keys_values for kind in kinds), sum(kind.scales for kind in kinds)
        whole = sum(kind.total for kind in kinds) + row_bytes(spec(numbers))
        each = spec(numbers, mesh.batch_parts)  # a row for each part of the batch, so one on a device
        made = nn.meta.unbox(jax.eval_shape(lambda: empty_cache(model, each)))  # noqa: B023
        shardings = cache_shardings(model, each, abstract_mesh(mesh))
        leaves = zip(jax.tree.leaves(made), jax.tree.leaves(shardings), strict=True)
        here = sum(_bytes_here(leaf.shape, leaf.dtype, sharding) for leaf, sharding in leaves)
        totals.append((numbers, f"{vectors:,}", _gib(vectors), f"{scales:,}", f"{whole:,}", f"{here:,}"))
    return [title, *_columns(table, "lrrrrr"), "", *_columns(totals, "lrrrrr")]


def _gib(count: int) -> str:
    return f"{count / 2**30:,.3f} GiB"


def _devices_asked_for(mesh: MeshConfig) -> int:
    """As many as a mesh without a free axis takes, else those present."""
    sizes = mesh.sizes.values()
    return jax.device_count() if -1 in sizes else math.prod(sizes)


def _devices(count: int) -> str:
    return f"{count:,} device{'s' if count > 1 else ''}"


def _bytes_here(shape: Sequence[int], dtype: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(tuple(shape))) * jnp.dtype(dtype).itemsize


def _cuts(sharding: NamedSharding, mesh: MeshConfig) -> str:
    """The mesh axes that cut each axis of an array, `-` where none does; `whole` if every device has all of it."""
    entries = []
    for entry in sharding.spec:
        axes = [axis for axis in ((entry,) if isinstance(entry, str) else entry or ()) if mesh.sizes[axis] > 1]
        entries.append("+".join(axes) or "-")
    return ", ".join(entries) if set(entries) - {"-"} else "whole"


def _columns(rows: Iterable[Sequence[str]], sides: str) -> list[str]:
    """Rows of text as aligned columns, two spaces in; `sides` has `l` or `r` per column."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    align = lambda cell, side, width: cell.ljust(width) if side == "l" else cell.rjust(width)
    return ["  " + "  ".join(map(align, row, sides, widths)).rstrip() for row in rows]


def _attention_lines(experiment: Experiment, mesh: MeshConfig) -> list[str]:
    """What each layer of the period sends when the sequence is cut."""
    if mesh.context == 1:
        return []
    model, data = experiment.model, experiment.data
    config = model.context
    layout = ContextLayout(config.layout, mesh.context)
    shape = CallShape(
        parts=mesh.context,
        q_length=data.seq_len,
        k_length=data.seq_len,
        query_heads=model.num_heads // mesh.tensor,
        key_heads=model.num_kv_heads // mesh.tensor,
        width=model.head_dim,
        itemsize=jnp.dtype(model.precision.compute).itemsize,
        batch=data.batch_size // (experiment.train.accumulate * mesh.batch_parts),
    )
    promises = Promises(data.packing.document_multiple)
    lines = ["", f"attention of {data.seq_len:,} tokens over {mesh.context} devices, {config.layout}; sent by a device"]
    for i, layer in enumerate(model.period):
        try:
            decision = decide(layer.mask, shape, layout, promises, config)
        except ConfigError as error:
            raise ConfigError("config.data.seq_len", data.seq_len, error.fix) from None
        lines.append(f"  {i:>3}  {decision.describe()}")
        if decision.fell_back:
            lines.append(f"       because {decision.fell_back}")
    return lines


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{i}")
    else:
        yield path, value
