"""How long a context fits where: Scout and an 8B at 128K, 1M and 10M tokens, trained, read and decoded.

    python experiments/max_context/fits.py                    # every cell by hand: half a minute, no compiler
    python experiments/max_context/fits.py --compile=quick    # and ask the compiler about those of CONFIRMED: minutes
    python experiments/max_context/fits.py --compile=all      # those too that take tens of minutes

One row of tokens, so the devices share the sequence (`context`) and the heads (`tensor`). For each cell every way to
cut and, for training, three presets of rematerialisation are counted in closed form; the fastest that fits stands in
the table, else the one that is least short. Nothing is executed. Writes report.md and fits.png; what the compiler said
is kept in compiled.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from irope_jax.attention.mask import Global
from irope_jax.core.chips import Chip
from irope_jax.core.config import ConfigError
from irope_jax.experiment import Experiment, load_config, resolve
from irope_jax.model.config import irope_layers
from irope_jax.plan.analytic import closed_form
from irope_jax.plan.job import Failure, Figures, Job, chip_of_target, compiler_of_target, roofline, target_size
from irope_jax.plan.meshes import ROOM
from irope_jax.plan.stored import ask, recall
from irope_jax.sharding.mesh import MeshConfig
from irope_jax.study import plots

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
COMPILED = HERE / "compiled.jsonl"

LENGTHS = {"128K": 131_072, "1M": 1_048_576, "10M": 10_485_760}
TARGETS = (
    "h100:1", "h100:4", "h100:8",
    "v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16",
    "v6e:2x2", "v6e:4x4", "v6e:8x8", "v6e:16x16",
    "v5p:2x2x1", "v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x8", "v5p:8x8x16",
)  # fmt: skip
MODELS = ("Scout", "Scout, all global", "8B, iRoPE", "8B, all global")
BITS = {"bf16": 16, "int8": 8, "4-bit": 4}
"""Of weights that are only read. This project computes with float weights: the other two are arithmetic."""

KINDS = {
    # name: mode, weights, cache
    "train": ("train", None, "bfloat16"),
    "prefill, bf16 weights, bf16 cache": ("prefill", "bf16", "bfloat16"),
    **{
        f"decode, {weights} weights, {cache} cache": ("decode", weights, numbers)
        for weights in BITS
        for cache, numbers in (("bf16", "bfloat16"), ("int8", "int8"))
    },
}

CONFIRMED = {
    # (model, kind, target, length): how long a compile takes on two cores
    ("Scout", "decode, bf16 weights, bf16 cache", "v5p:2x2x2", "10M"): "quick",
    ("Scout", "decode, bf16 weights, bf16 cache", "v5p:2x2x1", "1M"): "quick",
    ("Scout", "prefill, bf16 weights, bf16 cache", "v5p:4x4x4", "10M"): "quick",
    ("8B, iRoPE", "decode, bf16 weights, bf16 cache", "v5e:4x4", "1M"): "quick",
    ("8B, all global", "decode, bf16 weights, bf16 cache", "v5e:4x4", "1M"): "quick",
    ("Scout", "train", "v5p:4x4x4", "1M"): "slow",
    ("Scout", "train", "v5p:8x8x16", "10M"): "slow",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The best way found. Bytes a device.

    Attributes:
      verdict: `fits`, `tight` or `short`.
      total: what is counted by hand; in training with a fit of temporaries.
      memory: of the chip.
      seconds: a roofline of a step, a piece of 2,048 tokens or a token.
    """

    model: str
    kind: str
    target: str
    length: str
    mesh: str
    verdict: str
    total: float
    memory: float
    seconds: float

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.model, self.kind, self.target, self.length


def experiment_of(model: str) -> Experiment:
    """With a single row a step."""
    file = "llama4_scout.py:1m" if model.startswith("Scout") else "llama3_8b.py"
    experiment = resolve(load_config(str(CONFIGS / file)), [("data.batch_size", "1")])
    pattern = experiment.model.pattern
    if model == "Scout, all global":
        pattern = tuple(replace(layer, mask=Global()) for layer in pattern)
    if model == "8B, iRoPE":
        pattern = irope_layers(8192, pattern[0].ffn)
        experiment = replace(
            experiment, data=replace(experiment.data, packing=replace(experiment.data.packing, document_multiple=8192))
        )
    return replace(experiment, model=replace(experiment.model, pattern=pattern))


