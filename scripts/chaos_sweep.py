"""Kill a sweep at random moments, start it again until it ends, and compare with one that was left alone.

    python scripts/chaos_sweep.py                                   # a small study, 8 kills
    python scripts/chaos_sweep.py experiments/what_irope_buys --scale=smoke --only=headline --kills=20

By turns one of the cells at work is killed with SIGKILL, or the sweep with all of them. Every run must equal, bit for
bit as in check_resume.py, that of the undisturbed sweep, and so must the tables of the report. Exit code 0: they do.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from check_resume import ROOT, compare

IROPE = [sys.executable, "-c", "import sys; from irope_jax.cli import main; sys.exit(main())"]


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    task = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in task.read_text().split()] if task.exists() else []


def swept(command: list[str], runs: Path, kills: int, longest: float, draw: random.Random) -> int:
    """Sweep until it ends, killed `kills` times before; how often it was started."""
    starts = 0
    while True:
        starts += 1
        with open(runs.with_suffix(".log"), "ab") as log:
            sweep = subprocess.Popen(
                [*IROPE, *command, f"--runs={runs}"], stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )
        while kills:
            begun, wait = time.monotonic(), draw.uniform(1, longest)
            while sweep.poll() is None and time.monotonic() - begun < wait:
                time.sleep(0.1)
            if sweep.poll() is not None:
                break
            kills -= 1
            cells = children(sweep.pid)
            if kills % 2 and cells:
                print(f"  a cell is killed after {wait:.0f} s", flush=True)
                os.kill(draw.choice(cells), signal.SIGKILL)
            else:
                print(f"  all is killed after {wait:.0f} s", flush=True)
                sweep.kill()  # and the kernel its cells
        if sweep.wait() == 0:
            return starts
        if not kills and starts > 100:
            raise SystemExit(f"the sweep does not end; see {runs.with_suffix('.log')}")


def tables(command: list[str], runs: Path) -> list[str]:
    """Lines of the report's tables of results: retrieval and perplexity, no times."""
    out = runs.with_name(f"{runs.name}_report")
    subprocess.run([*IROPE, "report", *command[1:], f"--runs={runs}", f"--out={out}"], check=True, cwd=ROOT,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    text = (out / "report.md").read_text()
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    return [line for part in parts if part.startswith(("Retrieval", "Perplexity")) for line in part.splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="?", default="experiments/what_irope_buys", help="grid file or its folder")
    parser.add_argument("--scale", default="smoke", help="its size (default: smoke)")
    parser.add_argument("--only", action="append", help="cells, as for irope sweep (default: iRoPE and all_RoPE)")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time (default: 2)")
    parser.add_argument("--kills", type=int, default=8, help="how often (default: 8)")
    parser.add_argument("--longest", type=float, default=20, help="seconds from kill to kill, at most (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # of this process, which compares
    where = Path(tempfile.mkdtemp(prefix="chaos_sweep_"))
    chosen = [args.grid, f"--scale={args.scale}", *(f"--only={word}" for word in args.only or ("iRoPE", "all_RoPE"))]
    sweep = ["sweep", *chosen, f"--jobs={args.jobs}"]
    draw = random.Random(args.seed)
    calm, killed = where / "calm", where / "killed"
    print(f"in {where}: undisturbed", flush=True)
    swept(sweep, calm, 0, args.longest, draw)
    print("killed and started again:", flush=True)
    starts = swept(sweep, killed, args.kills, args.longest, draw)
    cells = sorted(path.parent.relative_to(calm) for path in calm.rglob("records.jsonl"))
    wrong = [f"{cell}: {what}: {found}" for cell in cells for what, found, equal in compare(calm / cell, killed / cell)
             if not equal]  # fmt: skip
    one, other = (tables(["report", *chosen], runs) for runs in (calm, killed))
    if one != other or not one:
        wrong.append(f"tables of the report differ, or there are none: {len(one)} and {len(other)} lines")
    for line in wrong:
        print(f"  FAIL  {line}")
    result = {"cells": len(cells), "starts": starts, "kills": args.kills, "lines of tables": len(one)}
    print(json.dumps({"chaos_sweep": result, "seed": args.seed, "pass": not wrong}))
    if not wrong:
        shutil.rmtree(where)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
