"""Kill a run again and again, and show that it ends as if nothing had happened.

    python scripts/check_resume.py
    python scripts/check_resume.py --kills=8 --seed=3
    python scripts/check_resume.py --config=configs/pretrain_tiny.py --config.train.steps=20 --config.checkpoint.every=5

`irope train` runs once uninterrupted, then once more, killed with SIGKILL at random moments (while starting, training,
writing a checkpoint, evaluating) and started again with the same command until it ends. Both runs must then agree bit
for bit in parameters, optimizer state, random state, place in the data and every recorded number but times and memory.
Exit code 0: they do. 1: they do not, or a run failed. Nothing here is timed out; progress is printed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PHASES = ("start-up", "training", "checkpoint", "evaluation", "any moment")
OF_THE_MACHINE = ("step_seconds", "tokens_per_second", "flops_per_second", "mfu", "memory_bytes")
"""Scalars that no two runs share."""


@dataclass
class Run:
    """A training process and the directory it writes to."""

    directory: Path
    process: subprocess.Popen
    began: float
    size_before: int = 0

    @classmethod
    def start(cls, directory: Path, command: list[str], **environ: str) -> Run:
        log = open(directory.with_suffix(".log"), "ab")  # noqa: SIM115 (the process keeps it)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", "irope_jax.cli", *command, f"--run-dir={directory}"],
                stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": path} | environ,
            )  # fmt: skip
        records = directory / "records.jsonl"
        return cls(directory, process, time.monotonic(), records.stat().st_size if records.exists() else 0)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def new_lines(self) -> bytes:
        """What this process recorded so far."""
        try:
            with open(self.directory / "records.jsonl", "rb") as file:
                file.seek(self.size_before)
                return file.read()
        except FileNotFoundError:
            return b""

    def writing_checkpoint(self) -> bool:
        try:
            return any("tmp" in path.name for path in (self.directory / "checkpoints").iterdir())
        except FileNotFoundError:
            return False

    def whole_checkpoints(self) -> list[int]:
        return sorted(int(p.name) for p in (self.directory / "checkpoints").glob("*") if p.name.isdigit())

    def wait_until(self, happened: Callable[[], bool]) -> bool:
        """False if the process ended first."""
        while not happened():
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        return self.process.poll() is None

    def wait_for(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        return self.wait_until(lambda: time.monotonic() >= until)


def reach(run: Run, phase: str, draw: random.Random, whole: dict[str, float], share: float) -> bool:
    """Wait for a random moment of a phase; False if the process ended before it came.

    Args:
      whole: seconds that the uninterrupted run took: to its first step, altogether, and in its last evaluation.
      share: of the time left, how much a kill may use up, so that there is some left for the kills that follow.
    """
    if phase == "start-up":
        return run.wait_for(draw.uniform(0, whole["start-up"]))
    if phase == "any moment":
        return run.wait_for(draw.uniform(0, whole["start-up"] + share * (whole["all"] - whole["start-up"])))
    if phase == "training":
        first = lambda: b'"kind": "train"' in run.new_lines()
        return run.wait_until(first) and run.wait_for(draw.uniform(0, share * whole["steps"]))
    if phase == "checkpoint":  # after one that was written whole, so that the run gets on
        saved = run.whole_checkpoints()
        begun = lambda: run.writing_checkpoint() and run.whole_checkpoints() != saved
        return run.wait_until(begun) and run.wait_for(draw.uniform(0, 0.04))
    first = lambda: b'"kind": "eval"' in run.new_lines()
    return run.wait_until(first) and run.wait_for(draw.uniform(0, whole["evaluation"]))


def phases(kills: int, draw: random.Random) -> list[str]:
    """Every phase in turn, in random order but for evaluation, which comes last: the run always ends with one."""
    drawn = [PHASES[k % len(PHASES)] for k in range(kills)]
    draw.shuffle(drawn)
    return sorted(drawn, key=lambda phase: phase == "evaluation")


def uninterrupted(directory: Path, command: list[str], **environ: str) -> dict[str, float]:
    """Run it once; seconds by phase."""
    from irope_jax.core.records import load_run

    began = time.time()
    run = Run.start(directory, command, **environ)
    if run.process.wait() != 0:
        sys.exit(f"the uninterrupted run failed with exit code {run.process.returncode}; see {directory}.log")
    took, read = run.seconds, load_run(directory)
    times = [record.time for record in read.train]
    evaluation = [record.time for record in read.evals if record.step == read.last_step] or [times[-1]]
    return {
        "all": took,
        "start-up": times[0] - began,
        "steps": times[-1] - times[0],
        "evaluation": evaluation[-1] - evaluation[0],
    }


def killed(directory: Path, command: list[str], kills: int, draw: random.Random, whole: dict[str, float]) -> int:
    """Run it with kills until it ends; how many there were."""
    done = 0
    for phase in phases(kills, draw):
        run = Run.start(directory, command)
        alive = reach(run, phase, draw, whole, 1 / (kills - done + 1))
        if not alive:
            code = run.process.wait()
            print(f"  {phase:<11} the run ended (exit code {code}) before the moment came", flush=True)
            if code:
                sys.exit(f"it failed; see {directory}.log")
            return done
        writing = run.writing_checkpoint()
        run.process.kill()
        run.process.wait()
        done += 1
        torn = ", a checkpoint half written" if writing else ""
        print(
            f"  kill {done}/{kills}  aimed at {phase:<11} {run.seconds:6.2f} s after its start{torn}; "
            f"whole checkpoints: {run.whole_checkpoints() or 'none'}",
            flush=True,
        )
    print("  started for the last time …", flush=True)
    run = Run.start(directory, command)
    if run.process.wait() != 0:
        sys.exit(f"the killed run failed with exit code {run.process.returncode}; see {directory}.log")
    return done


def compare(one: Path, other: Path) -> list[tuple[str, str, bool]]:
    """`(what, found, equal)` of two finished runs."""
    from irope_jax.checkpoint.native import Checkpoints
    from irope_jax.core.config import differences
    from irope_jax.core.numerics import assert_equal_trees, tree_bytes
    from irope_jax.core.records import load_run

    ends = []
    for directory in (one, other):
        with Checkpoints(directory) as checkpoints:
            ends.append((checkpoints.latest, *checkpoints.read()[:2]))
    (step_a, state_a, data_a), (step_b, state_b, data_b) = ends
    rows = [("last checkpoint", f"step {step_a} and {step_b}", step_a == step_b)]
    for part in state_a:
        try:
            assert_equal_trees(state_b[part], state_a[part])
            rows.append((f"state: {part}", f"{tree_bytes(state_a[part]):,} bytes equal", True))
        except AssertionError as error:
            rows.append((f"state: {part}", str(error).splitlines()[0], False))
    found = differences(data_a, data_b)
    rows.append(("place in the data", found[0] if found else "equal", not found))
    a, b = load_run(one), load_run(other)
    rows.append(_lines("training records", *({r.step: _comparable(r.scalars) for r in run.train} for run in (a, b))))
    key = lambda r: f"step {r.step} {r.evaluation} {r.name} {r.where}"
    rows.append(_lines("measurements", *({key(r): (r.value, r.count) for r in run.evals} for run in (a, b))))
    if len(b.train) != len({r.step for r in b.train}):
        rows.append(("training records", "a step is there twice", False))
    return rows


def _comparable(scalars: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in scalars.items() if name not in OF_THE_MACHINE}


def _lines(what: str, one: dict, other: dict) -> tuple[str, str, bool]:
    if one == other:
        return what, f"{len(one)} equal", True
    wrong = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    first = wrong[0]
    return what, f"{len(wrong)} of {len(one)} differ, first {first}: {one.get(first)} -> {other.get(first)}", False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    debug = str(ROOT / "configs" / "debug.py")
    parser.add_argument("--config", default=debug, metavar="FILE[:ARG]", help="config file (default: configs/debug.py)")
    parser.add_argument("--kills", type=int, default=5, help="how many times to kill (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument(
        "--dir", type=Path, help="keep both runs here (default: a temporary directory, removed if all is equal)"
    )
    args, overrides = parser.parse_known_args()
    if unknown := [argument for argument in overrides if not argument.startswith("--config.")]:
        parser.error(f"unknown argument {unknown[0]}; values of the config are changed by --config.a.b=VALUE")
    if args.kills < 1:
        parser.error(f"--kills={args.kills}: at least 1")
    where = args.dir or Path(tempfile.mkdtemp(prefix="check_resume_"))
    where.mkdir(parents=True, exist_ok=True)
    one, other = (where / "uninterrupted").absolute(), (where / "killed").absolute()
    for directory in (one, other):
        if directory.exists():
            parser.error(f"--dir={where}: {directory} is there already; name another directory")
    command = ["train", f"--config={args.config}", *overrides]
    print(f"in {where}\nuninterrupted: irope {' '.join(command)}", flush=True)
    whole = uninterrupted(one, command)
    print("  " + "  ".join(f"{name} {seconds:.1f} s" for name, seconds in whole.items()), flush=True)
    print(f"killed {args.kills} times, seed {args.seed}:", flush=True)
    kills = killed(other, command, args.kills, random.Random(args.seed), whole)
    rows = [("kills", f"{kills} of {args.kills}", kills == args.kills), *compare(one, other)]
    width = max(len(row[0]) for row in rows)
    print("\n" + "\n".join(f"  {'ok  ' if equal else 'FAIL'}  {what:<{width}}  {found}" for what, found, equal in rows))
    good = all(equal for *_, equal in rows)
    print("\nbit-equal to the uninterrupted run" if good else f"\nNOT equal; both runs are kept in {where}")
    if good and args.dir is None:
        shutil.rmtree(where)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
