"""Accelerators that are only described: compile for them here, run nothing.

    mesh = tpu_mesh("v5e:2x2", context=4)
    with targeting(mesh):                       # tells the code which platform it is traced for
        compiled = jax.jit(f).lower(described(mesh, shape, dtype, spec)).compile()

A test that asks for a mesh is skipped, saying why, where the compiler for it is not installed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
from contextlib import contextmanager

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from irope_jax.sharding.mesh import AXES

# libtpu looks for a machine to ask about its chips, and for a lock that says nobody else uses them; here are none.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def tpu_mesh(topology: str, **sizes: int) -> Mesh:
    """A mesh over the first chips of a TPU that is only described, for instance `v5e:2x2` or `v5p:4x4x4`.

    Args:
      sizes: devices per mesh axis; axes of `sharding.AXES` that are not named have size 1.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip(f"libtpu exists for Linux on x86-64, not for {platform.system()} on {platform.machine()}")
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; the `dev` and `tpu` extras bring it")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    assert set(sizes) <= set(AXES) and math.prod(shape) <= len(devices), (sizes, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: math.prod(shape)])


@contextmanager
def targeting(mesh: Mesh):
    """`jax.set_mesh`, and what is compiled meanwhile is not kept: such programs cannot be read back from a cache."""
    key = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, key)
    jax.config.update(key, float("inf"))
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        jax.config.update(key, before)


def described(mesh: Mesh, shape: tuple[int, ...], dtype, spec: P | None = None) -> jax.ShapeDtypeStruct:
    """An argument for `lower`: shape, type and where it lies (everywhere, without a `spec`)."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec or P()))
