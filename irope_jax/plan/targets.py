"""Accelerators that nobody here has, described to the compilers that know them.

    mesh = target_mesh("v5p:4x4x4", MeshConfig(data=1, context=64))
    with targeting(mesh):                     # tells the code which platform it is traced for
        compiled = lowered(...).compile()     # the chip's own compiler; nothing is executed

A TPU topology needs `libtpu` (extras `dev` and `tpu`), an NVIDIA one jax's CUDA plugin (extra `cuda`). What is compiled
for them, and what it says, is not known here.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from irope_jax.core.chips import CHIPS, TARGETS, Chip
from irope_jax.core.config import ConfigError
from irope_jax.sharding.mesh import MeshConfig, make_mesh


@dataclass(frozen=True)
class Board:
    """What XLA asks of a GPU (its `GpuTargetConfigProto`) beside what `core.chips` knows of it.

    Multiprocessors and clock are of NVIDIA's architecture papers (A100 80 GB, H100, H200, HGX B200, SXM boards); shared
    memory is of the table of technical specifications by compute capability in the CUDA C++ Programming Guide.
    """

    name: str
    cores: int
    fpus: int
    clock: float
    capability: int
    cache: int
    shared: int
    shared_block: int

    def proto(self, chip: Chip) -> str:
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.shared_block}
  core_count: {self.cores}  fpus_per_core: {self.fpus}  clock_rate_ghz: {self.clock}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)}  l2_cache_size: {self.cache}  device_memory_size: {int(chip.memory)}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {self.capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{self.name}"
"""


_MIB, _KIB = 2**20, 2**10
GPUS = {
    "a100": Board("NVIDIA A100-SXM4-80GB", 108, 64, 1.41, 8, 40 * _MIB, 164 * _KIB, 163 * _KIB),
    "h100": Board("NVIDIA H100 80GB HBM3", 132, 128, 1.98, 9, 50 * _MIB, 228 * _KIB, 227 * _KIB),
    "h200": Board("NVIDIA H200", 132, 128, 1.98, 9, 50 * _MIB, 228 * _KIB, 227 * _KIB),
    "b200": Board("NVIDIA B200", 148, 128, 1.96, 10, 126 * _MIB, 228 * _KIB, 227 * _KIB),
}

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # else libtpu asks the network what machine this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # and takes a lock on chips that are not there
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}


class TargetError(ConfigError):
    """A target that cannot be described on this machine; says what is missing."""


def target_devices(target: str) -> list[jax.Device]:
    """Devices of a described target, which can be compiled for and never run on.

    Args:
      target: a TPU topology such as `v5e:2x2`, `v5p:4x4x4`, `v6e:8x8`; a GPU's name and how many of one host, such as
        `h100:8`; or `cpu:8`, simulated devices, of which jax must have been started with as many (`simulate`).

    Raises:
      TargetError: an unknown target, or its compiler is not installed.
    """
    name, colon, shape = target.partition(":")
    if not colon or not shape:
        raise TargetError("target", target, "give a chip and a topology, such as v5p:4x4x4 or h100:8")
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if name == "cpu":
        if not shape.isdecimal() or not int(shape):
            raise TargetError("target", target, "give the number of simulated devices, such as cpu:8")
        devices = jax.devices("cpu")
        if len(devices) < int(shape):
            raise TargetError("target", target, f"jax was started with {len(devices)} CPU devices; ask for no more")
        return devices[: int(shape)]
    if name.lower() in GPUS:
        if importlib.util.find_spec("jax_plugins") is None or not importlib.util.find_spec("jax_plugins.xla_cuda12"):
            fix = "needs jax's CUDA plugin; install the `cuda` extra: pip install 'irope-jax[cuda]'"
            raise TargetError("target", target, fix)
        if not shape.isdecimal():
            raise TargetError("target", target, "give the number of GPUs in one host, such as h100:8")
        options = {"topology": f"1x1x{shape}", "target_config": GPUS[name.lower()].proto(CHIPS[TARGETS[name.lower()]])}
        return list(topologies.get_topology_desc("", "cuda", **options).devices)
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        where = f"{platform.system()} on {platform.machine()}"
        raise TargetError("target", target, f"libtpu exists for Linux on x86-64, not for {where}")
    if importlib.util.find_spec("libtpu") is None:
        raise TargetError("target", target, "needs libtpu; install the `dev` or `tpu` extra")
    try:
        return list(topologies.get_topology_desc(target, "tpu").devices)
    except Exception as error:  # whatever libtpu throws at a name that it does not know
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TargetError("target", target, f"libtpu does not know this topology ({reason})") from None


def simulate(targets: Sequence[str]) -> None:
    """Start jax with as many CPU devices as the largest `cpu:N` asks for; before anything else asks for devices."""
    counts = [
        int(shape)
        for name, _, shape in (target.partition(":") for target in targets)
        if name == "cpu" and shape.isdecimal()
    ]
    if counts and max(counts):
        with suppress(RuntimeError):  # jax has started already: `target_devices` says how many there are
            jax.config.update("jax_num_cpu_devices", max(counts))


def target_mesh(target: str | Sequence[jax.Device], config: MeshConfig) -> Mesh:
    """The mesh of a config over a described target.

    Raises:
      TargetError: as `target_devices`.
      ConfigError: the axes do not multiply to the number of devices.
    """
    return make_mesh(config, target_devices(target) if isinstance(target, str) else target)


@contextmanager
def targeting(mesh: Mesh) -> Iterator[Mesh]:
    """`jax.set_mesh`, and what is compiled meanwhile is not kept: such programs cannot be read back from a cache."""
    key = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, key)
    jax.config.update(key, float("inf"))
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        jax.config.update(key, before)
