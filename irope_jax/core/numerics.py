"""Comparing and measuring trees of arrays.

One helper decides what "equal up to rounding" means for each number format, so that a tolerance in a test is an
exception with a reason. Here: comparisons for tests and benchmarks, and statistics of trees (norm, count, bytes). Not
here: what the right numbers are (tests/oracles), or any mathematics of models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCES: dict[str, tuple[float, float]] = {
    "float64": (1e-12, 1e-12),
    "float32": (1e-5, 1e-5),
    "float16": (4e-3, 4e-3),
    "bfloat16": (3e-2, 3e-2),
}
"""(rtol, atol) by format. In spacings of numbers next to 1: 4500 of float64, 84 of float32, 4.1 of float16, 7.7 of
bfloat16; the half formats may be stricter because what they hold was summed in float32."""


def assert_close(
    actual: Any,
    expected: Any,
    *,
    dtype: Any = None,
    rtol: float | None = None,
    atol: float | None = None,
    what: str = "",
) -> None:
    """Assert that two trees hold the same values up to rounding: `|actual - expected| <= atol + rtol * |expected|`.

    Integers and booleans are compared exactly. NaN is close to nothing, not even to NaN; an infinity only to itself.
    Number formats may differ (an oracle in float64), shapes and structure may not.

    Args:
      actual: tree of arrays or numbers.
      expected: tree with leaves at the same paths.
      dtype: the coarsest format `actual` went through, which sets the tolerances (`TOLERANCES`); by default, leaf by
        leaf, the coarser of the two formats.
      rtol: relative tolerance instead of the one of the format.
      atol: absolute tolerance instead of the one of the format.
      what: said first in the error message.

    Raises:
      AssertionError: naming the worst leaf, its worst index with both values, and the greatest absolute and relative
        error.
    """
    failures = []
    for path, got, want in _paired(actual, expected, what):
        exact = not (_inexact(got.dtype) or _inexact(want.dtype))
        leaf_rtol, leaf_atol = (0.0, 0.0) if exact else _tolerances(dtype, got.dtype, want.dtype)
        leaf_rtol = leaf_rtol if rtol is None else rtol
        leaf_atol = leaf_atol if atol is None else atol
        failure = _compare(path, got, want, leaf_rtol, leaf_atol)
        if failure:
            failures.append(failure)
    if failures:
        failures.sort(key=lambda failure: failure[0], reverse=True)
        _fail(what, failures[0][1], [failure[2] for failure in failures[1:]])


def assert_equal_trees(actual: Any, expected: Any, *, what: str = "") -> None:
    """Assert that two trees are equal bit by bit: paths, shapes, formats and bytes. A NaN equals the same NaN.

    Raises:
      AssertionError: naming the first leaf that differs, where, and both values.
    """
    failures = []
    for path, got, want in _paired(actual, expected, what):
        if got.dtype != want.dtype:
            failures.append((f"{path}: format {got.dtype}, expected {want.dtype}", path))
            continue
        different = _bits(got) != _bits(want)
        if different.any():
            different = different.reshape(*got.shape, -1).any(-1)
            index = _first(different)
            failures.append(
                (
                    f"{path}: {int(different.sum())} of {got.size} values differ in their bits, first at "
                    f"{_at(index)}: {got[index]!r}, expected {want[index]!r}",
                    path,
                )
            )
    if failures:
        _fail(what, failures[0][0], [path for _, path in failures[1:]])


def shape_difference(have: Any, want: Any) -> tuple[str, str, str] | None:
    """`(name, had, wanted)` of the first leaf that differs in shape or is in one tree only; None if there is none."""
    have, want = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): f"shape {tuple(leaf.shape)}" for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (have, want))
    )
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            return name, have.get(name, "nothing"), want.get(name, "nothing")
    return None


@dataclass(frozen=True)
class TreeSize:
    """Number of values and bytes of a tree of arrays."""

    count: int
    bytes: int


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all values of a tree, float32 scalar; squares are summed in float32 whatever the format."""
    squares = [jnp.sum(jnp.square(jnp.abs(leaf.astype(jnp.float32)))) for leaf in map(jnp.asarray, _leaves(tree))]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def parameter_count(tree: Any) -> int:
    """Number of values in a tree of arrays, or of shapes (`jax.ShapeDtypeStruct`)."""
    return sum(math.prod(leaf.shape) for leaf in _leaves(tree))


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays, or of shapes, before any sharding."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in _leaves(tree))


