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
    return _mesh(topologies.get_topology_desc(topology, "tpu").devices, sizes)


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 85029158912
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What the compiler asks of a GPU (XLA's `GpuTargetConfigProto`), with the numbers of the SXM board's data sheet."""


def gpu_mesh(**sizes: int) -> Mesh:
    """A mesh over the first of 8 H100 of one host that are only described; sizes as for `tpu_mesh`."""
    plugin = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda12")
    if not plugin:
        pytest.skip("jax's CUDA plugin is not installed; the `cuda` extra brings it")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    options = {"topology": "1x1x8", "target_config": H100}  # partitions x hosts x devices of a host
    return _mesh(topologies.get_topology_desc("", "cuda", **options).devices, sizes)


def _mesh(devices, sizes: dict[str, int]) -> Mesh:
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
