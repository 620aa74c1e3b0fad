"""Plain values as JSON that any reader takes: numbers that are not finite by name, scalars of arrays as numbers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dumps(value: Any, **how: Any) -> str:
    """JSON text of plain values; `how` goes to `json.dumps`.

    Raises:
      TypeError: something is not plain.
    """
    return json.dumps(_encode(value), allow_nan=False, ensure_ascii=False, **how)


def loads(text: str | bytes) -> Any:
    """What `dumps` was given: numbers that are not finite are numbers again.

    Raises:
      ValueError: it is not JSON.
    """
    return _decode(json.loads(text))


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy and jax scalars
        return _encode(value.item())
    raise TypeError(f"cannot record a {type(value).__name__}: {value!r}; give plain values")


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {k: _decode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_decode(v) for v in value]
    return value
