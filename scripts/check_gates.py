"""The gates of context parallelism: FLOPs, bytes sent and memory of compiled programs against closed forms.

    python scripts/check_gates.py                 all gates; a few minutes of two CPU cores
    python scripts/check_gates.py A1 B2           some of them
    python scripts/check_gates.py C1 --json       for programs

Compiles for up to 512 simulated devices (and, where libtpu is installed, for described TPU chips) and runs nothing.
A1-A4 count matrix-product FLOPs, B1-B5 bytes sent, C1-C5 look at memory and the size of programs. 4 query and 4 key
heads of width 128 in float32 unless a line says otherwise; whole models have 4 query and 2 key heads of width 64.
Exit status 1 if a gate fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from irope_jax.attention.mask import Chunked, Sliding
from irope_jax.losses import TILE
from irope_jax.plan.targets import TargetError, target_mesh, targeting
from irope_jax.sharding.mesh import MeshConfig
from scripts.gate_programs import Layer, Measured, Model, decoder, layer, layer_on, train_step

DEVICES = 512
"""Simulated devices."""

PIECE = 16_384
"""Tokens per device."""

BLOCK = 512
"""Largest side of a tile that a count of FLOPs may show."""

TPU = "v5p:2x2x1"
"""Described chips on which bfloat16 is sent as it is; the simulated ones send it as float32."""

LONG, SHORT = Model(64, 1_048_576), Model(8, 131_072)
"""Whole models of 8 iRoPE layers."""

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      gate: its name.
      what: which program, and which figure.
      measured, threshold: as shown.
      ok: whether it holds; `None` if it could not be measured here.
    """

    gate: str
    what: str
    measured: str
    threshold: str
    ok: bool | None


def exactly(gate: str, what: str, measured: float, wanted: float, unit: str = "") -> Row:
    return Row(gate, what, f"{measured:,.10g}{unit}", f"= {wanted:,.10g}{unit}", measured == wanted)


def at_most(gate: str, what: str, measured: float, most: float, unit: str = "", also: bool = True) -> Row:
    """`also`: another condition, told in `what`."""
    return Row(gate, what, f"{measured:,.5f}{unit}", f"<= {most:,.5f}{unit}", measured <= most and also)


def between(gate: str, what: str, measured: float, low: float, high: float) -> Row:
    return Row(gate, what, f"{measured:.4f}", f"{low:.4g} to {high:.4g}", low <= measured <= high)


def flops(spec: Layer) -> float:
    """Counted over least, all devices together."""
    return layer(spec).cost.matmul_flops_max * spec.parts / spec.minimum


def sent(spec: Layer) -> float:
    """K-shards that a device sends."""
    return layer(spec).cost.total_bytes / spec.shard


def ring(parts: int, **how) -> Layer:
    return Layer(parts, how.pop("length", parts * PIECE), **how)


def a1(length: int = 131_072) -> list[Row]:
    most = 1 + (BLOCK - 1) / (length + 1) + 0.001
    rows = []
    for parts, where in ((1, "one device"), (8, "ring of 8")):
        for phase in ("forward", "both"):
            spec = Layer(parts, length, phase)
            known = layer(spec).cost.unknown_trips == 0
            what = f"global layer, {where}, {length:,} tokens, {phase}: FLOPs / least, every loop counted"
            rows.append(at_most("A1", what, flops(spec), most, also=known))
    return rows


def a2(length: int = 131_072, chunk: int = 8192) -> list[Row]:
    what = f"chunks of {chunk}, 8 devices, {length:,} tokens, "
    specs = [Layer(8, length, phase, Chunked(chunk)) for phase in ("forward", "both")]
    return [at_most("A2", what + f"{spec.phase}: FLOPs / least", flops(spec), 1.04) for spec in specs]


def attention_flops(measured: Measured, *phases: str) -> float:
    """FLOPs of products of attention, not of projections."""
    works = measured.cost.products
    return sum(w.total for w in works if "attention/attend/" in w.scope and w.phase in phases)


def a3(model: Model = LONG) -> list[Row]:
    """Three quarters local, one quarter global, as in Scout: 36 and 12 layers have the same ratio."""
    pair = model.query_heads * model.width
    counted = train_step(model)
    trained = attention_flops(counted, "forward", "backward") * model.parts / (14 * pair * model.pairs())
    again = attention_flops(counted, "recomputed") * model.parts / (4 * pair * model.pairs())
    where = f"{model.layers} iRoPE layers, {model.length:,} tokens, {model.parts} devices, training step: "
    dense = model.layers * model.length**2 / (model.pairs() * trained)
    return [
        at_most("A3", where + "attention FLOPs / least", trained, 1.05),
        at_most("A3", where + "those of recomputation / one forward pass", again, 1.05),
        between("A3", where + "masked dense attention / attention", dense, 7.5, 8.0),
    ]


