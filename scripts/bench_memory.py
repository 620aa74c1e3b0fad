"""Memory and FLOPs of the loss head and the feed-forward part against their naive forms; compiles, never runs.

    python scripts/bench_memory.py
    python scripts/bench_memory.py --length 65536 --json

Each line: temporary memory of one forward and backward pass as the compiler allocates it, matrix-product FLOPs over the
fewest possible, and whether both stay below the gate. A few seconds, no accelerator.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from irope_jax.losses import chunked_cross_entropy, token_losses
from irope_jax.model.feed_forward import swiglu
from irope_jax.plan.hlo import analyse

MIB = 2**20


def measure_loss_head(length: int = 16384, width: int = 512, vocabulary: int = 65536, chunk: int | None = None) -> dict:
    """Loss and its gradients for hidden states and output matrix, float32, one row of `length` tokens.

    Gate: temporary memory at most 0.06 of the naive loss, matrix-product FLOPs at most 1.01 of the fewest (3 products).
    """
    shapes = [((1, length, width), "float32"), ((width, vocabulary), "float32"), ((1, length), "int32")]
    args = [jax.ShapeDtypeStruct(*s) for s in [*shapes, ((1, length), "float32")]]

    def naive(hidden, w, targets, weights):
        logits = jnp.einsum("BTD,DV->BTV", hidden, w)
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - target))

    def ours(hidden, w, targets, weights):
        return chunked_cross_entropy(hidden, w, targets, weights, chunk=chunk).loss_sum

    programs = [jax.value_and_grad(f, (0, 1)) for f in (naive, ours)]
    found = _compare("loss head", *programs, args, fewest=3 * 2 * length * width * vocabulary, gate=(0.06, 1.01))
    scored = _compile(lambda h, w, t: token_losses(h, w, t, chunk=chunk), args[:3])
    return found | {"evaluation_mib": round(scored["temp"] / MIB, 1)}


def measure_feed_forward(length: int = 65536, width: int = 512, hidden: int = 2048, chunk: int = 1024) -> dict:
    """SwiGLU and its gradients for input and weights, float32, one row of `length` tokens.

    Gate: temporary memory at most 0.15 of the naive form, matrix-product FLOPs at most 1.25 of the fewest (9 products).
    """
    tokens, wide = (1, length, width), (width, hidden)
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (tokens, wide, wide, wide[::-1], tokens)]

    def step(x, gate, up, down, d_out, *, chunk):
        out, pull = jax.vjp(partial(swiglu, chunk=chunk), x, gate, up, down)
        return out, pull(d_out)

    programs = [partial(step, chunk=c) for c in (None, chunk)]
    return _compare("feed-forward", *programs, args, fewest=9 * 2 * length * width * hidden, gate=(0.15, 1.25))


def _compile(function, args) -> dict:
    start = time.process_time()
    program = jax.jit(function).lower(*args).compile()
    seconds = time.process_time() - start
    return {
        "temp": program.memory_analysis().temp_size_in_bytes,
        "cost": analyse(program.as_text()),
        "seconds": seconds,
    }


def _compare(name: str, naive, ours, args, *, fewest: int, gate: tuple[float, float]) -> dict:
    reference, measured = _compile(naive, args), _compile(ours, args)
    temp_ratio, flop_ratio = measured["temp"] / reference["temp"], measured["cost"].matmul_flops_max / fewest
    return {
        "name": name,
        "naive_mib": round(reference["temp"] / MIB, 1),
        "mib": round(measured["temp"] / MIB, 1),
        "temp_ratio": round(temp_ratio, 4),
        "temp_gate": gate[0],
        "flop_ratio": round(flop_ratio, 4),
        "flop_gate": gate[1],
        "unknown_trips": measured["cost"].unknown_trips,
        "compile_seconds": round(measured["seconds"], 2),
        "pass": temp_ratio <= gate[0] and flop_ratio <= gate[1] and measured["cost"].unknown_trips == 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, help="tokens; default 16384 (loss head) and 65536 (feed-forward)")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of lines")
    chosen = parser.parse_args()
    how = {"length": chosen.length} if chosen.length else {}
    rows = [measure_loss_head(**how), measure_feed_forward(**how)]
    if chosen.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            print(
                f"{row['name']:<13} temporary memory {row['mib']:>7} MiB of {row['naive_mib']:>7} naive = "
                f"{row['temp_ratio']:.4f} (gate {row['temp_gate']})   FLOPs {row['flop_ratio']:.4f} of the fewest "
                f"(gate {row['flop_gate']})   {'pass' if row['pass'] else 'FAIL'}"
            )
    return 0 if all(row["pass"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
