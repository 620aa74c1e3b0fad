"""Figures of a job read from what a compiler made of it. Nothing is executed.

The split of memory: arguments are told apart by where they lie; what is kept for the backward pass is what the loop
over the forward layers stacks up, read from the program. FLOPs inside kernels are those that a kernel says of itself,
and for splash attention, which says none, the products of what is visible.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter

import jax
import jax.numpy as jnp

from irope_jax.plan.analytic import attention_flops, closed_form
from irope_jax.plan.compiled import (
    abstract_cache,
    abstract_state,
    abstract_weights,
    lower_decode,
    lower_prefill,
    lower_train_step,
)
from irope_jax.plan.hlo import HloCost, analyse
from irope_jax.plan.hlo.text import parse
from irope_jax.plan.job import Failure, Figures, Job
from irope_jax.plan.targets import target_devices, target_mesh, targeting
from irope_jax.train.optimizer import make_optimizer

_NEEDS = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def measure(job: Job, target: str) -> Figures | Failure:
    """Compiles the step of a job for a target.

    Raises:
      TargetError: the target cannot be described here.
      ConfigError: something does not divide by the mesh.
    """
    mesh = target_mesh(target_devices(target), job.mesh)
    with targeting(mesh):
        begin = time.perf_counter()
        lowered = lower(job, mesh)
        traced = time.perf_counter()
        try:
            compiled = lowered.compile()
        except Exception as error:  # the compiler's own words are the result
            return failure(str(error) or type(error).__name__)
        seconds = (traced - begin, time.perf_counter() - traced)
        held = held_bytes(job, mesh)
    return read(job, compiled, held, seconds)


def lower(job: Job, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The step of a job; under `targeting(mesh)`."""
    match job.mode:
        case "train":
            return lower_train_step(job.model, job.data, job.train, mesh)
        case "prefill":
            return lower_prefill(job.cached_model, job.cache, mesh, job.piece)
        case "decode":
            return lower_decode(job.cached_model, job.cache, mesh)


def failure(message: str) -> Failure:
    """One line of a compiler's message; of lacking memory, how much."""
    if found := _NEEDS.search(message):
        used, have = (float(found[i]) * _UNITS[found[i + 1].upper()] for i in (1, 3))
        why = f"needs {used / 1e9:.2f} GB of the {have / 1e9:.2f} GB that the compiler has on a chip"
        return Failure(why, used - have)
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return Failure(f"the compiler says: {line[:300]}")


def held_bytes(job: Job, mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Bytes on a device, and on its host, of what goes in and stays: `parameters`, `optimizer`, `cache`, `host`."""
    if job.mode != "train":
        weights, cache = abstract_weights(job.model, mesh), abstract_cache(job.cached_model, job.cache, mesh)
        return {"parameters": _here(weights)[0], "optimizer": 0, "cache": _here(cache)[0], "host": 0}
    state, _ = abstract_state(job.model, make_optimizer(job.train.optimizer, job.train.steps), mesh)
    (params, _), (moments, host), (averaged, _) = (_here(x) for x in (state.params, state.opt_state, state.averaged))
    return {"parameters": params, "optimizer": moments + averaged, "cache": 0, "host": host}


def _here(tree) -> tuple[int, int]:
    """Bytes on the device, on the host."""
    sizes = {"device": 0, "host": 0}
    for leaf in jax.tree.leaves(tree):
        kind = leaf.sharding.memory_kind or ""
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        sizes["host" if "host" in kind else "device"] += size
    return sizes["device"], sizes["host"]


def read(job: Job, compiled: jax.stages.Compiled, held: dict[str, int], seconds: tuple[float, float]) -> Figures:
    """The figures of a compiled step."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    cost, by_hand = analyse(text), closed_form(job)
    inside = kernel_flops(job, cost)
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    given = memory.argument_size_in_bytes
    # What is allocated at once. `temp_size_in_bytes` also counts buffers that share their place, up to half as much.
    total = max(memory.peak_memory_in_bytes, given + fresh)
    return Figures(
        parameters=held["parameters"],
        optimizer=held["optimizer"],
        cache=held["cache"],
        kept=kept_bytes(job, text) if job.mode == "train" else None,
        host=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        temporaries=total - given - fresh,
        total=total,
        flops=cost.matmul_flops_max + inside,
        kernel_flops=inside,
        host_traffic=by_hand.host_traffic,
        traffic=by_hand.traffic,
        sent=cost.collective_bytes,
        sent_by=dict(sorted(cost.bytes_by("layer").items())),
        seconds=seconds,
        unknown_trips=cost.unknown_trips,
    )


def kernel_flops(job: Job, cost: HloCost) -> float:
    """FLOPs inside kernels: their own counts, and for splash attention the products of visible pairs."""
    said = sum(kernel.flops * kernel.times for kernel in cost.kernels)
    silent = [kernel for kernel in cost.kernels if "splash" in kernel.scope and not kernel.flops]
    layers = Counter(kernel.layer for kernel in silent)
    found = float(said)
    for name in layers:
        phases = {kernel.phase for kernel in silent if kernel.layer == name}
        number = int(name.removeprefix("layer_") or 0)
        found += attention_flops(job, number, forward=1 + ("recomputed" in phases), backward=True, kernels=True)
    return found


def kept_bytes(job: Job, text: str) -> int | None:
    """What the loop over the forward layers stacks up, a slice a repeat; None if there is no such loop.

    Weights, which the loop carries too, are told apart by their shapes.
    """
    repeats = job.model.num_layers // len(job.model.period)
    if repeats == 1:
        return None
    program = parse(text)
    weights = set()
    for op in program.computations[program.entry].instructions.values():
        if op.opcode == "parameter":
            weights |= {_squeezed(array.shape) for array in op.arrays}
    most = None
    for computation in program.computations.values():
        for op in computation.instructions.values():
            if op.opcode != "while" or "transpose(" in op.scope or "jvp(" not in op.scope:
                continue
            stacked = [array for array in op.arrays if array.shape[:1] == (repeats,) and len(array.shape) > 2]
            stacked = [array for array in stacked if _squeezed(array.shape) not in weights]
            size = sum(array.bytes for array in stacked)
            most = size if most is None else max(most, size)
    return None if most is None else int(most)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size > 1)
