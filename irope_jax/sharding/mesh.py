"""The mesh of devices a run uses, as a config value, and its construction.

Which tensor goes along which axis is said in `rules.py`; nothing here knows about a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh

from irope_jax.core.config import ConfigError

AXES = ("data", "fsdp", "context", "expert", "tensor")
"""Mesh axes, outermost first: neighbours on `tensor` are neighbours in the hardware."""


@dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis. One axis may be -1: whatever is left.

    Attributes:
      data: copies of the model, each with its part of the batch.
      fsdp: parts of the batch; parameters and optimizer state are shared out over fsdp and context together.
      context: parts of the sequence; see fsdp.
      expert: parts of the batch that also share out the experts of a mixture.
      tensor: parts of heads, feed-forward width and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = self.sizes
        for axis, size in sizes.items():
            if size == 0 or size < -1:
                raise ConfigError(
                    axis, size, "a mesh axis is a positive number of devices, or -1 for all that are left"
                )
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ConfigError(free[1], -1, f"only one axis may be -1, and {free[0]} already is")

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    def fill(self, device_count: int) -> MeshConfig:
        """The same mesh with the free axis filled in.

        Raises:
          ConfigError: the axes do not multiply to the number of devices.
        """
        sizes = self.sizes
        fixed = math.prod(size for size in sizes.values() if size != -1)
        for axis, size in sizes.items():
            if size == -1:
                if device_count % fixed:
                    raise ConfigError(
                        axis,
                        size,
                        f"the other axes take {fixed} devices, which does not divide the {device_count} present",
                    )
                return replace(self, **{axis: device_count // fixed})
        if fixed != device_count:
            axis = max(sizes, key=sizes.get)
            raise ConfigError(
                axis,
                sizes[axis],
                f"the mesh takes {fixed} devices but {device_count} are present; set one axis to -1 to use them",
            )
        return self

    @property
    def batch_parts(self) -> int:
        """Into how many parts the batch is cut."""
        return self.data * self.fsdp * self.expert


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The `jax.sharding.Mesh` of a config over `devices` (all devices of all processes by default).

    Raises:
      ConfigError: as `arranged`.
    """
    devices = devices if devices is not None else jax.devices()
    return Mesh(arranged(config, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arranged(config: MeshConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the shape of a config, neighbours in the hardware where an axis asks for it.

    An axis of a TPU's torus is split where sizes ask for it, as 8 x 8 of 4 x 4 x 4, which `jax.make_mesh` refuses.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or these are TPUs of several slices.
    """
    devices = list(devices)
    config = config.fill(len(devices))
    # Of GPUs, machines count as slices.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices > 1:
        raise ConfigError("mesh", config.sizes, f"the devices are of {slices} slices; start a run on one of them")
    return create_device_mesh(tuple(config.sizes.values()), devices, allow_split_physical_axes=True)


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh of a filled-in config without its devices: enough to say where things would lie, on any machine.

    Raises:
      ConfigError: an axis is still free.
    """
    for axis, size in config.sizes.items():
        if size == -1:
            raise ConfigError(axis, size, "say how many devices there are: a described mesh has no free axis")
    return AbstractMesh(tuple(config.sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