def a4(parts: int = 64, length: int | None = None) -> list[Row]:
    rows, length = [], length or parts * PIECE
    for phase in ("forward", "both"):
        cost = layer(Layer(parts, length, phase)).cost
        what = f"zigzag ring of {parts}, {phase}: least / most FLOPs of any device at any hop"
        rows.append(exactly("A4", what, cost.matmul_flops_min / cost.matmul_flops_max, 1))
    spec = Layer(parts, length, layout="contiguous")
    wanted = 2 - 1 / parts
    what = f"contiguous ring of {parts}, forward: FLOPs in lockstep / least (2 - 1/{parts})"
    return [*rows, between("A4", what, flops(spec), 0.99 * wanted, 1.01 * wanted)]


def b1(*rings: int, piece: int = PIECE) -> list[Row]:
    specs = [ring(parts, length=parts * piece) for parts in rings or (8, 64)]
    what = "zigzag ring of {}, forward: K-shards a device sends"
    return [exactly("B1", what.format(spec.parts), sent(spec), 2 * (spec.parts - 1)) for spec in specs]


def b2(*rings: int, piece: int = PIECE) -> list[Row]:
    specs = [ring(parts, length=parts * piece, phase="backward") for parts in rings or (8, 64)]
    what = "zigzag ring of {}, backward alone: K-shards a device sends"
    return [exactly("B2", what.format(spec.parts), sent(spec), 4 * (spec.parts - 1)) for spec in specs]


def b2_tpu(parts: int = 4, piece: int = 2048) -> list[Row]:
    """Keys in bfloat16, compiled by the TPU compiler."""
    cases = [("forward", "float32", 2), ("backward", "float32", 6), ("backward", "keys", 4)]
    name = "{}, {}, bfloat16, gradients travel as {}: bfloat16 K-shards a device sends".format
    try:
        mesh = target_mesh(TPU, MeshConfig(data=1, context=parts))
    except TargetError as error:
        return [Row("B2", name(TPU, "all", "either"), f"not measured: {error}", "", None)]
    rows = []
    for phase, gradients, factor in cases:
        spec = Layer(parts, parts * piece, phase, dtype="bfloat16", gradients=gradients)
        with targeting(mesh):
            found = layer_on(spec, mesh).cost.total_bytes / spec.shard
        rows.append(exactly("B2", name(f"ring of {parts} on {TPU}", phase, gradients), found, factor * (parts - 1)))
    return rows


