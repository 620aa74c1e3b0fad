"""Costs read from programs compiled here, against closed forms. Hand-written forms are in `test_hlo_forms.py`."""

import re
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from irope_jax.plan import hlo

DEVICES = 8


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def text(function, *args):
    return compiled(function, *args).as_text()


def over_devices(function, in_specs, out_specs):
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("x",))
    return partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(function)


def scanned(x, w, rounds):
    return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=rounds)[0]


ONE = 2 * 64 * 48 * 48  # a [64, 48] by [48, 48] product


@pytest.mark.parametrize(
    "equation, a, b, macs",
    [
        ("ij,jk->ik", (17, 33), (33, 29), 17 * 33 * 29),
        ("ji,jk->ik", (33, 17), (33, 29), 17 * 33 * 29),
        ("ij,kj->ki", (17, 33), (29, 33), 17 * 33 * 29),
        ("bij,bkj->bik", (3, 17, 33), (3, 29, 33), 3 * 17 * 33 * 29),
        ("btkgh,bskh->bkgts", (2, 5, 3, 4, 16), (2, 7, 3, 16), 2 * 5 * 3 * 4 * 16 * 7),
        ("btd,dv->btv", (2, 5, 16), (16, 31), 2 * 5 * 16 * 31),
        ("ij,j->i", (333, 257), (257,), 333 * 257),
        ("bkgh,bskh->bkgs", (2, 3, 4, 16), (2, 9, 3, 16), 2 * 3 * 4 * 16 * 9),
        ("ij,jk->ik", (512, 256), (256, 512), 512 * 512 * 256),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_product_however_the_compiler_writes_it(equation, a, b, macs, dtype):
    def product(a, b):
        return jax.nn.relu(jnp.einsum(equation, a, b) + 1)

    program = text(product, shape(*a, dtype=dtype), shape(*b, dtype=dtype))
    assert hlo.matmul_flops(program) == 2 * macs


def test_an_inner_product_of_vectors_is_not_a_matrix_product():
    """Known limit: the compiler writes it as multiply and reduce."""
    assert hlo.matmul_flops(text(lambda a, b: a @ b, shape(257), shape(257))) == 0


@pytest.mark.parametrize(
    "strides, padding, lhs_dilation, rhs_dilation, groups",
    [
        ((1, 1), "SAME", None, None, 1),
        ((2, 3), "VALID", None, None, 1),
        ((1, 1), "SAME", None, None, 3),
        ((1, 2), [(2, 1), (3, 4)], (2, 3), (1, 2), 1),
    ],
)
def test_convolutions_count_as_the_compiler_counts_them(strides, padding, lhs_dilation, rhs_dilation, groups):
    def convolve(x, w):
        return lax.conv_general_dilated(x, w, strides, padding, lhs_dilation, rhs_dilation, feature_group_count=groups)

    program = compiled(convolve, shape(2, 6, 16, 15), shape(9, 6 // groups, 3, 5))
    assert hlo.matmul_flops(program.as_text()) == program.cost_analysis()["flops"]


def test_loops_multiply():
    assert hlo.matmul_flops(text(partial(scanned, rounds=5), shape(64, 48), shape(48, 48))) == 5 * ONE


def test_nested_loops_multiply_and_the_compilers_own_count_does_not():
    def nested(x, w):
        return lax.scan(lambda c, _: (scanned(c, w, 5) @ w, None), x, None, length=7)[0]

    program = compiled(nested, shape(64, 48), shape(48, 48))
    assert hlo.matmul_flops(program.as_text()) == 7 * 6 * ONE
    assert program.cost_analysis()["flops"] < 3 * ONE


def test_gradient_of_a_scan_costs_three_times():
    def loss(x, w):
        return jnp.sum(scanned(x, w, 5))

    assert hlo.matmul_flops(text(jax.grad(loss, (0, 1)), shape(64, 48), shape(48, 48))) == 3 * 5 * ONE


def test_a_dynamic_bound_is_reported():
    def dynamic(x, w, n):
        return lax.fori_loop(0, n, lambda i, c: jnp.tanh(c @ w), scanned(x, w, 3))

    program = text(dynamic, shape(64, 48), shape(48, 48), shape(dtype=jnp.int32))
    cost = hlo.analyse(program)
    assert (cost.unknown_trips, cost.matmul_flops_max) == (1, 4 * ONE)
    with pytest.raises(ValueError, match="1 loops have no static trip count"):
        hlo.matmul_flops(program)


@pytest.mark.parametrize("start, stop", [(0, 5), (3, 10), (4, 4 + 1)])
def test_trip_counts_are_read_from_the_condition_when_not_annotated(start, stop):
    def loop(x, w):
        return lax.while_loop(lambda c: c[0] < stop, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (start, x))[1]

    program = text(loop, shape(64, 48), shape(48, 48))
    bare = re.sub(r'"known_trip_count":\{"n":"\d+"\}', '"nothing":"here"', program)
    if " while(" in program:  # a loop of one round is no loop
        assert "known_trip_count" in program
    assert hlo.matmul_flops(bare) == hlo.matmul_flops(program) == (stop - start) * ONE


def test_a_condition_that_is_not_a_count_stays_unknown():
    def until(x, w):
        return lax.while_loop(lambda c: jnp.sum(c) > 0, lambda c: jnp.tanh(c @ w), x)

    cost = hlo.analyse(text(until, shape(64, 48), shape(48, 48)))
    assert (cost.unknown_trips, cost.matmul_flops_max) == (1, ONE)


def test_branches_give_a_range():
    def sometimes(x, w):
        def body(c, i):
            return lax.switch(i % 3, [lambda c: c + 1, lambda c: c @ w, lambda c: (c @ w) @ w], c), None

        return lax.scan(body, x, jnp.arange(6))[0] @ w

    program = text(sometimes, shape(64, 48), shape(48, 48))
    cost = hlo.analyse(program)
    assert (cost.matmul_flops_min, cost.matmul_flops_max, cost.unknown_trips) == (ONE, 13 * ONE, 0)
    with pytest.raises(ValueError, match="branches"):
        hlo.matmul_flops(program)


BLOCK = 8 * 48 * 4  # bytes of one device's [8, 48] float32 piece


@pytest.mark.parametrize(
    "collective, in_spec, out_spec, kind, sent",
    [
        (lambda a: lax.psum(a, "x"), P("x"), P(), "all-reduce", 2 * BLOCK * 7 / 8),
        (lambda a: lax.all_gather(a, "x"), P("x"), P(), "all-gather", 7 * BLOCK),
        (lambda a: lax.psum_scatter(a, "x", tiled=True), P(), P("x"), "reduce-scatter", 7 * BLOCK),
        (lambda a: lax.all_to_all(a, "x", 1, 0, tiled=True), P("x"), P(None, "x"), "all-to-all", BLOCK * 7 / 8),
        (lambda a: lax.ppermute(a, "x", [(0, 1), (1, 2), (3, 3)]), P("x"), P("x"), "collective-permute", BLOCK * 2 / 8),
    ],
)
def test_bytes_sent_by_each_collective(collective, in_spec, out_spec, kind, sent):
    cost = hlo.analyse(text(over_devices(collective, in_spec, out_spec), shape(64, 48)))
    assert cost.collective_bytes == {kind: sent} and cost.total_bytes == sent


def test_a_ring_in_a_loop_sends_each_round():
    around = [(i, (i + 1) % DEVICES) for i in range(DEVICES)]

    def ring(a, w):
        def hop(c, _):
            return (lax.ppermute(c[0], "x", around), c[1] + c[0] @ w), None

        return lax.scan(hop, (a, a), None, length=DEVICES - 1)[0][1]

    cost = hlo.analyse(text(over_devices(ring, (P("x"), P()), P("x")), shape(64, 48), shape(48, 48)))
    assert cost.collective_bytes == {"collective-permute": 7 * BLOCK}
    assert cost.matmul_flops_max == cost.matmul_flops_min == 7 * ONE // 8  # per device


def test_groups_of_a_two_dimensional_mesh():
    mesh = Mesh(np.array(jax.devices()[:DEVICES]).reshape(2, 4), ("a", "b"))
    reduce_b = jax.shard_map(lambda x: lax.psum(x, "b"), mesh=mesh, in_specs=P("a", "b"), out_specs=P("a"))
    assert hlo.analyse(text(reduce_b, shape(16, 16))).total_bytes == 2 * (8 * 4 * 4) * 3 / 4


def test_plain_sharded_program_counts_one_device():
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("x",))
    rows = jax.sharding.NamedSharding(mesh, P("x"))
    x = jax.ShapeDtypeStruct((64, 48), jnp.float32, sharding=rows)
    assert hlo.matmul_flops(text(lambda x, w: x @ w, x, shape(48, 48))) == ONE // 8


def test_work_is_told_apart_by_layer_and_phase():
    """A ring in one layer, a sum in another, both differentiated and rematerialised: the table says which is which."""
    around = [(i, (i + 1) % DEVICES) for i in range(DEVICES)]

    @jax.checkpoint
    def layers(x, w):
        with jax.named_scope("layer_0"):
            x = jnp.tanh(lax.ppermute(x, "x", around) @ w)
        with jax.named_scope("layer_1"):
            return jnp.tanh(lax.all_gather(x, "x").sum(0) @ w)

    def loss(x, w):
        return jnp.sum(lax.scan(lambda c, _: (layers(c, w), None), x, None, length=5)[0])

    gradient = over_devices(jax.grad(loss), (P("x"), P()), P("x"))
    cost = hlo.analyse(text(gradient, shape(64, 48), shape(48, 48)))
    phases = ("forward", "recomputed", "backward")
    assert cost.bytes_by("layer", "kind", "phase") == {
        **{("layer_0", "collective-permute", phase): 5 * BLOCK for phase in phases},
        ("layer_1", "all-gather", "forward"): 5 * 7 * BLOCK,
        ("layer_1", "all-gather", "recomputed"): 5 * 7 * BLOCK,
        ("layer_1", "reduce-scatter", "backward"): 5 * 7 * BLOCK,
    }
    assert sum(cost.bytes_by("layer").values()) == cost.total_bytes == sum(cost.collective_bytes.values())
    flops = cost.flops_by("layer", "phase")
    assert sum(flops.values()) == cost.matmul_flops_max
    # The gradient of w is not asked for; the product of the last layer is not needed again.
    one = 5 * ONE // 8
    assert flops[("layer_0", "forward")] == flops[("layer_0", "backward")] == flops[("layer_1", "backward")] == one
    assert [line.split()[:3] for line in cost.table().splitlines()[1:2]] == [["layer_1", "backward", "reduce-scatter"]]


def test_a_large_program_is_read_in_seconds():
    """Ten megabytes: a body of a few hundred products, calls one deep, many times over."""
    program = text(over_devices(lambda a: lax.psum(a @ a.T, "x"), P("x"), P()), shape(64, 48))
    body = re.search(r"^%fused_computation.*?^}$|^ENTRY.*?^}$", program, re.MULTILINE | re.DOTALL)[0]
    lines = body.splitlines()
    filler = [
        f'  %pad.{i} = f32[8,48]{{1,0}} copy({lines[1].split()[0]}), metadata={{op_name="a/b"}}' for i in range(90)
    ]
    copies = []
    while sum(map(len, copies)) < 10_000_000:
        name = f"%copy_{len(copies)}"
        copies.append("\n".join([re.sub(r"^(ENTRY )?%[\w.\-]+", name, lines[0]), lines[1], *filler, *lines[2:]]))
    start = time.process_time()
    cost = hlo.analyse(program + "\n\n" + "\n\n".join(copies))
    assert time.process_time() - start < 10
    assert cost.instructions > 90 * len(copies)