def jobs(experiment: Experiment, kind: str, devices: int, length: int) -> Iterator[Job]:
    """Every way to cut one row over so many devices."""
    mode, _, numbers = KINDS[kind]
    for tensor in (1, 2, 4, 8):
        if devices % tensor:
            continue
        mesh = MeshConfig(data=1, context=devices // tensor, tensor=tensor)
        for remat in ("attention", "full", "offload") if mode == "train" else ("full",):
            precision = replace(experiment.model.precision, params="float32" if mode == "train" else "bfloat16")
            model = replace(experiment.model, remat=remat, precision=precision)
            data = replace(experiment.data, seq_len=length)
            yield Job(model=model, data=data, train=experiment.train, mesh=mesh, mode=mode, numbers=numbers)


def counted(job: Job, weights: str | None, target: str) -> Figures:
    """By hand, with weights of so many bits."""
    found = closed_form(job, compiler=compiler_of_target(target))
    if weights is None:
        return found
    smaller = found.parameters * (1 - BITS[weights] / 16)
    return replace(
        found, parameters=found.parameters - smaller, total=found.total - smaller, traffic=found.traffic - smaller
    )


def ways(experiment: Experiment, kind: str, target: str, length: int) -> list[tuple[Job, Figures, float]]:
    """`(job, figures, seconds)`, best first."""
    chip, found = chip_of_target(target), []
    for job in jobs(experiment, kind, target_size(target), length):
        try:
            figures = counted(job, KINDS[kind][1], target)
        except ConfigError:
            continue  # cannot be cut so
        found.append((job, figures, roofline(figures, chip).in_turn))
    limit = ROOM * chip.memory
    return sorted(found, key=lambda one: (one[1].total > limit, one[2] if one[1].total <= limit else one[1].total))


def verdict(total: float, chip: Chip) -> str:
    return "fits" if total <= ROOM * chip.memory else "tight" if total <= chip.memory else "short"


def mesh_name(job: Job) -> str:
    sizes = " x ".join(f"{axis} {size}" for axis, size in job.mesh.sizes.items() if size > 1) or "one device"
    return sizes + (f", {job.model.remat}" if job.mode == "train" else "")


def count_all() -> list[Cell]:
    cells, began = [], time.monotonic()
    experiments = {model: experiment_of(model) for model in MODELS}
    total = len(MODELS) * len(KINDS) * len(TARGETS) * len(LENGTHS)
    for model, experiment in experiments.items():
        for kind in KINDS:
            for target in TARGETS:
                for name, length in LENGTHS.items():
                    found = ways(experiment, kind, target, length)
                    if not found:
                        continue
                    (job, figures, seconds), chip = found[0], chip_of_target(target)
                    cells.append(
                        Cell(
                            model=model,
                            kind=kind,
                            target=target,
                            length=name,
                            mesh=mesh_name(job),
                            memory=chip.memory,
                            verdict=verdict(figures.total, chip),
                            total=figures.total,
                            seconds=seconds,
                        )
                    )
        print(
            f"{model}: {len(cells):,} of {total:,} cells, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True
        )
    return cells


def compile_some(which: str) -> None:
    """Ask the compiler, one after the other; each is stored as it is done."""
    known = {tuple(row["key"]): row for row in read(COMPILED)}
    for key, pace in CONFIRMED.items():
        if pace == "slow" and which != "all":
            continue
        model, kind, target, length = key
        job, by_hand, _ = ways(experiment_of(model), kind, target, LENGTHS[length])[0]
        print(f"{', '.join(key)}: {mesh_name(job)} ...", file=sys.stderr, flush=True)
        found = recall(job, target) or ask(job, target)
        row = {"key": list(key), "mesh": mesh_name(job), "by_hand": by_hand.total}
        row |= {"why": found.why} if isinstance(found, Failure) else {"total": found.total, "seconds": found.seconds}
        known[key] = row
        write(COMPILED, [known[key] for key in CONFIRMED if key in known])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def said(cell: Cell | None) -> str:
    if cell is None:
        return "cannot be cut so"
    total = f"{cell.total / 1e9:,.0f} GB"
    if cell.verdict == "short":
        return f"short by {(cell.total - cell.memory) / 1e9:,.0f} GB"
    return f"**{total}**, {cell.mesh}" if cell.verdict == "fits" else f"tight: {total}, {cell.mesh}"


def page(cells: dict[tuple, Cell]) -> str:
    text = [
        "# What fits where",
        "Bytes a device by hand: what is held from step to step and, in training, gradients, what waits for the "
        f"backward pass and a fit of what lives within a layer. Bold: at most {ROOM:.0%} of the chip's memory; tight: "
        "at most all of it. The mesh is the fastest that fits. One row of tokens; training with AdamW, all in float32.",
        "![share of a chip's memory, by model, target and length](fits.png)",
    ]
    rows = read(COMPILED)
    if rows:
        text += [
            "## What the compiler says",
            "| cell | mesh | by hand | compiler | compiled in |\n|---|---|---|---|---|",
        ]
        for row in rows:
            told = f"{row['total'] / 1e9:.1f} GB | {row['seconds'][1]:.0f} s" if "total" in row else f"{row['why']} | "
            text[-1] += f"\n| {', '.join(row['key'])} | {row['mesh']} | {row['by_hand'] / 1e9:.1f} GB | {told} |"
    for kind in KINDS:
        text.append(f"## {kind[0].upper() + kind[1:]}")
        for model in MODELS:
            lines = [f"| {model} | {' | '.join(LENGTHS)} |", "|---" * (1 + len(LENGTHS)) + "|"]
            for target in TARGETS:
                found = [said(cells.get((model, kind, target, length))) for length in LENGTHS]
                lines.append(f"| {target} | {' | '.join(found)} |")
            text.append("\n".join(lines))
    slow = any(CONFIRMED[tuple(row["key"])] == "slow" for row in rows)
    asked = f" --compile={'all' if slow else 'quick'}" * bool(rows)
    text += [
        "## How this page was made",
        f"```bash\npython experiments/max_context/fits.py{asked}\n```",
    ]
    return "\n\n".join(text) + "\n"


SHOWN = ("train", "decode, bf16 weights, bf16 cache", "decode, 4-bit weights, int8 cache")


def draw(cells: dict[tuple, Cell], path: Path) -> None:
    """A panel for each kind and model: how much of a chip is taken."""
    pyplot = plots.pyplot()
    from matplotlib.colors import BoundaryNorm, ListedColormap

    figure, grid = pyplot.subplots(
        len(SHOWN), len(MODELS), figsize=(10, 10), sharex=True, sharey=True, layout="constrained"
    )
    colours = ListedColormap(["#2b8a57", "#e8b23a", "#e9a3a0", "#b5423c"])
    norm = BoundaryNorm([0, ROOM, 1, 4, 1e9], 4)
    for row, kind in enumerate(SHOWN):
        for column, model in enumerate(MODELS):
            axes = grid[row, column]
            shares = [
                [
                    cell.total / cell.memory if (cell := cells.get((model, kind, target, length))) else math.nan
                    for length in LENGTHS
                ]
                for target in TARGETS
            ]
            axes.pcolormesh(shares, cmap=colours, norm=norm, edgecolors="white", linewidth=1)
            for y, line in enumerate(shares):
                for x, share in enumerate(line):
                    if not math.isnan(share):
                        words = f"{share:.0%}" if share < 10 else f"{share:,.0f} x"
                        axes.text(x + 0.5, y + 0.5, words, ha="center", va="center", fontsize=7)
            axes.set_xticks([x + 0.5 for x in range(len(LENGTHS))], list(LENGTHS), fontsize=8)
            axes.set_yticks([y + 0.5 for y in range(len(TARGETS))], TARGETS, fontsize=8)
            axes.set_title(f"{model}\n{kind}", fontsize=8)
            axes.tick_params(length=0)
    grid[0, 0].invert_yaxis()
    figure.suptitle(
        "Share of a chip's memory by hand: green leaves room, yellow is tight, red does not fit", fontsize=10
    )
    plots.save_figure(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", choices=("quick", "all"), help="ask the compiler about some cells (libtpu)")
    args = parser.parse_args()
    if args.compile:
        compile_some(args.compile)
    cells = {cell.key: cell for cell in count_all()}
    draw(cells, HERE / "fits.png")
    (HERE / "report.md").write_text(page(cells))
    print(HERE / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
