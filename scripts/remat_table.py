"""What one training step of Scout's layers holds on a chip, by what is kept for the backward pass.

    python scripts/remat_table.py                                   # full, offload, offload_inputs, none
    python scripts/remat_table.py --remat=full --target=v5p:2x2x2 --config.data.seq_len=65536

The step that trains, compiled by the chip's own compiler; nothing is executed. Eight layers of Scout
(`configs/llama4_scout.py`, all 16 experts), one row of 131,072 tokens, float32 parameters and moments, on eight chips
of 95 GB.

All eight chips are on the `tensor` axis. Parameters, gradients and moments of these layers are 316 GB, so they must be
cut eight ways, and a single row leaves no batch to cut them along (`fsdp`, `expert`). The residual stream is then whole
on every chip, 1.3 GB a layer, and what is done with it matters. (`--config.mesh.context=8 --config.mesh.tensor=1` cuts
the stream as well, and gathers weights.)
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from irope_jax.cli import split_overrides
from irope_jax.core.hosts import configure_logging
from irope_jax.experiment import Experiment, check_devices, load_config, resolve
from irope_jax.plan.compiled import lower_train_step
from irope_jax.plan.hlo import analyse
from irope_jax.plan.targets import target_devices, target_mesh, targeting

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "llama4_scout.py"
SETTING = [
    ("model.num_layers", "8"),
    ("data.seq_len", "131072"),
    ("data.batch_size", "1"),
    ("mesh.data", "1"),
    ("mesh.fsdp", "1"),
    ("mesh.expert", "1"),
    ("mesh.tensor", "8"),
]
CHIP = 95e9
"""Bytes of a v5p's memory."""

TITLE = (
    "remat",
    "arguments",
    "temporaries",
    "new outputs",
    "device",
    "of a chip",
    "host",
    "FLOPs",
    "compiled in",
)


def measure(remat: str, target: str, overrides: list[tuple[str, str]]) -> tuple[str, ...]:
    """The cells of one row, or what the compiler said instead."""
    experiment: Experiment = resolve(load_config(str(CONFIG)), [*SETTING, *overrides, ("model.remat", remat)])
    devices = target_devices(target)
    mesh = target_mesh(devices, check_devices(experiment, len(devices)))
    begin = time.time()
    with targeting(mesh):
        lowered = lower_train_step(experiment.model, experiment.data, experiment.train, mesh)
        try:
            compiled = lowered.compile()
        except Exception as error:  # the compiler's own words are the result
            said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            return (remat, f"not compiled: {said[:300]}")
    memory = compiled.memory_analysis()
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    device = memory.argument_size_in_bytes + memory.temp_size_in_bytes + fresh
    host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    flops = analyse(compiled.as_text()).matmul_flops_max
    gigabytes = [memory.argument_size_in_bytes, memory.temp_size_in_bytes, fresh, device]
    return (
        remat, *(f"{size / 1e9:.2f}" for size in gigabytes), f"{device / CHIP:.0%}", f"{host / 1e9:.2f}",
        f"{flops:.3g}", f"{time.time() - begin:.0f} s",
    )  # fmt: skip


def main() -> int:
    rest, overrides = split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remat", default="full,offload,offload_inputs,none", help="presets, separated by commas")
    parser.add_argument("--target", default="v5p:2x2x2", help="eight chips")
    chosen = parser.parse_args(rest)
    configure_logging()
    print("GB a chip; FLOPs are those of matrix products outside kernels\n")
    widths = [max(len(cell), 14) for cell in TITLE]
    show = lambda cells: print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)), flush=True)
    show(TITLE)
    for remat in chosen.remat.split(","):
        cells = measure(remat, chosen.target, overrides)
        show(cells) if len(cells) > 2 else print(f"{cells[0].rjust(widths[0])}  {cells[1]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
