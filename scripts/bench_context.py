"""Attention over 8 simulated devices against its gates: time, FLOPs, bytes, memory. Heads of 128, float32, batch 1.

    python scripts/bench_context.py                           8192 and 16384 tokens, about half an hour on two cores
    python scripts/bench_context.py --quick                   8192 tokens, two repetitions, about five minutes
    python scripts/bench_context.py --lengths 32768 --ways single,ring,local,ringattention --phases forward
    python scripts/bench_context.py --quick --json            only the last line

The ways, each forward and forward with gradient:

    single          blockwise attention of one device       ring            in zigzag order
    ring in order   contiguous pieces                       local           chunks of an eighth of the row: none crosses
    halo            a window of an eighth of the row        gather          all keys to every device
    gspmd           jax.nn.dot_product_attention under jit on arrays that are cut
    ringattention   the PyPI package of that name (0.1.2); left out, saying why, where it does not import

Times are CPU seconds of this process, all ways taking turns, best and median of the repetitions: several devices
simulated on few cores say nothing about wall time. The rest comes from the compiled program: matrix-product FLOPs where
every device goes the most expensive way it can (what devices that wait for each other pay) over the fewest possible,
what one device sends in units of the keys of one device, and temporary memory of one device.

    D3  ring over single                      D4  ringattention over ring: time, FLOPs, bytes; and with grouped keys
    D5  ring over local, against 0.85 of (S + 1) / (C + 1), how many times more pairs it has; judged from chunks of 4096
        on: in short ones the tiles along the diagonal hold many pairs that do not count (`flops` says what that leaves)

The last line is one JSON object with every figure. Exit code 1: a count misses its gate, or a time does by more than a
quarter (a loaded machine moves them by a tenth). Every way that sees everything is also checked against `single`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from irope_jax.attention import Chunked, Global, Sliding, attend, visible_pairs
from irope_jax.attention.mask import MaskSpec
from irope_jax.context.api import attend_sharded
from irope_jax.context.layout import ContextLayout
from irope_jax.context.strategy import ContextConfig
from irope_jax.core.types import TokenInfo
from irope_jax.plan.hlo import analyse
from irope_jax.sharding.mesh import MeshConfig, make_mesh

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_attention import Report, dense, gradient_only, interleaved, temp

PARTS, WIDTH = 8, 128
MEMORY = 8 * 2**30
"""Programs whose devices need more than this together are compiled but not run."""
MARGIN = 1.25
PHASES = {"forward": 4, "forward + gradient": 14}
"""FLOPs per visible pair of places, per query head and number of its width."""
CUT = P(None, "context")


@dataclass(frozen=True)
class Heads:
    query: int
    key: int

    def __str__(self):
        return f"{self.query}q:{self.key}kv"


EQUAL, GROUPED = Heads(4, 4), Heads(8, 2)


@dataclass(frozen=True)
class Way:
    """How attention is done.

    Attributes:
      run: `(q, k, v, info) -> out`.
      mask: what a query sees.
      order: of the tokens on the devices; `None` on one device.
      repeats: keys are repeated until every query head has its own, before anything is timed.
    """

    run: Callable
    mask: MaskSpec
    order: str | None = "contiguous"
    repeats: bool = False

    @property
    def parts(self) -> int:
        return PARTS if self.order else 1


def single(q, k, v, info):
    return attend(q, k, v, info, info, Global(), impl="blockwise")


def ours(mask: MaskSpec, order: str = "contiguous", **config) -> Way:
    context = ContextConfig(layout=order, **config)
    return Way(lambda q, k, v, info: attend_sharded(q, k, v, info, info, mask, context=context), mask, order)


def ringattention(tile: int) -> Callable:
    """The package's attention. Raises ImportError where it does not import."""
    if not hasattr(jax.lib, "xla_bridge"):  # gone since jax 0.8; the package asks it for the platform
        from jax.extend import backend

        jax.lib.xla_bridge = SimpleNamespace(get_backend=backend.get_backend)
    from ringattention import ringattention_jax

    def local(q, k, v):
        size = min(tile, q.shape[1])
        options = {
            "causal_block_size": 1, "deterministic": True, "dropout_rng": None, "attn_pdrop": 0.0,
            "query_chunk_size": size, "key_chunk_size": size, "dtype": jnp.float32, "precision": None,
            "policy": jax.checkpoint_policies.nothing_saveable, "prevent_cse": False,
        }  # fmt: skip
        return ringattention_jax(q, k, v, None, None, None, "context", True, options)

    return lambda q, k, v, info: jax.shard_map(local, in_specs=(CUT,) * 3, out_specs=CUT, check_vma=False)(q, k, v)


