from types import SimpleNamespace

import jax
import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.sharding.mesh import AXES, MeshConfig, arranged, make_mesh
from tests.topologies import tpu_mesh


def test_the_free_axis_takes_what_is_left():
    assert MeshConfig(fsdp=2).fill(8).sizes == {"data": 4, "fsdp": 2, "context": 1, "expert": 1, "tensor": 1}
    assert MeshConfig(data=2, context=-1).fill(8).context == 4


@pytest.mark.parametrize(
    ("mesh", "devices", "field", "says"),
    [
        (dict(data=3), 8, "data", "8 are present"),
        (dict(data=-1, tensor=3), 8, "data", "does not divide the 8"),
        (dict(data=16), 8, "data", "set one axis to -1"),
    ],
)
def test_a_mesh_that_does_not_fit_names_the_axis(mesh, devices, field, says):
    with pytest.raises(ConfigError, match=says) as caught:
        MeshConfig(**mesh).fill(devices)
    assert caught.value.field == field


@pytest.mark.parametrize("mesh", [dict(data=0), dict(tensor=-2), dict(data=-1, fsdp=-1)])
def test_sizes_that_mean_nothing_are_refused(mesh):
    with pytest.raises(ConfigError):
        MeshConfig(**mesh)


def test_make_mesh_puts_every_device_on_it_once():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == AXES and dict(mesh.shape)["tensor"] == 2
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())


def test_an_axis_of_a_torus_is_split_where_sizes_ask_for_it():
    """8 x 8 of 4 x 4 x 4 chips: `tensor` spans blocks of 4 x 2 chips."""
    mesh = tpu_mesh("v5p:4x4x4", context=8, tensor=8)
    assert mesh.devices.shape == (1, 1, 8, 1, 8)
    spans = [np.ptp([device.coords for device in line], axis=0) for line in mesh.devices.reshape(8, 8)]
    assert {tuple(sorted(span.tolist())) for span in spans} == {(0, 1, 3)}


def test_tpus_of_several_slices_are_refused_and_gpus_of_several_machines_are_not():
    devices = lambda platform: [
        SimpleNamespace(platform=platform, device_kind=platform, slice_index=i, process_index=i, id=i) for i in (0, 1)
    ]
    with pytest.raises(ConfigError, match="of 2 slices"):
        make_mesh(MeshConfig(), devices("tpu"))
    assert arranged(MeshConfig(), devices("gpu")).shape == (2, 1, 1, 1, 1)
