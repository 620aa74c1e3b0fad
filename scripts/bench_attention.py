"""Blockwise attention against its gates: FLOPs, memory, time. 4 heads of 128, float32, causal, batch 1.

    python scripts/bench_attention.py                    everything, about five minutes on two cores
    python scripts/bench_attention.py --quick            shorter sequences and fewer repetitions, about a minute
    python scripts/bench_attention.py --lengths 2048,4096 --json

What is counted comes from the compiled program and does not depend on the load of the machine:

    A1  matrix-product FLOPs of global attention over the fewest possible        A2  the same for chunks of 8192
    C2  exponent with which temporary memory grows with the length: 1 is linear   C3  temporary bytes per token
    F1  loss head, F2  feed-forward part, each against its naive form

What is timed is CPU seconds of this process, the candidates taking turns, median and best of the repetitions:

    D1  jax.nn.dot_product_attention over ours (judged from 8192 tokens on)       D2  ours over PyTorch's SDPA

D2 says `skipped` where torch is not installed. The last line is one JSON object with every figure; exit code 1 means
that a gate is missed. `--json` prints nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads of torch that wait must not burn the CPU time we count
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from irope_jax.attention import Chunked, Global, attend, visible_pairs
from irope_jax.core.types import TokenInfo
from irope_jax.plan.hlo import analyse

HEADS, WIDTH, CHUNK = 4, 128, 8192
KB = 1000


def ours(mask):
    def forward(q, k, v):
        info = TokenInfo.single(q.shape[0], q.shape[1])
        return attend(q, k, v, info, info, mask, impl="blockwise")

    return forward


def dense(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def with_gradient(forward):
    def both(q, k, v, dout):
        out, pull = jax.vjp(forward, q, k, v)
        return out, pull(dout)

    return both


def gradient_only(forward):
    """As in training: the output itself is not asked for."""
    return lambda q, k, v, dout: jax.vjp(forward, q, k, v)[1](dout)


def compiled(function, length: int, arguments: int):
    """The program and its compile time in wall seconds."""
    shape = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.float32)
    start = time.perf_counter()
    program = jax.jit(function).lower(*[shape] * arguments).compile()
    return program, time.perf_counter() - start


def temp(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


class Report:
    """Figures as they come, printed as lines unless only the JSON is wanted."""

    def __init__(self, quiet: bool):
        self.quiet, self.figures = quiet, {}

    def add(self, gate: str, what: str, value, limit=None, passed: bool | None = None, **more):
        if passed is None and limit is not None:
            passed = value <= limit
        self.figures[f"{gate} {what}"] = {"value": value, "gate": limit, "pass": passed} | more
        if not self.quiet:
            verdict = {True: "pass", False: "FAIL", None: ""}[passed]
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            extra = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in more.items())
            print(f"{gate:3} {what:42} {shown:>10}  gate {limit!s:>6}  {verdict:4}  {extra}", flush=True)


def count_flops(report: Report, length: int):
    """A1 and A2: 4 N H per visible pair forward; forward and gradient 14."""
    for gate, mask, limit in (("A1", Global(), 1 + 255 / (length + 1) + 0.001), ("A2", Chunked(CHUNK), 1.04)):
        fewest = visible_pairs(mask, length) * HEADS * WIDTH
        for what, function, arguments, per_pair in (
            ("forward", ours(mask), 3, 4),
            ("forward + gradient", with_gradient(ours(mask)), 4, 14),
        ):
            program, seconds = compiled(function, length, arguments)
            cost = analyse(program.as_text())
            ratio = cost.matmul_flops_max / (per_pair * fewest)
            report.add(
                gate, f"FLOPs/fewest, {what}, {length}", ratio, round(limit, 4),
                passed=1 <= ratio <= limit and cost.unknown_trips == 0, unknown_trips=cost.unknown_trips,
            )  # fmt: skip
            report.add("", f"compile seconds, {gate} {what}", seconds, 10)


def measure_memory(report: Report, lengths: list[int]):
    """C2 and C3: temporary memory of the compiled program."""
    for what, function, arguments, limit, stretch in (
        ("forward", ours(Global()), 3, 11, 8),
        ("forward + gradient", gradient_only(ours(Global())), 4, 26, 20),
    ):
        sizes = [temp(compiled(function, n, arguments)[0]) for n in lengths]
        slope = float(np.polyfit(np.log(lengths), np.log(sizes), 1)[0])
        report.add("C2", f"growth of memory, {what}", slope, 1.02, passed=0.95 <= slope <= 1.02, lengths=lengths)
        per_token = sizes[-1] / lengths[-1] / KB
        report.add("C3", f"KB per token, {what}, {lengths[-1]}", per_token, limit, stretch=stretch)


def cpu_seconds(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def interleaved(candidates: dict, repetitions: int) -> dict[str, list[float]]:
    """CPU seconds of each candidate, taking turns after one run to warm up."""
    times = {name: [] for name in candidates}
    for round_number in range(repetitions + 1):
        for name, run in candidates.items():
            seconds = cpu_seconds(run)
            if round_number:
                times[name].append(seconds)
    return times


def measure_time(report: Report, length: int, repetitions: int):
    """D1 and D2."""
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.normal(size=(1, length, HEADS, WIDTH)), jnp.float32) for _ in range(4)]
    for what, wrap, arguments, least, most in (
        ("forward", lambda f: f, 3, 3.0, 1.6),
        ("forward + gradient", gradient_only, 4, 4.0, 1.6),
    ):
        programs = {
            "ours": compiled(wrap(ours(Global())), length, arguments)[0],
            "jax.nn": compiled(wrap(dense), length, arguments)[0],
        }
        candidates = {
            name: lambda p=program, a=arrays[:arguments]: jax.block_until_ready(p(*a))
            for name, program in programs.items()
        }
        if importlib.util.find_spec("torch"):
            candidates["torch"] = torch_attention(arrays, backward=arguments == 4)
        times = interleaved(candidates, repetitions)
        middle, best = ({n: f(t) for n, t in times.items()} for f in (statistics.median, min))
        ratio = middle["jax.nn"] / middle["ours"]
        pairs = visible_pairs(Global(), length) * HEADS * WIDTH * (4 if arguments == 3 else 14)
        report.add(
            "D1", f"jax.nn / ours, {what}, {length}", ratio, least, passed=ratio >= least if length >= 8192 else None,
            best=best["jax.nn"] / best["ours"], cpu_seconds=middle["ours"], gflops=pairs / middle["ours"] / 1e9,
            memory_ratio=temp(programs["jax.nn"]) / temp(programs["ours"]),
        )  # fmt: skip
        if "torch" in times:
            report.add(
                "D2", f"ours / torch SDPA, {what}, {length}", middle["ours"] / middle["torch"], most,
                best=best["ours"] / best["torch"], torch_cpu_seconds=middle["torch"],
            )  # fmt: skip
        else:
            report.add("D2", f"ours / torch SDPA, {what}, {length}", "skipped: torch not installed")


def torch_attention(arrays, backward: bool):
    import torch

    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v, dout = (torch.tensor(np.asarray(x)).transpose(1, 2).contiguous() for x in arrays)

    def forward():
        with torch.no_grad():
            sdpa(q, k, v, is_causal=True)

    def both():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        sdpa(*leaves, is_causal=True).backward(dout)

    return both if backward else forward


def measure_tiles(report: Report):
    """F1 and F2, measured by the neighbouring script."""
    from bench_memory import measure_feed_forward, measure_loss_head

    for gate, row in (("F1", measure_loss_head()), ("F2", measure_feed_forward())):
        flops = {"flops": row["flop_ratio"], "flops_gate": row["flop_gate"]}
        report.add(gate, f"{row['name']}, memory over naive", row["temp_ratio"], row["temp_gate"], row["pass"], **flops)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths",
        help="four or so lengths for memory, comma-separated; the last but two is timed (default 4096,…,32768)",
    )
    parser.add_argument("--quick", action="store_true", help="time 4096 tokens, three repetitions")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    chosen = parser.parse_args()
    lengths = [int(n) for n in chosen.lengths.split(",")] if chosen.lengths else [4096, 8192, 16384, 32768]
    timed = 4096 if chosen.quick else 8192
    if chosen.lengths:
        timed = lengths[max(len(lengths) - 3, 0)]
    report = Report(quiet=chosen.json)
    count_flops(report, max(lengths[-1] // CHUNK, 1) * CHUNK)
    measure_memory(report, lengths)
    measure_tiles(report)
    measure_time(report, timed, repetitions=3 if chosen.quick else 5)
    passed = all(f["pass"] is not False for f in report.figures.values())
    finite = {k: v for k, v in report.figures.items() if not (isinstance(v["value"], float) and math.isnan(v["value"]))}
    print(json.dumps({"pass": passed, "figures": finite}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
