"""Bytes and FLOPs read from programs that the TPU compiler wrote for chips that are only described.

Unlike XLA:CPU it sends bfloat16 as bfloat16, notes no trip counts, starts transfers before products and waits after
them, and merges and splits collectives. Closed forms decide.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from irope_jax.plan import hlo
from tests.topologies import described, tpu_mesh

N = 4
BLOCK = 256 * 128 * 2  # bytes of one device's [256, 128] bfloat16 piece
AROUND = [(i, (i + 1) % N) for i in range(N)]


@pytest.fixture(scope="module", autouse=True)
def uncached():
    """Programs for described chips can be written to the compile cache but not read back: do not write them."""
    name = "jax_persistent_cache_min_compile_time_secs"
    seconds = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, seconds)


@pytest.fixture(scope="module")
def mesh():
    return tpu_mesh("v5p:2x2x1", context=N)


def cost_of(mesh, function, *args, **options):
    with jax.set_mesh(mesh):
        return hlo.analyse(jax.jit(function, **options).lower(*args).compile().as_text())


def per_device(mesh, function, in_specs, out_specs):
    return partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(function)


PIECES = P("context")


@pytest.mark.parametrize(
    ("collective", "in_spec", "out_spec", "kind", "sent"),
    [
        (lambda a: lax.psum(a, "context"), PIECES, P(), "all-reduce", 2 * BLOCK * 3 / 4),
        (lambda a: lax.all_gather(a, "context"), PIECES, P(), "all-gather", 3 * BLOCK),
        (lambda a: lax.psum_scatter(a, "context", tiled=True), P(), PIECES, "reduce-scatter", 3 * BLOCK),
        (
            lambda a: lax.all_to_all(a, "context", 1, 0, tiled=True),
            PIECES,
            P(None, "context"),
            "all-to-all",
            BLOCK * 3 / 4,
        ),
        (
            lambda a: lax.ppermute(a, "context", [(0, 1), (1, 2), (3, 3)]),
            PIECES,
            PIECES,
            "collective-permute",
            BLOCK * 2 / 4,
        ),
    ],
    ids=["psum", "all_gather", "psum_scatter", "all_to_all", "ppermute"],
)
def test_bytes_sent_in_bfloat16(mesh, collective, in_spec, out_spec, kind, sent):
    x = described(mesh, (256 * N, 128), jnp.bfloat16, in_spec)
    cost = cost_of(mesh, per_device(mesh, collective, in_spec, out_spec), x)
    assert cost.collective_bytes == {kind: sent}


def ring(a_SD, w_DD):
    def hop(carry, _):
        travelling, out = carry
        with jax.named_scope("layer_1"):
            return (lax.ppermute(travelling, "context", AROUND), jnp.tanh(out + travelling @ w_DD)), None

    return lax.scan(hop, (a_SD, a_SD), None, length=N - 1)[0][1]


def test_a_ring_and_its_gradient(mesh):
    """Rounds are read from start, step and bound; the last round's transfer is unused but in the loop."""
    args = (described(mesh, (256 * N, 128), jnp.bfloat16, PIECES), described(mesh, (128, 128), jnp.bfloat16))
    forward = cost_of(mesh, per_device(mesh, ring, (PIECES, P()), PIECES), *args)
    one = 2 * 256 * 128 * 128
    assert forward.unknown_trips == 0
    assert forward.bytes_by("layer", "kind") == {("layer_1", "collective-permute"): 3 * BLOCK}
    assert forward.matmul_flops_max == forward.matmul_flops_min == 3 * one

    both = cost_of(mesh, per_device(mesh, jax.grad(lambda a, w: ring(a, w).sum()), (PIECES, P()), PIECES), *args)
    assert both.bytes_by("layer", "phase") == {("layer_1", "forward"): 3 * BLOCK, ("layer_1", "backward"): 3 * BLOCK}
    assert both.flops_by("phase") == {"forward": 3 * one, "backward": 3 * one}


def test_loops_within_loops(mesh):
    """A ring per layer in a scan over layers."""

    def layers(a_SD, w_DD):
        return lax.scan(lambda a, _: (ring(a, w_DD), None), a_SD, None, length=5)[0]

    args = (described(mesh, (256 * N, 128), jnp.bfloat16, PIECES), described(mesh, (128, 128), jnp.bfloat16))
    cost = cost_of(mesh, per_device(mesh, layers, (PIECES, P()), PIECES), *args)
    assert (cost.unknown_trips, cost.total_bytes) == (0, 5 * 3 * BLOCK)
    assert cost.matmul_flops_max == 5 * 3 * 2 * 256 * 128 * 128


def test_kernels_are_listed_with_how_often_they_run(mesh):
    """Their FLOPs are unknown, so they are in no total."""

    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2 + jnp.dot(x_ref[...], x_ref[...], preferred_element_type=jnp.float32)

    def run(x):
        kernel = pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))
        with jax.named_scope("layer_2"):
            return lax.scan(lambda c, _: (kernel(c), None), x, None, length=6)[0]

    x = described(mesh, (128 * N, 128), jnp.float32, PIECES)
    cost = cost_of(mesh, per_device(mesh, run, PIECES, PIECES), x)
    assert cost.opaque_calls == {"tpu_custom_call": 6} and cost.matmul_flops_max == 0
    assert [(k.layer, k.times) for k in cost.kernels] == [("layer_2", 6)]


def test_a_sharded_stack_of_layers_and_its_gradient():
    """The compiler spreads gathers over the products beside them and scatters sums; each is counted once."""
    mesh = tpu_mesh("v5e:2x4", fsdp=2, tensor=4)
    width, hidden, tokens, layers = 2048, 8192, 4096, 6

    def loss(weights, x_TD):
        def layer(x_TD, w):
            up_DF, down_FD = w
            x_TD = lax.with_sharding_constraint(x_TD, NamedSharding(mesh, P("fsdp", None)))
            return x_TD + jax.nn.relu(x_TD @ up_DF) @ down_FD, None

        return (lax.scan(jax.checkpoint(layer), x_TD, weights)[0].astype(jnp.float32) ** 2).mean()

    weights = (
        described(mesh, (layers, width, hidden), jnp.bfloat16, P(None, "fsdp", "tensor")),
        described(mesh, (layers, hidden, width), jnp.bfloat16, P(None, "tensor", "fsdp")),
    )
    x = described(mesh, (2 * tokens, width), jnp.bfloat16, P("fsdp"))
    cost = cost_of(mesh, jax.grad(loss), weights, x, out_shardings=jax.tree.map(lambda w: w.sharding, weights))
    piece = width * hidden * 2 // 8  # bytes of a weight that a device keeps
    activations = tokens * width * 2
    product = 2 * tokens * width * hidden // 4
    assert cost.unknown_trips == 0 and cost.opaque_calls == {}
    # Gathered over fsdp forward and again backward; gradients summed and scattered; two sums over tensor a layer.
    assert cost.collective_bytes == {
        "all-gather": layers * 4 * piece,
        "reduce-scatter": layers * 2 * piece,
        "all-reduce": layers * 2 * (2 * activations * 3 // 4),
    }
    assert cost.flops_by("phase") == {
        "forward": layers * 2 * product,
        "recomputed": layers * product,
        "backward": layers * 4 * product,
    }
