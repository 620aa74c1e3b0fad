"""Flags and help of `irope sweep`, apart from its work so that help does not wait for jax."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_sweep(verb: Callable[..., argparse.ArgumentParser]) -> None:
    sweep = verb(
        "sweep",
        "run every cell of a study",
        """\
Run the cells of a grid, each as `irope train` with its config and overrides, in runs/STUDY/CELL. What is finished is
skipped, what was cut goes on from its newest checkpoint, and past a cell that fails the others go on; the failed ones
are listed at the end (exit code 1). So are runs that were made with other values than the grid has now (`other` in
--list): move those away. To a finished run whose cell got further evaluations (`lacks`) they are added, without
training it again; an evaluation that was changed needs a new name for that. SIGTERM and Ctrl-C let the running cells
save (a second one ends them); the same command goes on. What a cell printed is in runs/STUDY/logs/.

A grid is a Python file with get_study(), or get_study(scale), that returns a Study: a question, what is expected, and
cells made with Cell, product, zipped, chained, axis and seeds of irope_jax.study.grid. Reading one runs its code.

examples:
  irope sweep experiments/what_irope_buys/grid.py --list
  irope sweep experiments/what_irope_buys/grid.py --list=commands --only=iRoPE/seed=0
  irope sweep experiments/what_irope_buys/grid.py --only=headline
  irope sweep experiments/what_irope_buys/grid.py --jobs=2
  irope sweep experiments/what_irope_buys/grid.py --scale=large --slurm=jobs/
""",
    )
    sweep.add_argument("grid", metavar="GRID", help="grid file, or the folder with its grid.py")
    sweep.add_argument(
        "--only", action="append", metavar="WORD",
        help="a tag, an arm or its label, a cell, a seed (seed=0) or a folder of cells, with all that they start from; "
        "may be repeated",
    )  # fmt: skip
    sweep.add_argument("--scale", metavar="NAME", help="which size of the study, where its get_study() takes one")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time (default: 1)")
    sweep.add_argument("--runs", metavar="DIR", help="folder of the run directories (default: runs/STUDY)")
    sweep.add_argument(
        "--list", nargs="?", const="cells", choices=("cells", "commands"),
        help="run nothing; print every cell and how far it is, or the command of each",
    )  # fmt: skip
    sweep.add_argument("--task", metavar="CELL", help="run this cell alone, as the tasks of a cluster do")
    sweep.add_argument("--slurm", metavar="DIR", help="write SLURM arrays there in place of running")
    sweep.add_argument("--jobset", metavar="FILE", help="write a Kubernetes JobSet in place of running")