def ways(length: int, tile: int) -> tuple[dict[str, Way], dict[str, str]]:
    """The ways by name, and why others are left out."""
    eighth = length // PARTS
    found = {
        "single": Way(single, Global(), order=None),
        "ring": ours(Global(), "zigzag", far="ring"),
        "ring in order": ours(Global(), far="ring"),
        "local": ours(Chunked(eighth), near="local"),
        "halo": ours(Sliding(eighth), near="halo"),
        "gather": ours(Global(), far="gather"),
        "gspmd": Way(lambda q, k, v, info: dense(q, k, v), Global()),
    }
    try:
        return found | {"ringattention": Way(ringattention(tile), Global(), repeats=True)}, {}
    except Exception as error:
        return found, {"ringattention": f"does not import: {type(error).__name__}: {error}"}


class Bench:
    """One way at one length: its inputs where they belong, and its program."""

    def __init__(self, way: Way, heads: Heads, length: int, phase: str, mesh):
        self.way, self.heads, self.length, self.phase = way, heads, length, phase
        self.layout = ContextLayout(way.order, PARTS) if way.order else None
        place = self.layout.place if self.layout else lambda x: x
        where = NamedSharding(mesh, CUT) if self.layout else jax.devices()[0]
        arrays = inputs(heads, length)
        if way.repeats:
            arrays[1:3] = (np.repeat(x, heads.query // heads.key, axis=2) for x in arrays[1:3])
        info = jax.device_put(place(TokenInfo.single(1, length)), where)
        self.arguments = [jax.device_put(place(x), where) for x in arrays]
        self.arguments = self.arguments[: 3 if phase == "forward" else 4]
        wrap = gradient_only if len(self.arguments) == 4 else lambda f: f
        function = jax.jit(lambda info, *arrays: wrap(lambda q, k, v: way.run(q, k, v, info))(*arrays))
        self.arguments.insert(0, info)
        with jax.set_mesh(mesh if self.layout else make_mesh(MeshConfig(data=1), jax.devices()[:1])):
            self.program = function.lower(*self.arguments).compile()
        cost = analyse(self.program.as_text())
        fewest = PHASES[phase] * visible_pairs(way.mask, length) * heads.query * WIDTH
        self.flops = cost.matmul_flops_max * way.parts / fewest
        self.bytes = cost.total_bytes
        self.shards = cost.total_bytes / (length // PARTS * heads.key * WIDTH * 4)
        self.temp = temp(self.program)

    def __call__(self):
        return jax.block_until_ready(self.program(*self.arguments))

    @property
    def fits(self) -> bool:
        return self.temp * self.way.parts <= MEMORY

    def output(self) -> np.ndarray:
        out = np.asarray(self())
        return self.layout.unplace(out) if self.layout else out


def inputs(heads: Heads, length: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [
        random.normal(size=(1, length, n, WIDTH)).astype(np.float32)
        for n in (heads.query, heads.key, heads.key, heads.query)
    ]


class Table(Report):
    """The rows of every way, printed as they come, and the gates."""

    def __init__(self, quiet: bool):
        super().__init__(quiet)
        self.rows, self.missed = [], False

    def line(self, text: str):
        if not self.quiet:
            print(text, flush=True)

    def row(self, name: str, bench: Bench, times: list[float] | None, reference: list[float] | None):
        row = {
            "way": name, "heads": str(bench.heads), "length": bench.length, "phase": bench.phase,
            "flops_over_fewest": bench.flops, "bytes_sent": bench.bytes, "key_shards_sent": bench.shards,
            "temp_bytes": bench.temp,
        }  # fmt: skip
        clock = f"needs {bench.temp * bench.way.parts / 2**30:.0f} GiB: not run"
        if times:
            row |= {"cpu_seconds": times, "best": min(times), "median": statistics.median(times)}
            clock = f"{row['median']:8.2f} {row['best']:8.2f} "
            if reference:
                row["over_single"] = min(times) / min(reference)
                clock += f"{row['over_single']:7.2f}"
        self.rows.append(row)
        self.line(f"  {name:15}{clock:26}{bench.flops:8.3f} {bench.shards:9.2f} {bench.temp / 2**20:9.1f}")

    def count(self, gate: str, what: str, value: float, limit: float, **more):
        """A figure of the compiled program that must be at least `limit`."""
        passed = value >= limit
        self.missed |= not passed
        self.add(gate, what, value, round(limit, 4), passed=passed, **more)

    def time(self, gate: str, what: str, over: list, under: list, *, most=None, least=None, judged=True, **more):
        """A ratio of CPU seconds, best over best; and the median of what the repetitions say."""
        best, middle = min(over) / min(under), statistics.median(a / b for a, b in zip(over, under))
        limit = most or least
        passed = best <= limit if most else best >= limit
        self.missed |= judged and (best > limit * MARGIN if most else best < limit / MARGIN)
        shown = f"{'<=' if most else '>='}{limit:.3g}"
        self.add(gate, what, best, shown if judged else None, passed=passed if judged else None, median=middle, **more)


def measure(
    table: Table, heads: Heads, length: int, phase: str, chosen, repetitions: int, tile: int, mesh, check: bool
):
    """All ways in one case: rows, then gates."""
    table.line(f"\n{phase}, {length} tokens, {heads}{'':6}CPU s median / best / over single; FLOPs, K-shards sent, MiB")
    found, missing = ways(length, tile)
    if heads != EQUAL:
        found = {name: found[name] for name in ("single", "ring", "ringattention") if name in found}
    benches = {n: Bench(way, heads, length, phase, mesh) for n, way in found.items() if not chosen or n in chosen}
    runs = {name: bench for name, bench in benches.items() if bench.fits}
    if check and phase == "forward" and "single" in runs:
        wanted = runs["single"].output()
        for name, bench in runs.items():
            if bench.way.mask == Global():
                np.testing.assert_allclose(bench.output(), wanted, rtol=0, atol=1e-5, err_msg=name)
    times = interleaved(runs, repetitions)
    for name, bench in benches.items():
        table.row(name, bench, times.get(name), times.get("single"))
    for name, why in missing.items():
        table.rows.append({"way": name, "heads": str(heads), "length": length, "phase": phase, "left_out": why})
        table.line(f"  {name:15}{why}")
    gates(table, f"{phase}, {length}, {heads}", heads, length, benches, times)


def gates(table: Table, case: str, heads: Heads, length: int, benches: dict[str, Bench], times: dict[str, list]):
    if {"ring", "single"} <= times.keys():
        table.time("D3", f"ring / single, {case}", times["ring"], times["single"], most=1.15)
    if {"ring", "ringattention"} <= times.keys():
        mine, other = benches["ring"], benches["ringattention"]
        table.time("D4", f"ringattention / ring, {case}", times["ringattention"], times["ring"], least=1.5)
        # twice, but for the tiles along the diagonal
        table.count("D4", f"FLOPs, {case}", other.flops / mine.flops, 2 / (1 + 255 / (length + 1) + 0.001))
        group = heads.query // heads.key
        table.count("D4", f"bytes, {case}", other.bytes / mine.bytes, group * PARTS / (PARTS - 1), sent=mine.shards)
    if {"ring", "local"} <= times.keys():
        ideal = (length + 1) / (length // PARTS + 1)
        flops = ideal * benches["ring"].flops / benches["local"].flops
        table.time(
            "D5", f"ring / local, {case}", times["ring"], times["local"], least=0.85 * ideal,
            judged=length // PARTS >= 4096, flops=flops,
        )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", help="comma-separated (default 8192,16384; 8192 with --quick)")
    parser.add_argument("--ways", help="comma-separated (default: all)")
    parser.add_argument("--phases", help="comma-separated of: forward, forward + gradient (default: both)")
    parser.add_argument("--heads", choices=("equal", "grouped"), help="4q:4kv or 8q:2kv only (default: both)")
    parser.add_argument("--repetitions", type=int, help="after one to warm up (default 3; 2 with --quick)")
    parser.add_argument("--tile", type=int, default=256, help="block length of ringattention")
    parser.add_argument("--quick", action="store_true", help="8192 tokens, two repetitions")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    chosen = parser.parse_args()
    lengths = [int(n) for n in (chosen.lengths or ("8192" if chosen.quick else "8192,16384")).split(",")]
    phases = [p.strip() for p in chosen.phases.split(",")] if chosen.phases else list(PHASES)
    names = {n.strip() for n in chosen.ways.split(",")} if chosen.ways else None
    repetitions = chosen.repetitions or (2 if chosen.quick else 3)
    table, mesh = Table(quiet=chosen.json), make_mesh(MeshConfig(data=1, context=PARTS))
    for length in lengths:
        for heads in (EQUAL, GROUPED):
            if chosen.heads in (None, "equal" if heads == EQUAL else "grouped"):
                for phase in phases:
                    check = length == lengths[0]
                    measure(table, heads, length, phase, names, repetitions, chosen.tile, mesh, check)
    load = os.getloadavg()
    table.line(f"\nload of the machine at the end: {load[0]:.1f}, {load[1]:.1f}, {load[2]:.1f}")
    print(json.dumps({"pass": not table.missed, "load": load, "figures": table.figures, "rows": table.rows}))
    return 1 if table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
