"""Stop a run on eight devices, go on with others, and compare the losses with those of a run that never moved.

    python scripts/check_moves.py
    python scripts/check_moves.py --config=configs/quickstart.py:irope --config.train.steps=12

The run trains with its sequence cut over eight simulated devices. Once half of its steps are saved it is stopped by
SIGTERM; copies of it go on with the sequence cut over four devices, on one device alone, and on eight as fsdp 4 x
context 2. Compared is the loss of every step. The last line is JSON; the gate is a relative difference of 1e-5.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from check_resume import ROOT, Run

from irope_jax.core.records import load_run

GATE = 1e-5
BEGAN = {"context": 8}
MOVES = ({"context": 8}, {"context": 4}, {"context": 1}, {"fsdp": 4, "context": 2})
SMALL = (
    "--config.train.steps=24", "--config.data.seq_len=256", "--config.data.batch_size=8",
    "--config.train.eval_every=None", "--config.evals=()", "--config.checkpoint.every=4", "--config.checkpoint.keep=10",
)  # fmt: skip


def on(mesh: dict[str, int]) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a run on a mesh of simulated devices."""
    count = 1
    for size in mesh.values():
        count *= size
    sizes = {"data": 1, "fsdp": 1, "context": 1, "expert": 1, "tensor": 1} | mesh
    flags = f"--xla_force_host_platform_device_count={count} --xla_cpu_collective_call_terminate_timeout_seconds=600"
    arguments = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
    return arguments, {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def losses(directory: Path) -> dict[int, float]:
    return {record.step: record.scalars["loss"] for record in load_run(directory).train}


def finish(run: Run) -> None:
    if run.process.wait() != 0:
        sys.exit(f"{run.directory} ended with code {run.process.returncode}; see {run.directory}.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "debug.py"), metavar="FILE[:ARG]")
    parser.add_argument("--dir", type=Path, help="where the runs go (default: a new directory in the temporary one)")
    chosen, more = parser.parse_known_args()
    where = chosen.dir or Path(tempfile.mkdtemp(prefix="moves_"))
    command = ["train", f"--config={chosen.config}", *SMALL, "--config.train.log_every=1", *more]
    print(f"in {where}", flush=True)

    arguments, environ = on(BEGAN)
    calm = Run.start(where / "undisturbed", command + arguments, **environ)
    finish(calm)
    expected = losses(calm.directory)
    half = max(step for step in calm.whole_checkpoints() if step <= max(expected) / 2)

    begun = Run.start(where / "begun", command + arguments, **environ)
    begun.wait_until(lambda: half in begun.whole_checkpoints())
    begun.process.send_signal(signal.SIGTERM)
    begun.process.wait()
    stopped = max(begun.whole_checkpoints())
    print(f"stopped at step {stopped} of {max(expected)}", flush=True)

    worst = {}
    for mesh in MOVES:
        name = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
        target = where / name.replace(" ", "_")
        shutil.copytree(begun.directory, target)
        arguments, environ = on(mesh)
        run = Run.start(target, [*command, *arguments, "--on-config-change=accept"], **environ)
        finish(run)
        found = losses(target)
        if found.keys() != expected.keys():
            sys.exit(f"{name}: steps {sorted(found)} instead of {sorted(expected)}")
        worst[name] = max(abs(found[step] / expected[step] - 1) for step in expected if step > stopped)
        print(f"context 8 -> {name:<20} steps {stopped + 1} to {max(expected)}: {worst[name]:.1e}", flush=True)
    passed = stopped < max(expected) and all(value <= GATE for value in worst.values())
    print(json.dumps({"pass": passed, "gate": GATE, "stopped_at": stopped, "worst": worst}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
