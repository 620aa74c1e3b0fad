"""The error of ring attention against float64, ring by ring: more devices must not mean a worse result.

    python scripts/check_ring_error.py
    python scripts/check_ring_error.py --length 2048 --rings 1,16

Inputs are bfloat16 numbers. `bfloat16` gives them as they are, so that the output is rounded to bfloat16 once, at the
end; `float32` gives the same numbers in float32, and shows what that last rounding hides: the sums themselves. The
table holds the greatest |out - float64| and the root mean square of the errors of the output and of the gradients of
queries, keys and values (greatest errors of long sums depend on their order by chance). Ring 1 is one device, where
nothing is merged. Every number depends on the seed only. Exit code 1: some ring errs more than 1.2 times as much as
ring 1. Gradients of keys are collected on their way in float32; `--gradients keys` collects them in their own format,
with one rounding per hop.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=16"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from irope_jax.attention.mask import Global
from irope_jax.context.api import attend_sharded
from irope_jax.context.layout import ContextLayout
from irope_jax.context.strategy import ContextConfig
from irope_jax.core.types import TokenInfo
from irope_jax.sharding.mesh import MeshConfig, make_mesh

HEADS, KEY_HEADS, WIDTH = 4, 2, 64
LIMIT = 1.2


def inputs(length: int) -> list[np.ndarray]:
    """Queries, keys, values and a gradient of the output: bfloat16 numbers in float32."""
    random = np.random.default_rng(0)
    arrays = (random.normal(size=(1, length, n, WIDTH)) for n in (HEADS, KEY_HEADS, KEY_HEADS, HEADS))
    return [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in arrays]


def exact(q, k, v, dout) -> list[np.ndarray]:
    """Output, dq, dk and dv of causal attention in float64, one dense head at a time."""
    q, k, v, dout = (x[0].astype(np.float64) for x in (q, k, v, dout))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    hidden = np.triu(np.ones((len(q), len(q)), bool), 1)
    scale = WIDTH**-0.5
    for n in range(HEADS):
        m = n * KEY_HEADS // HEADS
        score = np.where(hidden, -np.inf, scale * q[:, n] @ k[:, m].T)
        weight = np.exp(score - score.max(1, keepdims=True))
        weight /= weight.sum(1, keepdims=True)
        out[:, n] = weight @ v[:, m]
        d_score = weight * ((dout[:, n] @ v[:, m].T) - (dout[:, n] * out[:, n]).sum(1, keepdims=True)) * scale
        dq[:, n] = d_score @ k[:, m]
        dk[:, m] += d_score.T @ q[:, n]
        dv[:, m] += weight.T @ dout[:, n]
    return [x[None] for x in (out, dq, dk, dv)]


def ring_errors(
    arrays, wanted, ring: int, dtype: str, gradients: str = "float32", order: str = "zigzag"
) -> list[float]:
    """Errors over a ring of so many devices, inputs in `dtype`.

    Returns:
      The greatest of the output, then root mean squares of output, dq, dk and dv.
    """
    layout = ContextLayout(order, ring)
    info = layout.place(TokenInfo.single(1, arrays[0].shape[1]))
    config = ContextConfig(layout=order, far="ring", gradients=gradients)

    def both(q, k, v, dout):
        run = lambda q, k, v: attend_sharded(q, k, v, info, info, Global(), context=config)
        out, back = jax.vjp(run, q, k, v)
        return out, *back(dout)

    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=ring), jax.devices()[:ring])):
        found = jax.jit(both)(*(layout.place(jnp.asarray(x, dtype)) for x in arrays))
    found = layout.unplace([np.asarray(x).astype(np.float64) for x in found])
    errors = [np.abs(x - y) for x, y in zip(found, wanted)]
    return [float(errors[0].max()), *(float(np.sqrt((error**2).mean())) for error in errors)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="tokens; a multiple of twice every ring")
    parser.add_argument("--rings", default="1,2,4,8,16", help="numbers of devices, comma-separated, 1 first")
    parser.add_argument("--gradients", choices=("float32", "keys"), default=ContextConfig().gradients)
    parser.add_argument("--order", choices=("zigzag", "contiguous"), default=ContextConfig().layout)
    chosen = parser.parse_args()
    rings = [int(n) for n in chosen.rings.split(",")]
    arrays = inputs(chosen.length)
    wanted, worst = exact(*arrays), 0.0
    for dtype in ("bfloat16", "float32"):
        print(f"{dtype:9} {'greatest':>10} {'rms out':>10} {'dq':>10} {'dk':>10} {'dv':>10}   over ring {rings[0]}")
        first = None
        for ring in rings:
            errors = ring_errors(arrays, wanted, ring, dtype, chosen.gradients, chosen.order)
            first = first or errors
            ratios = [error / alone for error, alone in zip(errors, first)]
            worst = max(worst, *ratios)
            print(f"ring {ring:<4}", *(f"{x:10.2e}" for x in errors), " ", *(f"{x:5.2f}" for x in ratios), flush=True)
    print(
        f"{'pass' if worst <= LIMIT else 'FAIL'}: at most {worst:.2f} times the error of ring {rings[0]}; gate {LIMIT}"
    )
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
