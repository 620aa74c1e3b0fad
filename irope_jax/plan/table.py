"""The compiler's figures and the closed form side by side, as text for people and as plain values for programs."""

from __future__ import annotations

from dataclasses import asdict

from irope_jax.core.chips import ASSUMED_HOST, Chip
from irope_jax.plan.job import Failure, Figures, Job, Roofline, roofline, timed

FLAG = 0.10
"""A larger difference between the two is marked."""

ROWS = (
    ("parameters", "parameters"),
    ("optimizer", "optimizer"),
    ("kept", "activations kept"),
    ("cache", "KV cache"),
)


def plan_lines(
    job: Job, target: str, chip: Chip | None, compiled: Figures | Failure | None, by_hand: Figures
) -> list[str]:
    """One target: memory, work, time. `compiled` is None where no compiler was asked."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in job.mesh.sizes.items() if size > 1) or "one device"
    what = {"train": "a training step", "prefill": f"a piece of {job.piece:,} tokens into a cache", "decode": "a token"}
    rows = job.data.batch_size if job.mode == "train" else job.rows
    lines = [f"{target}: {what[job.mode]}, {rows} x {job.length:,} tokens, {mesh}"]
    if isinstance(compiled, Failure):
        lines.append(f"  does not compile: {compiled.why}")
        compiled = None
    lines += [f"  {line}" for line in _memory(chip, compiled, by_hand)]
    lines += [f"  {line}" for line in _work(compiled, by_hand)]
    if chip is not None:
        lines += [f"  {line}" for line in _time(timed(compiled, by_hand), chip)]
    if compiled is not None and compiled.seconds:
        lines.append(f"  traced in {compiled.seconds[0]:.0f} s, compiled in {compiled.seconds[1]:.0f} s")
    return lines


def _memory(chip: Chip | None, compiled: Figures | None, by_hand: Figures) -> list[str]:
    rows = [("bytes a device", "compiler", "by hand", "")]
    for name, label in ROWS:
        pair = tuple(None if one is None else getattr(one, name) for one in (compiled, by_hand))
        if any(pair):
            rows.append((label, _giga(pair[0]), _giga(pair[1]), flag(*pair)))
    rest = tuple(
        None if one is None or one.temporaries is None else one.temporaries - (one.kept or 0)
        for one in (compiled, by_hand)
    )
    if any(rest):
        rows.append(("other temporaries", *map(_giga, rest), ""))
    if compiled is not None:
        others = compiled.total - compiled.temporaries - compiled.parameters - compiled.optimizer - compiled.cache
        rows.append(("batch, outputs", _giga(max(others, 0)), "", ""))
        rows.append(("all", _giga(compiled.total), _giga(by_hand.total), fits(compiled.total, chip)))
    else:
        rows.append(("all", "", _giga(by_hand.total), fits(by_hand.total, chip)))
    if by_hand.host or (compiled is not None and compiled.host):
        rows.append(("on the host", _giga(None if compiled is None else compiled.host), _giga(by_hand.host), ""))
    return _columns(rows)


def _unsure(compiled: Figures | None) -> bool:
    return compiled is not None and compiled.unknown_trips > 0


def fits(total: float, chip: Chip | None) -> str:
    """`fits 95 GB`, `short by 3.2 GB of 95`."""
    if chip is None or not chip.memory:
        return ""
    if total <= chip.memory:
        return f"fits {chip.memory / 1e9:.0f} GB ({total / chip.memory:.0%})"
    return f"short by {(total - chip.memory) / 1e9:.1f} GB of {chip.memory / 1e9:.0f}"


def _work(compiled: Figures | None, by_hand: Figures) -> list[str]:
    of = lambda name: tuple(None if one is None else getattr(one, name) for one in (compiled, by_hand))
    rows = [("work of a device", "compiler", "by hand", "")]
    rows.append(("FLOPs", *(_number(x) for x in of("flops")), "" if _unsure(compiled) else flag(*of("flops"))))
    if compiled is not None and compiled.kernel_flops:
        rows.append(("  of them in kernels", _number(compiled.kernel_flops), "", ""))
    rows.append(("memory traffic, at least", "", _giga(by_hand.traffic), ""))
    rows.append(("sent", *(_giga(x) for x in of("sent_bytes")), flag(*of("sent_bytes"))))
    for kind in sorted({*by_hand.sent, *(compiled.sent if compiled else ())}):
        pair = tuple(None if one is None else one.sent.get(kind, 0.0) for one in (compiled, by_hand))
        rows.append((f"  {kind}", *(_giga(x) for x in pair), ""))
    for layer in sorted({*by_hand.sent_by, *(compiled.sent_by if compiled else ())}):
        pair = tuple(None if one is None else one.sent_by.get(layer, 0.0) for one in (compiled, by_hand))
        rows.append((f"  {layer or 'outside layers'}", *(_giga(x) for x in pair), ""))
    lines = _columns(rows)
    if compiled is not None and compiled.unknown_trips:
        lines.append(f"{compiled.unknown_trips} loops of unknown length are counted once: the time takes FLOPs by hand")
    return lines


def _time(figures: Figures, chip: Chip) -> list[str]:
    found = roofline(figures, chip)
    rates = [
        ("compute", found.compute, f"{chip.bf16_flops / 1e12:.0f} TFLOP/s"),
        ("memory", found.memory, f"{chip.bandwidth / 1e9:.0f} GB/s"),
        ("network", found.network, f"{chip.link / 1e9:.0f} GB/s a link, {chip.links} for a collective"),
    ]
    if found.host:
        rates.append(("host", found.host, f"{chip.host / 1e9:.0f} GB/s" + " (assumed)" * (chip.host == ASSUMED_HOST)))
    words = [f"{name} {_seconds(seconds)} at {rate}" for name, seconds, rate in rates if seconds is not None]
    bound = f"bound by {found.bound}: at least {_seconds(found.seconds)} a step"
    return [f"time: {'; '.join(words)} ({chip.source})", bound]


def flag(compiled: float | None, by_hand: float | None) -> str:
    """Words where the two are further apart than `FLAG`."""
    if compiled is None or by_hand is None or compiled == by_hand:
        return ""
    difference = (by_hand - compiled) / max(abs(compiled), 1e-9)
    return "" if abs(difference) <= FLAG else f"DIFFER: by hand {difference:+.0%}"


def as_values(job: Job, target: str, chip: Chip | None, compiled: Figures | Failure | None, by_hand: Figures) -> dict:
    """For `--json`: bytes, FLOPs and seconds as numbers."""
    best: Figures = compiled if isinstance(compiled, Figures) else by_hand
    found: Roofline | None = None if chip is None else roofline(timed(compiled, by_hand), chip)
    values = {
        "target": target, "mode": job.mode, "seq_len": job.length, "mesh": job.mesh.sizes, "devices": job.devices,
        "rows": job.data.batch_size if job.mode == "train" else job.rows, "by_hand": asdict(by_hand),
        "compiled": asdict(compiled) if isinstance(compiled, Figures) else None,
        "error": asdict(compiled) if isinstance(compiled, Failure) else None,
        "chip": None if chip is None else asdict(chip),
        "roofline": None if found is None else {**asdict(found), "bound": found.bound, "in_turn": found.in_turn},
    }  # fmt: skip
    if chip is not None:
        values["fits"] = not isinstance(compiled, Failure) and best.total <= chip.memory
    return values


def _giga(count: float | None) -> str:
    if count is None:
        return ""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _number(count: float | None) -> str:
    return "" if count is None else f"{count:.3g}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _columns(rows: list[tuple[str, str, str, str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}  {d}".rstrip() for a, b, c, d in rows]