def b3(parts: int = 8, chunk: int = 8192, window: int = 4096) -> list[Row]:
    rows = []
    for layout, runs in (("contiguous", 1), ("zigzag", 2)):
        aligned = Layer(parts, parts * runs * chunk, mask=Chunked(chunk), layout=layout)
        crossed = Layer(parts, parts * runs * chunk * 3 // 4, mask=Chunked(chunk), layout=layout, near="halo")
        slid = Layer(parts, parts * runs * chunk, mask=Sliding(window), layout=layout, near="halo")
        for phase in ("forward", "backward"):
            where = f"{layout}, {parts} devices, {phase}: "
            rows.append(exactly("B3", f"chunks of {chunk} dividing runs, {where}bytes", _bytes(aligned, phase), 0))
            halo = _bytes(crossed, phase) / crossed.kappa / runs
            rows.append(at_most("B3", f"chunks of {chunk} across runs, {where}tokens sent per run", halo, chunk - 1))
            # nothing comes before row 0, and where the zigzag turns, both runs lie on one device
            exact = (window - 1) * runs * (parts - 1) / parts
            rows.append(
                exactly("B3", f"window of {window}, {where}tokens sent, mean", _bytes(slid, phase) / slid.kappa, exact)
            )
    return rows


def _bytes(spec: Layer, phase: str) -> float:
    return layer(replace(spec, phase=phase)).cost.total_bytes


def b4(model: Model = SHORT, trained: Model | None = LONG) -> list[Row]:
    cost, where = decoder(model).cost, f"decoder of {model.layers} iRoPE layers, {model.parts} devices, forward: "
    rings = cost.bytes_by("layer", "kind").get(("layer_3", "collective-permute"), 0)
    gathered = decoder(replace(model, gather=True)).cost.total_bytes
    rows = [
        exactly("B4", where + "bytes of its global layers / B1", rings / model.ring_bytes, model.periods),
        exactly(
            "B4",
            where + "bytes of everything else / weights and look-up",
            (cost.total_bytes - rings) / model.sync_bytes,
            1,
        ),
        at_most("B4", where + "bytes / with keys gathered in every layer", cost.total_bytes / gathered, 0.25),
    ]
    return rows + (b4_train(trained) if trained else [])


def b4_train(model: Model) -> list[Row]:
    cost, where = train_step(model).cost, f"training step, {model.layers} layers, {model.parts} devices: "
    by = cost.bytes_by("layer", "kind", "phase")
    permuted = {
        (at, phase): n / model.ring_bytes for (at, kind, phase), n in by.items() if kind == "collective-permute"
    }
    forward = permuted.pop(("layer_3", "forward"), 0)
    backward = permuted.pop(("layer_3", "backward"), 0) + permuted.pop(("layer_3", "recomputed"), 0)
    # recomputation turns the ring once more, the backward pass sends twice as much; the first hop of keys and values is
    # the same in all three, so that up to two of them may be left out
    least = model.periods * (3 - 2 / (model.parts - 1))
    synced = sum(n for (_, kind, _), n in by.items() if kind != "collective-permute")
    parts = model.parameters
    whole = 4 * (sum(parts.values()) + parts["embedding"])  # the tied embedding has two gradients
    # gathered forward and backward, and gradients reduced; ids and columns of the look-up besides
    share = synced / (3 * (model.parts - 1) / model.parts * whole)
    return [
        exactly("B4", where + "bytes of global layers forward / B1", forward, model.periods),
        between("B4", where + "recomputed and backward / B1", backward, least, 3 * model.periods),
        exactly("B4", where + "bytes of keys anywhere else", sum(permuted.values()), 0),
        at_most("B4", where + "other bytes / two gathers and one reduction of parameters", share, 1.03),
    ]


def b5(parts: int = 8, *lengths: int) -> list[Row]:
    rows = []
    for length in lengths or (131_072, 1_048_576):
        spec = Layer(parts, length, queries=1)
        wanted = 2 * (parts - 1) / parts * spec.query_heads * (spec.width + 2) * 4
        what = f"decoding, {length:,} keys on {parts} devices, global layer: bytes per token"
        rows.append(exactly("B5", what, layer(spec).cost.total_bytes, wanted))
    spec = Layer(parts, 8192, mask=Chunked(8192), queries=1)
    return [*rows, exactly("B5", "decoding, chunk-local layer: bytes per token", layer(spec).cost.total_bytes, 0)]


def c1(*rings: int, piece: int = PIECE, phases: tuple[str, ...] = ("forward", "both")) -> list[Row]:
    rings, rows = rings or (8, 64, 256), []
    for phase in phases:
        temps = [layer(ring(parts, length=parts * piece, phase=phase)).temp for parts in rings]
        what = f"rings of {', '.join(map(str, rings))}, {piece:,} tokens a device, {phase}: most / least memory"
        rows.append(at_most("C1", f"{what} ({max(temps) / MIB:.1f} MiB)", max(temps) / min(temps), 1.01))
    return rows


def c2(*lengths: int, phases: tuple[str, ...] = ("forward", "both")) -> list[Row]:
    lengths, rows = lengths or (131_072, 262_144, 524_288, 1_048_576), []
    for phase in phases:
        specs = [Layer(8, length, phase) for length in lengths]
        found = [layer(spec) for spec in specs]
        where = f"ring of 8, {lengths[0]:,} to {lengths[-1]:,} tokens, {phase}: "
        slope = _slope(lengths, [m.temp for m in found])
        rows.append(between("C2", where + "slope of log memory over log length", slope, 0.95, 1.02))
        squares = sum(len(m.squares(spec.local // 2)) for m, spec in zip(found, specs))
        rows.append(exactly("C2", where + "arrays with two axes as long as half a piece", squares, 0))
        largest = max(m.largest / (spec.local * spec.query_heads * spec.width) for m, spec in zip(found, specs))
        rows.append(at_most("C2", where + "largest array / a device's queries", largest, 2))
    return rows


def _slope(xs, ys) -> float:
    """Least squares in logarithms."""
    xs, ys = ([math.log(value) for value in values] for values in (xs, ys))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys)) / sum((a - x) ** 2 for a in xs)


def c3(parts: int = 8) -> list[Row]:
    what = "ring of {}, {:,} tokens a device, {}: KB of memory per token"
    return [
        at_most("C3", what.format(parts, PIECE, phase), layer(ring(parts, phase=phase)).temp / PIECE / 1000, most)
        for phase, most in (("forward", 11), ("both", 26))
    ]


def c4(model: Model = LONG) -> list[Row]:
    found, terms = train_step(model), step_memory(model)
    where = f"training step, {model.layers} layers, {model.length:,} tokens, {model.parts} devices: "
    said = ", ".join(f"{name} {size / MIB:.0f}" for name, size in terms.items())
    logits = [s for s in found.shapes if model.vocabulary in s and math.prod(s) >= model.local * model.vocabulary]
    return [
        at_most(
            "C4", f"{where}memory {found.temp / MIB:.0f} MiB / sum of {said}", found.temp / sum(terms.values()), 1.5
        ),
        exactly("C4", where + "arrays as large as a device's logits", len(logits), 0),
        exactly("C4", where + "arrays with two axes as long as half a piece", len(found.squares(model.local // 2)), 0),
    ]


def step_memory(model: Model) -> dict[str, float]:
    """Bytes a device needs beside state and batch; 4 per number.

    A rematerialised layer needs its own activations only, but nothing tells XLA:CPU to recompute one layer after the
    other: those of a whole period are there at a time.
    """
    tokens, heads, keys = model.local, model.query_heads * model.width, model.key_heads * model.width
    residual = 4 * tokens * model.d_model
    # normed input, q k v, attention's output, the sum, its norm
    layer_activations = 4 * tokens * (4 * model.d_model + 2 * heads + 2 * keys)
    # q, dq, out and dout in the kernel's order; k v here and coming, their gradients fresh, travelling and coming
    one_ring = 4 * tokens * (4 * heads + 10 * keys)
    return {
        "layer inputs": model.layers * residual,
        "a period again": 4 * layer_activations,
        "gradients in a layer": layer_activations,
        "a ring": one_ring,
        "hidden states": 2 * residual,
        "logits of a chunk": 2 * 4 * TILE,
        "weights' gradients": 4 * sum(model.parameters.values()),
    }


def c5(
    parts: int = 512, length: int = 10_485_760, timed: bool = True, phases: tuple[str, ...] = ("forward", "both")
) -> list[Row]:
    rows = []
    for phase in phases:
        few, many = (layer(ring(n, phase=phase)).cost.instructions for n in (8, 256))
        rows.append(exactly("C5", f"ring of 256, {phase}: instructions beside a ring of 8", many, few))
    found = layer(Layer(parts, length))
    what = f"global layer, {length:,} tokens, {parts} devices: CPU-seconds to compile ({found.temp / MIB:.0f} MiB)"
    return rows + ([at_most("C5", what, found.seconds, 5)] if timed else [])


GATES: dict[str, Callable[[], list[Row]]] = {
    "A1": a1, "A2": a2, "A3": a3, "A4": a4, "B1": b1, "B2": lambda: b2() + b2_tpu(), "B3": b3, "B4": b4, "B5": b5,
    "C1": c1, "C2": c2, "C3": c3, "C4": c4, "C5": c5,
}  # fmt: skip


def line(row: Row) -> str:
    verdict = {True: "ok", False: "FAIL", None: "-"}[row.ok]
    return f"{row.gate:<3} {row.what:<118} {row.measured:>22} {row.threshold:>22}  {verdict}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gates", nargs="*", metavar="gate", help=f"of {' '.join(GATES)}; all by default")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of lines")
    chosen = parser.parse_args()
    names = [name.upper() for name in chosen.gates] or list(GATES)
    if unknown := [name for name in names if name not in GATES]:
        parser.error(f"no gate {unknown[0]}; there are {', '.join(GATES)}")
    # before the first device is asked for, which is when XLA reads its flags
    jax.config.update("jax_platforms", "cpu")
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    rows = []
    for name in names:
        found = GATES[name]()
        rows += found
        if not chosen.json:
            print(*map(line, found), sep="\n", flush=True)
    if chosen.json:
        print(json.dumps([asdict(row) for row in rows]))
    return 0 if all(row.ok is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
