"""Compile a config's training step for accelerators that are only described, and say what the program sends and holds.

    python scripts/compile_step.py --config=configs/long_context.py --target=v5p:4x4x4
    python scripts/compile_step.py --config=configs/long_context.py --target=h100:8 \\
        --config.mesh.context=8 --config.data.seq_len=131072

TPU targets need libtpu (extras `dev`, `tpu`), h100 jax's CUDA plugin (extra `cuda`). Nothing is executed.
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
from irope_jax.core.config import ConfigError
from irope_jax.core.hosts import configure_logging
from irope_jax.experiment import check_devices, load_config, resolve
from irope_jax.plan.compiled import lower_train_step
from irope_jax.plan.hlo import analyse
from irope_jax.plan.targets import target_devices, target_mesh, targeting


def main() -> int:
    rest, overrides = split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="config file, as for `irope train`")
    parser.add_argument("--target", required=True, help="v5e:2x2, v5p:4x4x4, v6e:8x8, … or h100:8")
    parser.add_argument("--save-hlo", metavar="FILE", help="write the optimized program there")
    chosen = parser.parse_args(rest)
    configure_logging()
    try:
        experiment = resolve(load_config(chosen.config), overrides)
        devices = target_devices(chosen.target)
        mesh = target_mesh(devices, check_devices(experiment, len(devices)))
        with targeting(mesh):
            begin = time.time()
            lowered = lower_train_step(experiment.model, experiment.data, experiment.train, mesh)
            traced = time.time()
            compiled = lowered.compile()
            done = time.time()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if chosen.save_hlo:
        Path(chosen.save_hlo).write_text(text)
    cost = analyse(text)
    print(f"{experiment.name} on {chosen.target}: traced in {traced - begin:.0f} s, compiled in {done - traced:.0f} s")
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs not in place": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    print("bytes a device: " + ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items()))
    print(f"loops without a known number of rounds: {cost.unknown_trips}")
    print("calls of kernels: " + (", ".join(f"{k} x {n}" for k, n in sorted(cost.opaque_calls.items())) or "none"))
    print("sent by a device, by layer and kind:")
    for (layer, kind), count in sorted(cost.bytes_by("layer", "kind").items()):
        print(f"  {layer or '-':<10}{kind:<22}{count:>18,.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
