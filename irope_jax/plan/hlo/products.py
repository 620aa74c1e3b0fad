"""FLOPs of one matrix product, however a compiler writes it: dot, convolution, call of a library. Two per multiply-add.

What is not seen: products rewritten as multiply and reduce (an inner product of two vectors, an outer product; nothing
with two matrices) and elementwise work.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from irope_jax.plan.hlo.text import Array, Instruction

_LIBRARY = re.compile(r"gemm|matmul|dot", re.IGNORECASE)


def product_flops(op: Instruction, operands: list[Array]) -> int | None:
    """FLOPs of `op`; 0 if it is no product, None if it is a call whose inside is unknown."""
    if op.opcode == "dot":
        return _dot(op, operands)
    if op.opcode == "convolution":
        return _convolution(op, operands)
    if op.opcode == "custom-call":
        return _library(op, operands) if _LIBRARY.search(op.target) else None
    return 0


def _dot(op: Instruction, operands: list[Array]) -> int:
    summed = math.prod(operands[0].shape[d] for d in op.integers("lhs_contracting_dims"))
    return 2 * math.prod(op.arrays[0].shape) * summed


def _library(op: Instruction, operands: list[Array]) -> int | None:
    """From the dimension numbers of the call or, without them, from its shapes."""
    lhs, rhs, out = operands[0].shape, operands[1].shape, op.arrays[0].shape
    if found := re.search(r'lhs_contracting_dimensions\\?":\s*\[([^\]]*)\]', op.attributes):
        return 2 * math.prod(out) * math.prod(lhs[int(d)] for d in re.findall(r"\d+", found[1]))
    summed_squared = Fraction(math.prod(lhs) * math.prod(rhs), max(1, math.prod(out) * math.prod(out[:-2])))
    summed = math.isqrt(int(summed_squared))
    return 2 * math.prod(out) * summed if summed * summed == summed_squared else None


def _convolution(op: Instruction, operands: list[Array]) -> int:
    """Multiply-adds that touch real inputs (not padding, not the holes of a dilation), times two."""
    lhs_labels, rhs_labels, out_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes).groups()
    lhs, rhs, out = operands[0].shape, operands[1].shape, op.arrays[0].shape
    window = re.search(r"window=\{([^}]*)\}", op.attributes)
    settings = dict(item.split("=") for item in window[1].split()) if window else {}
    spatial = sorted(c for c in rhs_labels if c.isdigit())
    macs = out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    for n, axis in enumerate(spatial):
        setting = {key: int(value.split("x")[n].split("_")[0]) for key, value in settings.items()}
        macs *= _touching(
            taps=rhs[rhs_labels.index(axis)],
            dilation=setting.get("rhs_dilate", 1),
            places=out[out_labels.index(axis)],
            stride=setting.get("stride", 1),
            low=setting.get("pad", 0),
            size=lhs[lhs_labels.index(axis)],
            holes=setting.get("lhs_dilate", 1),
        )
    return 2 * macs


def _touching(taps: int, dilation: int, places: int, stride: int, low: int, size: int, holes: int) -> int:
    """Pairs (place, tap) of one axis whose input index `place * stride + tap * dilation - low` is a real input."""
    last = (size - 1) * holes
    count = 0
    for tap in range(taps):
        offset = tap * dilation - low
        first_place = max(0, -(offset // stride))
        last_place = min(places - 1, (last - offset) // stride)
        if holes == 1:
            count += max(0, last_place - first_place + 1)
        else:
            count += sum((p * stride + offset) % holes == 0 for p in range(first_place, last_place + 1))
    return count
