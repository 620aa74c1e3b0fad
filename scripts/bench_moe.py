"""What the products of a mixture of experts cost in compiled programs, against what the chosen experts demand.

    python scripts/bench_moe.py                              # on the devices here
    python scripts/bench_moe.py --target=v5p:2x2x1           # compiled for chips that nobody has here, never run

Forward and gradients of one layer's experts: ours on one device, ours with experts over four (tokens travel, weights
travel), and plain differentiation of `jax.lax.ragged_dot`. FLOPs are of matrix products, loops multiplied out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from irope_jax.core.types import TokenInfo
from irope_jax.model.moe import ExpertWeights, MoE, mixture
from irope_jax.model.routing import Routing
from irope_jax.plan.hlo import analyse
from irope_jax.plan.targets import target_devices, target_mesh, targeting
from irope_jax.sharding.mesh import MeshConfig, make_mesh


def cost(function, *shapes) -> str:
    """FLOPs of products, those of opaque kernels by the compiler's count, and bytes sent."""
    compiled = jax.jit(function).lower(*shapes).compile()
    found = analyse(compiled.as_text())
    kernels = ", ".join(f"{times} x {name}" for name, times in found.opaque_calls.items())
    counted = (compiled.cost_analysis() or {}).get("flops", 0)
    kernels = f", kernels {kernels} (the compiler counts {counted:.4g} with them, loops once)" if kernels else ""
    return f"products {found.matmul_flops_max:.4g}{kernels}, sent {found.total_bytes:.4g} bytes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="chips to compile for, as in v5p:2x2x1; the devices here if left out")
    parser.add_argument("--tokens", type=int, default=8192, help="in a row; there are four rows")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    args = parser.parse_args()
    rows, t, d, f, e = 4, args.tokens, args.width, args.hidden, args.experts
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    x, weights = shape(rows, t, d), ExpertWeights(shape(e, d, f), shape(e, d, f), shape(e, f, d))
    chosen, score = shape(rows, t, 1, dtype=jnp.int32), shape(rows, t, 1, dtype=jnp.float32)
    print(f"active experts demand {3 * 2 * rows * t * 3 * d * f:.4g} FLOPs in all")

    def step(cfg):
        def loss(x, weights, chosen, score):
            out, _ = mixture(
                cfg, x, Routing(chosen, score), weights, TokenInfo.single(rows, t), jnp.ones((rows, t), bool)
            )
            return jnp.square(out.astype(jnp.float32)).sum()

        return jax.grad(loss, argnums=(0, 1))

    def plain(x, weights, sizes):
        def loss(x, weights):
            rows_MD = x.reshape(-1, d)
            dot = lambda rows, w: jax.lax.ragged_dot(rows, w, sizes)
            hidden = jax.nn.silu(dot(rows_MD, weights.gate)) * dot(rows_MD, weights.up)
            return jnp.square(dot(hidden, weights.down).astype(jnp.float32)).sum()

        return jax.grad(loss, argnums=(0, 1))(x, weights)

    devices = target_devices(args.target) if args.target else jax.devices()
    for count, exchange in ((1, "auto"), (4, "tokens"), (4, "weights")):
        if len(devices) < count:
            print(f"{count} devices: only {len(devices)} here; set XLA_FLAGS=--xla_force_host_platform_device_count=4")
            continue
        config = MeshConfig(data=1, expert=count)
        mesh = target_mesh(devices[:count], config) if args.target else make_mesh(config, devices[:count])
        with targeting(mesh):
            print(
                f"{count} device(s), {exchange}: {cost(step(MoE(e, f, exchange=exchange)), x, weights, chosen, score)}"
            )
            if count == 1:
                print(f"ragged_dot differentiated: {cost(plain, x, weights, shape(e, dtype=jnp.int32))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
