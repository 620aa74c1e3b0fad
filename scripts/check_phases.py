"""How wrong a rotation's angle is, by position and kind of layer, beside a plain float32 product.

    python scripts/check_phases.py [--head-dim 128] [--theta 500000]

For each kind of layer: the greatest error in radians over all pairs and 64 positions from the one named on, of the
cosine and sine that queries and keys are turned by, against exact rational arithmetic. The gate is 1e-3. Runs as a
compiled program. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from irope_jax.attention.mask import Chunked, Global, Sliding, phase_positions
from irope_jax.core.types import TokenInfo
from irope_jax.position import rope
from irope_jax.position.rotary import RoPE
from irope_jax.position.scaling import NTK, DynamicNTK, Linear, Llama3, LongRoPE, NTKByParts, Unscaled, YaRN

POSITIONS = {"1k": 1_000, "131k": 131_072, "1M": 1_048_576, "10M": 10_485_760, "16M": 2**24, "2^31": 2**31 - 65}
TWO_PI = Fraction("6.28318530717958647692528676655900576839433879875021164194989")
GATE = 1e-3


def exact(positions: np.ndarray, inv_freq: np.ndarray) -> np.ndarray:
    """`positions x inv_freq` modulo a turn, exact for the float64 frequencies."""
    turns = [[Fraction(int(p)) * Fraction(float(f)) / TWO_PI for f in inv_freq] for p in positions]
    return np.array([[float((t - math.floor(t)) * TWO_PI) for t in row] for row in turns])


def apart(cos: np.ndarray, sin: np.ndarray, angle: np.ndarray) -> float:
    """Greatest angle between what was computed and what is right."""
    wrong = np.arctan2(sin, cos) - angle
    return float(np.abs(np.remainder(wrong + np.pi, 2 * np.pi) - np.pi).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--theta", type=float, default=500_000.0)
    args = parser.parse_args()
    pairs, length = args.head_dim // 2, 8192
    factors = tuple(np.linspace(1.0, 16.0, pairs))
    layers = {
        "chunk of 8192, unscaled": (Unscaled(), Chunked(length)),
        "window of 8192, unscaled": (Unscaled(), Sliding(length)),
        "global, unscaled": (Unscaled(), Global()),
        "global, linear x16": (Linear(16.0), Global()),
        "global, ntk x16": (NTK(16.0), Global()),
        "global, dynamic ntk": (DynamicNTK(2.0, length, step=2**20), Global()),
        "global, ntk by parts x16": (NTKByParts(16.0, length), Global()),
        "global, yarn x16": (YaRN(16.0, length), Global()),
        "global, llama3 x16": (Llama3(16.0, length), Global()),
        "global, longrope x16, first 64": (LongRoPE(length, 16.0, factors, first_tokens=64), Global()),
        "global, p-RoPE 0.5": (Unscaled(), Global()),
    }
    table = Table(title=f"error of an angle in radians; head width {args.head_dim}, theta {args.theta:g}")
    for heading in ("layer", *POSITIONS):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    worst, found = 0.0, {}
    for name, (scaling, mask) in layers.items():
        spec = RoPE(theta=args.theta, scaling=scaling, fraction=0.5 if "p-RoPE" in name else 1.0)
        compiled = jax.jit(lambda at, n, f: rope.cos_sin(at, f, lengths=n))
        cells, errors = [], []
        for start in POSITIONS.values():
            rows = start + np.arange(64, dtype=np.int32)[None]
            info = TokenInfo(rows, np.ones_like(rows), rows)
            at = np.asarray(phase_positions(mask, info))
            frequencies = spec.frequencies(args.head_dim, start + 64)
            cos, sin = compiled(at, np.full_like(rows, start + 64), rope.Turns.of(frequencies))
            error = apart(np.asarray(cos)[0], np.asarray(sin)[0], exact(at[0], frequencies.inv_freq))
            cells.append(f"{error:.1e}")
            errors.append(error)
        table.add_row(name, *cells)
        worst, found[name] = max(worst, *errors), errors
    inv_freq = RoPE(theta=args.theta).frequencies(args.head_dim).inv_freq
    naive = []
    for start in POSITIONS.values():
        rows = start + np.arange(64)
        angle = np.asarray(jnp.asarray(rows, jnp.float32)[:, None] * jnp.asarray(inv_freq, jnp.float32), np.float64)
        naive.append(apart(np.cos(angle), np.sin(angle), exact(rows, inv_freq)))
    table.add_row("[dim]a float32 product, unscaled[/dim]", *(f"{error:.1e}" for error in naive))
    Console(width=140).print(table)
    print(json.dumps({"pass": worst < GATE, "worst": worst, "gate": GATE, "naive": naive, "errors": found}))
    raise SystemExit(worst >= GATE)


if __name__ == "__main__":
    main()
