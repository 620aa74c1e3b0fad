"""Looking up rows of a table cut along both axes: the same numbers as `take`, and nothing big is sent."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from irope_jax.sharding.lookup import look_up
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from tests.topologies import described, gpu_mesh, targeting

B, T, V, D = 8, 32, 64, 16


@pytest.mark.parametrize(
    "mesh",
    [dict(data=1, fsdp=2, context=2, tensor=2), dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=8)],
    ids=["fsdp x context x tensor", "data x fsdp x tensor", "fsdp"],
)
def test_the_same_numbers_and_no_array_of_the_whole_batch_or_table(mesh):
    rng = np.random.default_rng(0)
    table_VD = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    tokens_BT = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights_BTD = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)

    def out_and_gradient(table_VD, tokens_BT, weights_BTD):
        out_BTD, pull = jax.vjp(lambda table: look_up(table, tokens_BT, jnp.float32), table_VD)
        return out_BTD, pull(weights_BTD)[0]

    devices = make_mesh(MeshConfig(**mesh))
    laid = lambda *spec: NamedSharding(devices, P(*spec))
    table, tokens = laid("tensor", ("fsdp", "context")), laid(("data", "fsdp"), "context")
    run = jax.jit(out_and_gradient, in_shardings=(table, tokens, tokens), out_shardings=(tokens, table))
    with jax.set_mesh(devices):
        compiled = run.lower(table_VD, tokens_BT, weights_BTD).compile()
        out_BTD, d_table_VD = run(table_VD, tokens_BT, weights_BTD)
    np.testing.assert_array_equal(out_BTD, np.asarray(table_VD)[tokens_BT])
    expected = np.zeros((V, D))
    np.add.at(expected, np.asarray(tokens_BT).ravel(), np.asarray(weights_BTD, np.float64).reshape(-1, D))
    np.testing.assert_allclose(d_table_VD, expected, atol=1e-5)
    sizes = devices.shape
    piece = B * T * D // (sizes["data"] * sizes["fsdp"] * sizes["context"])
    table_piece = V * D // (sizes["fsdp"] * sizes["context"] * sizes["tensor"])
    made = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())]
    assert max(made) == max(piece, table_piece)
    assert out_BTD.sharding.is_equivalent_to(tokens, 3)


def test_without_a_mesh_it_is_take():
    table_VD, tokens_BT = jnp.arange(12.0).reshape(4, 3), jnp.array([[3, 0]])
    out = look_up(table_VD, tokens_BT, jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(np.float32), [[[9, 10, 11], [0, 1, 2]]])


def test_on_gpus_a_single_token_gathers_no_table():
    """As in decoding one row: XLA:GPU makes a slice of a look-up of one token, and gathers a table that is cut."""
    mesh = gpu_mesh(tensor=8)

    def step(table_VD, token):
        return look_up(table_VD, token, jnp.bfloat16, "group_embed")

    with targeting(mesh):
        arguments = described(mesh, (8192, 1024), jnp.bfloat16, P("tensor")), described(mesh, (1, 1), jnp.int32)
        text = jax.jit(step).lower(*arguments).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text
