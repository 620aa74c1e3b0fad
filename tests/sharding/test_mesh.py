import jax
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.sharding.mesh import AXES, MeshConfig, make_mesh


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
