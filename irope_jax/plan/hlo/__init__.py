"""Costs read from the text of a compiled program: matrix-product FLOPs and bytes sent, loops multiplied out.

`compiled.cost_analysis()` counts the body of a loop once, so a scan over blocks shows a thousandth of its work, and it
says nothing of what devices send. This package walks the optimized HLO (`compiled.as_text()`) instead. Numbers are per
device: after partitioning the text is the program of one device. Nothing here compiles, runs or imports jax.

`cost.py` is what a reader calls and how the program is walked; `text.py` parses; `products.py`, `collectives.py` and
`loops.py` each know one kind of instruction.
"""

from irope_jax.plan.hlo.cost import HloCost, OpaqueCall, Product, Sent, Work, analyse, matmul_flops

__all__ = ["HloCost", "OpaqueCall", "Product", "Sent", "Work", "analyse", "matmul_flops"]