def breakdown(tree: Any) -> dict[str, TreeSize]:
    """Sizes of the top-level parts of a tree, in its order: `{"embed": TreeSize(...), "layers": ...}`."""
    parts: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts.setdefault(_name(path[0]) if path else "", []).append(leaf)
    return {name: TreeSize(parameter_count(leaves), tree_bytes(leaves)) for name, leaves in parts.items()}


def _leaves(tree: Any) -> list:
    return jax.tree_util.tree_leaves(tree)


def _name(key: Any) -> str:
    """The bare name of one step of a tree path."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _paired(actual: Any, expected: Any, what: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Leaves by path. Containers are compared by the paths they give, so a list may stand for a tuple."""
    got, want = _by_path(actual), _by_path(expected)
    if missing := [path for path in want if path not in got]:
        _fail(what, f"{missing[0] or 'the tree'} is missing", missing[1:])
    if unexpected := [path for path in got if path not in want]:
        _fail(what, f"{unexpected[0] or 'a single leaf'} is not expected", unexpected[1:])
    pairs = [(path or "value", _numpy(got[path]), _numpy(want[path])) for path in want]
    for path, a, b in pairs:
        if a.shape != b.shape:
            _fail(what, f"{path}: shape {a.shape}, expected {b.shape}", [])
    return pairs


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _numpy(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _inexact(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


def _tolerances(asked: Any, *formats: np.dtype) -> tuple[float, float]:
    if asked is not None:
        name = jnp.dtype(asked).name
        if name not in TOLERANCES:
            raise ValueError(f"no tolerances for {name}; give rtol and atol, or one of {', '.join(TOLERANCES)}")
        return TOLERANCES[name]
    known = {"complex64": "float32", "complex128": "float64"}
    names = [known.get(dtype.name, dtype.name) for dtype in formats if _inexact(dtype)]
    if unknown := [name for name in names if name not in TOLERANCES]:
        raise ValueError(f"no tolerances for {unknown[0]}; say dtype=, one of {', '.join(TOLERANCES)}")
    return max(TOLERANCES[name] for name in names)


def _compare(path: str, got: np.ndarray, want: np.ndarray, rtol: float, atol: float) -> tuple[float, str, str] | None:
    """`None` if close, else (by how much the worst value misses, the sentence, the path)."""
    if not (_inexact(got.dtype) or _inexact(want.dtype)) and rtol == 0 and atol == 0:
        wide_got, wide_want = got.astype(object), want.astype(object)  # Python integers: no wrap-around, no rounding
        error = np.asarray(abs(wide_got - wide_want) if got.dtype != bool else wide_got != wide_want, dtype=np.float64)
        allowed = np.zeros(got.shape)
        size = np.abs(want.astype(np.float64))
    else:
        wide = np.complex128 if "complex" in got.dtype.name + want.dtype.name else np.float64
        wide_got, wide_want = got.astype(wide), want.astype(wide)
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.where(wide_got == wide_want, 0.0, np.abs(wide_got - wide_want))
            size = np.abs(wide_want)
            allowed = np.where(np.isinf(size), 0.0, atol + rtol * size)
    beyond = ~(error <= allowed)  # true for NaN
    if not beyond.any():
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        miss = np.where(np.isnan(error), np.inf, error - allowed)
        relative = np.where(error == 0, 0.0, error / size)
    index = np.unravel_index(int(np.argmax(np.where(beyond, miss, -np.inf))), got.shape)
    sentence = (
        f"{path}: {int(beyond.sum())} of {got.size} values beyond atol {atol:g} + rtol {rtol:g} * |expected|; worst at "
        f"{_at(index)}: {got[index]}, expected {want[index]}; max abs error {_largest(error)}, "
        f"max rel error {_largest(relative)}"
    )
    return float(miss[index]), sentence, path


def _largest(values: np.ndarray) -> str:
    return "NaN" if np.isnan(values).any() else f"{values.max():.3g}"


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _first(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))


def _at(index: tuple) -> str:
    return f"[{', '.join(str(int(i)) for i in index)}]"


def _fail(what: str, sentence: str, others: list[str]) -> None:
    also = f"\nalso: {', '.join(others[:8])}" + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    raise AssertionError((f"{what}: " if what else "") + sentence + (also if others else ""))
