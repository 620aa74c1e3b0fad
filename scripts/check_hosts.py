"""Train the same config in one process and in two, and show that the losses are the same, step by step; then generate
from what was trained, in one and in two, and show that the texts are the same.

    python scripts/check_hosts.py
    python scripts/check_hosts.py --steps=40 --mesh=context=8
    python scripts/check_hosts.py --config=configs/quickstart.py:irope --config.data.seq_len=512

One process with eight simulated CPU devices, then two processes with four each, which meet over localhost as those of
two machines would (gloo): on meshes that cut the batch across processes, the batch across and the sequence inside them,
and the sequence across. Runs the evaluations of the config on the first mesh. Text is chosen greedily and sampled, from
a cache cut over all eight devices. Prints a table, the greatest difference and the texts. Exit code 0: losses within
--tolerance everywhere and texts equal. 1: not, or a run failed. About four minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DEVICES = 8
MESHES = ("data=8", "data=2,context=4", "context=8")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: list[str], devices: int, log: Path, out: Path | None = None) -> subprocess.Popen:
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    with open(log, "ab") as file, open(out or log, "ab") as output:
        command = [sys.executable, "-m", "irope_jax.cli", *command]
        return subprocess.Popen(command, stdout=output, stderr=file, env=environ)


def run(name: Path, command: list[str], processes: int, timeout: float, outputs: bool = False) -> float:
    """Run a verb to its end; seconds it took. Process k logs to `NAME.k.log`; `outputs`: and prints to `NAME.k.out`."""
    began, port, started = time.monotonic(), free_port(), []
    logs = [name.with_name(f"{name.name}.{k}.log") for k in range(processes)]
    try:
        for k, log in enumerate(logs):
            joined = [f"--coordinator=127.0.0.1:{port}", f"--process-id={k}", f"--num-processes={processes}"]
            out = log.with_suffix(".out") if outputs else None
            started.append(start(command + (joined if processes > 1 else []), DEVICES // processes, log, out))
        for process, log in zip(started, logs, strict=True):
            code = process.wait(max(1.0, began + timeout - time.monotonic()))
            if code:
                sys.exit(f"a process failed with exit code {code}; see {log}")
    except subprocess.TimeoutExpired:
        sys.exit(f"not done after {timeout:.0f} s; see {', '.join(map(str, logs))}")
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    return time.monotonic() - began


def texts_agree(where: Path, trained: Path, timeout: float) -> bool:
    """Whether one process and two print the same text, and of the two only the first prints."""
    agree = True
    for kind, how in (("greedy", ["--temperature=0"]), ("sampled", ["--temperature=1", "--seed=3", "--samples=2"])):
        printed = []
        for processes in (1, 2):
            name = where / f"generate_{kind}.{processes}"
            command = ["generate", f"--checkpoint={trained}", "--prompt=In the beginning", "--tokens=24", *how]
            seconds = run(name, [*command, "--ignore-eos"], processes, timeout, outputs=True)
            print(
                f"  generate, {kind:<10} {processes} process{'es' if processes > 1 else '  '} {seconds:6.1f} s",
                flush=True,
            )
            outputs = [name.with_name(f"{name.name}.{k}.out").read_text() for k in range(processes)]
            # gloo, of which CPUs make their network, tells of itself on standard output
            printed.append([re.sub(r"^\[Gloo\].*\n", "", text, flags=re.MULTILINE) for text in outputs])
        (alone,), (first, second) = printed
        print("   ", repr(alone), flush=True)
        agree = agree and alone == first and bool(alone.strip()) and not second
    return agree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    debug = str(ROOT / "configs" / "debug.py")
    parser.add_argument("--config", default=debug, metavar="FILE[:ARG]", help="config file (default: configs/debug.py)")
    parser.add_argument("--steps", type=int, default=12, help="steps to train (default: 12)")
    parser.add_argument("--mesh", action="append", metavar="AXIS=N,…", help=f"meshes (default: {' '.join(MESHES)})")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="greatest difference of a loss (default: 1e-6)")
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds after which to give a run up (default: 600)"
    )
    parser.add_argument("--dir", type=Path, help="keep the runs here (default: a temporary directory)")
    args, overrides = parser.parse_known_args()
    if unknown := [argument for argument in overrides if not argument.startswith("--config.")]:
        parser.error(f"unknown argument {unknown[0]}; values of the config are changed by --config.a.b=VALUE")
    from irope_jax.core.records import load_run

    where = (args.dir or Path(tempfile.mkdtemp(prefix="check_hosts_"))).absolute()
    where.mkdir(parents=True, exist_ok=True)
    base = ["train", f"--config={args.config}", f"--config.train.steps={args.steps}", "--config.train.log_every=1"]
    worst, measured, columns = 0.0, 0, {}
    for mesh in args.mesh or MESHES:
        sizes = dict(item.split("=") for item in mesh.split(","))
        sizes = {"data": "1"} | sizes
        command = [*base, *(f"--config.mesh.{axis}={size}" for axis, size in sizes.items()), *overrides]
        command += ["--config.evals=()"] if columns else []
        curves = []
        for processes in (1, 2):
            directory = where / f"{mesh.replace(',', '_')}.{processes}"
            seconds = run(directory, [*command, f"--run-dir={directory}"], processes, args.timeout)
            read = load_run(directory)
            curves.append([record.scalars["loss"] for record in read.train])
            curves[-1] += [record.value for record in read.evals]
            measured += len(read.evals) * (processes == 1)
            print(f"  {mesh:<20} {processes} process{'es' if processes > 1 else '  '} {seconds:6.1f} s", flush=True)
        one, two = curves
        if len(one) != len(two):
            sys.exit(f"{mesh}: {len(one)} numbers recorded by one process, {len(two)} by two; runs kept in {where}")
        columns[mesh] = (one, two)
        worst = max([worst, *(abs(a - b) for a, b in zip(one, two, strict=True))])
    print("\nloss of each step, in one process of 8 devices | in two of 4\n")
    print("  step  " + "  ".join(f"{mesh:^23}" for mesh in columns))
    for step in range(args.steps):
        cells = "  ".join(f"{one[step]:11.7f}|{two[step]:11.7f}" for one, two in columns.values())
        print(f"  {step + 1:>4}  {cells}")
    differences = [max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in columns.values()]
    print("  " + "diff  " + "  ".join(f"{difference:^23.1e}" for difference in differences))
    same = texts_agree(where, directory, args.timeout)
    good = worst <= args.tolerance and same
    print(f"\ngreatest difference {worst:.1e} over losses and {measured} measurements a run")
    print(f"texts {'equal' if same else 'DIFFER'}; {'ok' if good else 'FAIL'}")
    if good and args.dir is None:
        shutil.rmtree(where)
    elif not good:
        print(f"runs kept in {where}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
