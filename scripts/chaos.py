"""Do to a run what machines do to it, again and again, and show that it ends as if nothing had happened.

    python scripts/chaos.py
    python scripts/chaos.py --runs=3 --damages=4 --launches=1
    python scripts/chaos.py --config=configs/progressive.py --runs=20 --dir=chaos

First `irope train` runs undisturbed. Then, each against it, bit for bit as in check_resume.py:

* runs, killed with SIGKILL while starting, training, writing a checkpoint, crossing the border of a stage, evaluating
  or at any moment, or told to stop by SIGTERM, and started again with the same command until they end;
* runs whose newest checkpoint is damaged (a file cut in half, a flipped bit, a file deleted, the checksums deleted):
  the damage must be named, with the file, and the run go on from the checkpoint before;
* `irope launch` of four processes, two of which are killed: against an undisturbed launch.

The last line is JSON with the counts and "pass". Exit code 0: all passed. Nothing here is timed out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import jax
from check_resume import ROOT, Run, compare, reach, uninterrupted

TINY = (
    "--config.train.steps=24", "--config.train.log_every=2", "--config.train.eval_every=12",
    "--config.checkpoint.every=4", "--config.checkpoint.keep=3",
    "--config.evals.0.tokens=1024", "--config.evals.1.queries=8", "--config.evals.1.lengths=(64,)",
)  # fmt: skip
"""Changes to configs/debug.py: little of everything, checkpoints often."""

PHASES = ("checkpoint", "training", "SIGTERM", "border", "any moment", "start-up", "evaluation")
BORDER = re.compile(rb'"kind": "event".*"name": "stage')
"""What the records say when a stage of a curriculum begins or ends."""

DAMAGES = ("cut in half", "a bit flipped", "deleted", "checksums deleted")
PROCESSES, VICTIMS = 4, 2


class Chaos:
    """Where it all happens, and what the undisturbed run did."""

    def __init__(self, where: Path, command: list[str], draw: random.Random):
        self.where, self.command, self.draw = where, command, draw
        self.environ = {
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(where / "compiled")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        self.calm = where / "undisturbed"
        self.took: dict[str, float] = {}

    def begin(self) -> bool:
        """Run it twice: the second time, as in all that follow, what was compiled is there. Whether both agree."""
        print(f"undisturbed: irope {' '.join(self.command)}", flush=True)
        uninterrupted(self.calm, self.command, **self.environ)
        again = self.where / "undisturbed_again"
        self.took = uninterrupted(again, self.command, **self.environ)
        print("  " + "  ".join(f"{name} {seconds:.1f} s" for name, seconds in self.took.items()), end=";", flush=True)
        return self._equal(self.calm, again)

    @property
    def phases(self) -> tuple[str, ...]:
        has_borders = BORDER.search((self.calm / "records.jsonl").read_bytes())
        return tuple(phase for phase in PHASES if phase != "border" or has_borders)

    # ---- kills ------------------------------------------------------------------------------------------------------

    def killed(self, number: int, phase: str) -> bool:
        """Whether a run that is killed once ends equal. Tries again if it ended before the moment came."""
        for attempt in range(10):
            directory = self.where / f"killed_{number}.{attempt}"
            run = Run.start(directory, self.command, **self.environ)
            if self._reach(run, phase, 0.8**attempt):
                break
            if run.process.wait():
                return self._failed(directory, f"ended with exit code {run.process.returncode} before it was killed")
        else:
            return self._failed(directory, f"{phase}: the moment never came")
        writing = run.writing_checkpoint()
        run.process.send_signal(signal.SIGTERM if phase == "SIGTERM" else signal.SIGKILL)
        code = run.process.wait()
        if phase == "SIGTERM" and code not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
            return self._failed(directory, f"exit code {code} after SIGTERM")
        torn = ", a checkpoint half written" if writing else ""
        there = f"checkpoints: {run.whole_checkpoints() or 'none'}"
        print(f"  {number + 1:>3}  {phase:<11} {run.seconds:6.2f} s after its start{torn}; {there}", end="", flush=True)
        return self._goes_on(directory)

    def _reach(self, run: Run, phase: str, hurry: float) -> bool:
        """Wait for a random moment of a phase, earlier the less `hurry` is; False if the process ended before it."""
        if phase == "border":
            crossed = run.wait_until(lambda: bool(BORDER.search(run.new_lines())))
            return crossed and run.wait_for(self.draw.uniform(0, 0.2 * hurry))
        took = {name: seconds * hurry for name, seconds in self.took.items()}
        return reach(run, "any moment" if phase == "SIGTERM" else phase, self.draw, took, 0.9)

    def _goes_on(self, directory: Path, *expected: str) -> bool:
        """Start it until it ends; whether it is equal, and its log says what is expected."""
        code = Run.start(directory, self.command, **self.environ).process.wait()
        if code:
            return self._failed(directory, f"exit code {code} when started again")
        log = directory.with_suffix(".log").read_text(errors="replace")
        if missing := [part for part in expected if part not in log]:
            return self._failed(directory, f"its log does not say {missing[0]!r}")
        return self._equal(self.calm, directory)

    def _equal(self, calm: Path, directory: Path) -> bool:
        wrong = [(what, found) for what, found, equal in compare(calm, directory) if not equal]
        if wrong:
            return self._failed(directory, f"{wrong[0][0]}: {wrong[0][1]}")
        print("  equal", flush=True)
        shutil.rmtree(directory)
        return True

    def _failed(self, directory: Path, why: str) -> bool:
        print(f"  FAIL  {why}; see {directory} and its log", flush=True)
        return False

    # ---- damage -----------------------------------------------------------------------------------------------------

    def damaged(self, number: int, damage: str) -> bool:
        """Whether a run whose newest checkpoint is damaged says so, goes on from the one before and ends equal."""
        directory = self.where / f"damaged_{number}"
        shutil.copytree(self.calm, directory)
        steps = sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())
        newest = directory / "checkpoints" / str(steps[-1])
        listed = sorted(json.loads((newest / "checksums.json").read_text())["files"])
        name = "checksums.json" if damage == "checksums deleted" else self.draw.choice(listed)
        harm(newest / name, damage, self.draw)
        print(f"  {number + 1:>3}  {steps[-1]}/{name[:40]} {damage}", end="", flush=True)
        return self._goes_on(directory, f"{newest}: {name} ", f"resuming at step {steps[-2]}")

    # ---- several processes ------------------------------------------------------------------------------------------

    def launched(self, number: int) -> bool:
        """Whether a launch, of which some processes are killed, ends like one that was left alone."""
        launch = ["launch", f"--processes={PROCESSES}", "--devices-per-process=1", "--"]
        command = [*launch, *self.command, f"--config.mesh.data={PROCESSES}"]
        calm, directory = self.where / "launch_undisturbed", self.where / f"launch_{number}"
        if not calm.exists() and (code := Run.start(calm, command).process.wait()):
            return self._failed(calm, f"exit code {code} of the undisturbed launch")
        run = Run.start(directory, command)
        saved = run.wait_until(lambda: bool(run.whole_checkpoints()))
        if not saved or not run.wait_for(self.draw.uniform(0, 3)):
            return self._failed(directory, "the launch ended before it was disturbed")
        log = directory.with_suffix(".log")
        pids = re.findall(r"started \d+ processes \(pid ([\d, ]+)\)", log.read_text(errors="replace"))[-1].split(", ")
        victims = self.draw.sample(range(PROCESSES), VICTIMS)
        for victim in victims:
            os.kill(int(pids[victim]), signal.SIGKILL)
        print(f"  {number + 1:>3}  {victims} of {PROCESSES} killed after {run.seconds:.1f} s", end="", flush=True)
        if code := run.process.wait():
            return self._failed(directory, f"exit code {code} of the launch")
        said = re.findall(r"irope launch: (process \d+ .*|starting all again.*)", log.read_text(errors="replace"))
        if len(said) != 2 or not any(f"process {victim} " in said[0] for victim in victims):
            return self._failed(directory, f"the launcher said {said}")
        print(f"; {said[0]}", end="")
        return self._equal(calm, directory)


def harm(path: Path, damage: str, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if damage == "a bit flipped" and data:
        at = draw.randrange(len(data))
        if path.name == "_CHECKPOINT_METADATA":  # the time in it may be any
            at = data.index(b"item_handlers")
        data[at] ^= 1 << draw.randrange(7)
        path.write_bytes(data)
    elif damage == "cut in half" and data:
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE[:ARG]", help="config file (default: configs/debug.py, made smaller)")
    parser.add_argument("--runs", type=int, default=20, help="runs to kill (default: 20)")
    parser.add_argument("--damages", type=int, default=10, help="checkpoints to damage (default: 10)")
    parser.add_argument("--launches", type=int, default=1, help="launches to disturb (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damage (default: 0)")
    parser.add_argument(
        "--dir", type=Path, help="keep what is left here (default: a temporary directory, removed if all passed)"
    )
    args, overrides = parser.parse_known_args()
    if unknown := [argument for argument in overrides if not argument.startswith("--config.")]:
        parser.error(f"unknown argument {unknown[0]}; values of the config are changed by --config.a.b=VALUE")
    where = (args.dir or Path(tempfile.mkdtemp(prefix="chaos_"))).absolute()
    where.mkdir(parents=True, exist_ok=True)
    if any(where.iterdir()):
        parser.error(f"--dir={where}: not empty; name another directory")
    jax.config.update("jax_platforms", "cpu")  # of this process, which compares; not of those it starts
    config = args.config or str(ROOT / "configs" / "debug.py")
    command = ["train", f"--config={config}", *(() if args.config else TINY), *overrides]
    chaos = Chaos(where, command, random.Random(args.seed))
    print(f"in {where}, seed {args.seed}")
    passed, whole = {}, {"runs": args.runs, "damages": args.damages, "launches": args.launches}
    calm = True
    if args.runs or args.damages:
        calm = chaos.begin()
        print("killed and started again:", flush=True)
        passed["runs"] = sum(chaos.killed(k, chaos.phases[k % len(chaos.phases)]) for k in range(args.runs))
        print("damaged:", flush=True)
        passed["damages"] = sum(chaos.damaged(k, DAMAGES[k % len(DAMAGES)]) for k in range(args.damages))
    if args.launches:
        print("launched:", flush=True)
        passed["launches"] = sum(chaos.launched(k) for k in range(args.launches))
    good = calm and all(passed.get(kind, 0) == count for kind, count in whole.items())
    if good and args.dir is None:
        shutil.rmtree(where)
    result = {kind: f"{passed.get(kind, 0)} of {count}" for kind, count in whole.items()}
    print(json.dumps({"chaos": result, "seed": args.seed, "pass": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
