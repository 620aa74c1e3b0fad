"""Described accelerators for tests (`plan.targets`): skipped, saying why, where their compiler is not installed.

mesh = tpu_mesh("v5e:2x2", context=4)
with targeting(mesh):
    compiled = jax.jit(f).lower(described(mesh, shape, dtype, spec)).compile()
"""

from __future__ import annotations

import math

import jax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from irope_jax.plan.targets import TargetError, target_devices, target_mesh, targeting
from irope_jax.sharding.mesh import MeshConfig

__all__ = ["described", "gpu_mesh", "targeting", "tpu_mesh"]


def tpu_mesh(topology: str, **sizes: int) -> Mesh:
    """A mesh over the first chips of a TPU such as `v5e:2x2`; axes that are not named have size 1."""
    return _mesh(topology, sizes)


def gpu_mesh(**sizes: int) -> Mesh:
    """A mesh over the first of 8 H100 of one host."""
    return _mesh("h100:8", sizes)


def _mesh(target: str, sizes: dict[str, int]) -> Mesh:
    try:
        devices = target_devices(target)
    except TargetError as error:
        pytest.skip(str(error))
    return target_mesh(devices[: math.prod(sizes.values())], MeshConfig(**{"data": 1, **sizes}))


def described(mesh: Mesh, shape: tuple[int, ...], dtype, spec: P | None = None) -> jax.ShapeDtypeStruct:
    """An argument for `lower`: shape, type and where it lies (everywhere, without a `spec`)."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec or P()))
