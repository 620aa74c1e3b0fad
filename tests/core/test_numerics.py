"""The comparison helper is what the other tests stand on, so it is tested for what it must refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.core.numerics import (
    TOLERANCES,
    assert_close,
    assert_equal_trees,
    breakdown,
    global_norm,
    parameter_count,
    tree_bytes,
)


def refused(check, *args, **kwargs):
    with pytest.raises(AssertionError) as caught:
        check(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_tolerance_of_a_format_admits_its_rounding_and_refuses_ten_times_its_width(dtype):
    rng = np.random.default_rng(0)
    exact = rng.normal(size=1000)
    rounded = jnp.asarray(exact, dtype)
    assert_close(rounded, exact)
    assert_close(np.asarray(rounded, np.float32), exact, dtype=dtype)
    rtol, atol = TOLERANCES[dtype]
    at_the_edge = exact + 0.8 * (atol + rtol * np.abs(exact))
    beyond = exact + 10 * (atol + rtol * np.abs(exact))
    assert_close(at_the_edge, exact, dtype=dtype)
    refused(assert_close, beyond, exact, dtype=dtype)


def test_the_coarser_format_decides_and_the_finest_is_strict():
    assert_close(np.float64(1.0), np.float64(1.0 + 1e-13))
    refused(assert_close, np.float64(1.0), np.float64(1.0 + 1e-9))
    assert_close(np.float32(1.0), np.float64(1.0 + 1e-6))
    assert_close(np.float64(1.0), jnp.bfloat16(1.01))
    refused(assert_close, np.float32(1.0), np.float32(1.01))
    assert_close(np.float32(1.0), np.float32(1.01), dtype=jnp.bfloat16)
    assert_close(np.complex64(1 + 1j), np.complex128(1 + 1.000001j))
    refused(assert_close, np.complex64(1 + 1j), np.complex128(1 - 1j))


def test_tolerances_can_be_given_one_by_one():
    assert_close(np.float32(1.0), np.float32(1.5), atol=0.6)
    refused(assert_close, np.float32(1.0), np.float32(1.5), atol=0.4, rtol=0)
    assert_close(np.float32(1.0), np.float32(1.5), rtol=0.5)
    assert_close(np.float32(0.0), np.float32(9e-6), rtol=0)
    refused(assert_close, np.float32(0.0), np.float32(9e-6), atol=0)
    assert_close(np.int32(7), np.int32(8), atol=1)


def test_the_error_names_leaf_index_values_and_errors():
    want = {"layers": [{"w": np.zeros((2, 3), np.float32)}, {"w": np.full((2, 3), 4.0, np.float32)}]}
    got = {"layers": [{"w": np.zeros((2, 3), np.float32)}, {"w": np.full((2, 3), 4.0, np.float32)}]}
    got["layers"][1]["w"][1, 2] = 5.0
    got["layers"][1]["w"][0, 0] = 4.1
    got["layers"][0]["w"][0, 1] = 0.5
    message = refused(assert_close, got, want, what="gradients")
    first, also = message.split("\n")
    assert first.startswith("gradients: ['layers'][1]['w']: 2 of 6 values beyond atol 1e-05 + rtol 1e-05")
    assert "worst at [1, 2]: 5.0, expected 4.0; max abs error 1, max rel error 0.25" in first
    assert also == "also: ['layers'][0]['w']"


def test_what_is_never_close():
    nan, inf = np.float32(np.nan), np.float32(np.inf)
    for got, want in [(nan, nan), (nan, 1.0), (1.0, nan), (inf, -inf), (inf, 1e30), (1e30, inf), (inf, nan)]:
        refused(assert_close, np.float32(got), np.float32(want))
        refused(assert_close, np.float32(got), np.float32(want), rtol=10, atol=10)
    assert_close(np.array([inf, -inf]), np.array([inf, -inf]))
    message = refused(assert_close, np.array([0, nan, 9], np.float32), np.zeros(3, np.float32))
    assert "worst at [1]: nan" in message and "max abs error NaN" in message


def test_integers_and_booleans_are_exact():
    assert_close(np.arange(3), np.arange(3, dtype=np.int32))
    big = 2**62
    message = refused(assert_close, np.array([big + 1]), np.array([big]))
    assert "max abs error 1," in message
    refused(assert_close, np.array([0], np.uint8), np.array([255], np.uint8))
    assert_close(np.array([True, False]), np.array([True, False]))
    assert "worst at [1]: True, expected False" in refused(assert_close, np.array([True] * 2), np.array([True, False]))


def test_structure_and_shapes_must_agree():
    one = np.ones(2, np.float32)
    assert "['b'] is missing" in refused(assert_close, {"a": one}, {"a": one, "b": one})
    assert "['b'] is not expected" in refused(assert_close, {"a": one, "b": one}, {"a": one})
    assert "['a']: shape (2,), expected (1, 2)" in refused(assert_close, {"a": one}, {"a": one[None]})
    refused(assert_close, np.ones(3, np.float32), np.float32(1))  # no broadcasting
    refused(assert_close, {"a": one}, {"a": None})
    assert_close([one, (one,)], (one, [one]))
    assert_close({}, {})
    assert_close(np.zeros((0, 3), np.float32), np.zeros((0, 3)))


def test_an_unknown_format_is_said():
    with pytest.raises(ValueError, match="no tolerances for int8"):
        assert_close(np.float32(1), np.float32(1), dtype="int8")
    with pytest.raises(ValueError, match="no tolerances for float8_e4m3fn"):
        assert_close(jnp.ones(2, jnp.float8_e4m3fn), np.ones(2))


def test_bit_equality():
    nan = np.array([np.nan, 1.0], np.float32)
    assert_equal_trees({"a": nan, "k": jax.random.key(1)}, {"a": jnp.asarray(nan), "k": jax.random.key(1)})
    assert "first at [1]" in refused(assert_equal_trees, {"k": jax.random.key(1)}, {"k": jax.random.key(2)})
    step = np.nextafter(np.float32(1), np.float32(2))
    one, other = np.array([[0, 1, 1]], np.float32), np.array([[0, 1, step]], np.float32)
    message = refused(assert_equal_trees, {"a": one}, {"a": other})
    assert "['a']: 1 of 3 values differ in their bits, first at [0, 2]" in message
    assert "format float32, expected float64" in refused(assert_equal_trees, np.float32(1), np.float64(1))
    refused(assert_equal_trees, np.float32(0.0), np.float32(-0.0))
    refused(assert_equal_trees, {"a": nan}, {"b": nan})
    refused(assert_equal_trees, np.ones(2), np.ones((2, 1)))
    message = refused(assert_equal_trees, [np.int32(1), np.int32(2)], [np.int32(0), np.int32(0)], what="state")
    assert message.startswith("state: [0]: 1 of 1") and message.endswith("also: [1]")
    assert_equal_trees(jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16))
    refused(assert_equal_trees, jnp.ones(3, jnp.bfloat16), jnp.full(3, 1.0078125, jnp.bfloat16))
    strided = np.arange(6.0).reshape(2, 3).T
    assert_equal_trees(strided, strided.copy())


def test_statistics_of_a_tree():
    tree = {
        "embed": jnp.full((4, 2), 3.0, jnp.bfloat16),
        "layers": [{"w": jnp.full((3,), 4.0, jnp.float32)}, {"w": jnp.zeros((3,), jnp.float32)}],
    }
    assert parameter_count(tree) == 14 and tree_bytes(tree) == 16 + 24
    sizes = {name: (size.count, size.bytes) for name, size in breakdown(tree).items()}
    assert sizes == {"embed": (8, 16), "layers": (6, 24)}
    assert_close(global_norm(tree), np.sqrt(np.float32(8 * 9 + 3 * 16)))
    shapes = jax.eval_shape(lambda: tree)
    assert parameter_count(shapes) == 14 and breakdown(shapes) == breakdown(tree)
    assert global_norm({}) == 0 and parameter_count({}) == 0 and breakdown({}) == {}
    assert breakdown(jnp.ones(3))[""].count == 3


def test_the_norm_is_summed_in_float32_and_can_be_compiled():
    tree = {"a": jnp.full(100_000, 0.01, jnp.bfloat16)}
    value = float(jnp.bfloat16(0.01))
    norm = jax.jit(global_norm)(tree)
    assert norm.dtype == jnp.float32
    assert_close(norm, np.float64(value * np.sqrt(100_000)))
