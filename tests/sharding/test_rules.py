import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from irope_jax.core.config import ConfigError
from irope_jax.sharding.mesh import AXES, MeshConfig, abstract_mesh, make_mesh
from irope_jax.sharding.rules import ShardingError, check_divides, constrain, spec, token_parts, tree_shardings


def boxed(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def test_names_become_mesh_axes():
    assert spec(("batch", "length", "heads", None)) == P(("data", "fsdp", "expert"), "context", "tensor", None)
    assert spec(("layers", "embed", "mlp")) == P(None, ("fsdp", "context"), "tensor")


def test_two_axes_on_one_mesh_axis_collide():
    with pytest.raises(ShardingError, match="'heads' and 'mlp' both go to mesh axis 'tensor'"):
        spec(("heads", "mlp"))


def test_an_unknown_name_is_an_error_and_not_replication():
    with pytest.raises(ShardingError, match="sharding rules"):
        spec(("batch", "sequnce"))


def test_a_shape_that_does_not_divide_names_parameter_axis_and_fix():
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    with pytest.raises(ShardingError, match="'mlp' of size 12 of feed_forward/up") as caught:
        tree_shardings({"feed_forward": {"up": boxed((16, 12), "embed", "mlp")}}, mesh)
    assert (caught.value.field, caught.value.value) == ("mesh.tensor", 8)
    assert "use 6, or another divisor of 12" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size", "devices", "field", "usable"),
    [
        ("kv_heads", 2, dict(tensor=4), "mesh.tensor", 2),  # more parts than key heads
        ("heads", 40, dict(tensor=16), "mesh.tensor", 10),
        ("vocab", 303, dict(tensor=2), "mesh.tensor", 1),
        ("embed", 48, dict(fsdp=32), "mesh.fsdp", 24),
        ("expert", 6, dict(expert=4), "mesh.expert", 3),
        ("length", 100, dict(context=8), "mesh.context", 5),
        ("batch", 12, dict(data=8, fsdp=2), "mesh.data", 6),
        ("batch", 12, dict(data=4, fsdp=2), "mesh.fsdp", 1),  # data has taken its share
    ],
)
def test_the_size_that_is_named_would_do(name, size, devices, field, usable):
    devices = dict.fromkeys(AXES, 1) | devices
    with pytest.raises(ShardingError, match=f"use {usable}, or") as caught:
        check_divides(name, size, devices, "something")
    assert caught.value.field == field
    check_divides(name, size, devices | {field.removeprefix("mesh."): usable}, "something")


@pytest.mark.parametrize(("name", "size"), [("heads", 16), ("batch", 64), ("features", 7), (None, 7), ("layers", 5)])
def test_what_divides_or_is_never_cut_passes(name, size):
    check_divides(name, size, dict(data=4, fsdp=8, context=2, expert=2, tensor=16), "something")


def test_a_described_mesh_says_where_things_would_lie():
    """As many devices as one likes; the same layout as on real ones."""
    tree = {"w": boxed((64, 128), "embed", "mlp")}
    described = tree_shardings(tree, abstract_mesh(MeshConfig(data=16, fsdp=32, tensor=64)))["w"]
    assert described.spec == P(("fsdp", "context"), "tensor") and described.shard_shape((64, 128)) == (2, 2)
    config = MeshConfig(data=1, fsdp=4, tensor=2)
    real = tree_shardings(tree, make_mesh(config))["w"]
    assert tree_shardings(tree, abstract_mesh(config))["w"].shard_shape((64, 128)) == real.shard_shape((64, 128))
    with pytest.raises(ConfigError, match="how many devices"):
        abstract_mesh(MeshConfig())


def test_boxed_leaves_follow_their_names_and_others_are_replicated():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    found = tree_shardings({"w": boxed((8, 4), "embed", "mlp"), "step": jax.ShapeDtypeStruct((), jnp.int32)}, mesh)
    assert found["w"].spec == P(("fsdp", "context"), "tensor") and found["step"].spec == P()


def test_constrain_does_nothing_without_a_mesh_and_lays_out_within_one():
    x = jnp.zeros((8, 8, 4))
    assert constrain(x, "batch", "length", "features") is x
    assert token_parts() == (1, 1)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, context=2))):
        assert token_parts() == (4, 2)
        out = jax.jit(lambda x: constrain(x, "batch", "length", "features"))(x)
    assert out.sharding.shard_shape(x.shape) == (2, 4, 4)
