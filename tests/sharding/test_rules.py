import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.sharding.rules import ShardingError, constrain, spec, token_parts, tree_shardings


def boxed(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def test_names_become_mesh_axes():
    assert spec(("batch", "length", "heads", None)) == P(("data", "fsdp"), "context", "tensor", None)
    assert spec(("layers", "embed", "mlp")) == P(None, "fsdp", "tensor")


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
    assert caught.value.field == "mesh.tensor" and "a divisor of 12" in str(caught.value)


def test_boxed_leaves_follow_their_names_and_others_are_replicated():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    found = tree_shardings({"w": boxed((8, 4), "embed", "mlp"), "step": jax.ShapeDtypeStruct((), jnp.int32)}, mesh)
    assert found["w"].spec == P("fsdp", "tensor") and found["step"].spec == P()


def test_constrain_does_nothing_without_a_mesh_and_lays_out_within_one():
    x = jnp.zeros((8, 8, 4))
    assert constrain(x, "batch", "length", "features") is x
    assert token_parts() == (1, 1)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, context=2))):
        assert token_parts() == (4, 2)
        out = jax.jit(lambda x: constrain(x, "batch", "length", "features"))(x)
    assert out.sharding.shard_shape(x.shape) == (2, 4, 4)
