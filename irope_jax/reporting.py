"""`irope report`: run directories, or the runs of a study, as one page."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from irope_jax.core.config import ConfigError, fingerprint
from irope_jax.core.records import RecordError, is_run, load_run
from irope_jax.study.collect import Arm, load_arms
from irope_jax.study.grid import Study
from irope_jax.study.report import terminal_tables, write_page, write_report
from irope_jax.study.seeds import pooled_arm
from irope_jax.sweep import Work, folder_of, is_done, load_study, work_of

Overrides = list[tuple[str, str]]


def report_verb(args: argparse.Namespace, overrides: Overrides) -> int:
    runs = [Path(run) for run in args.runs]
    of_studies = {"--only": args.only, "--scale": args.scale, "--runs": args.runs_in}
    grids = [run for run in runs if run.suffix == ".py" or ((run / "grid.py").is_file() and not is_run(run))]
    if grids and len(runs) > 1:
        raise ConfigError("RUN", str(grids[0]), "a study is reported alone; name it, or run directories")
    if grids:
        page, arms = study_report(runs[0], args)
    elif given := [(flag, value) for flag, value in of_studies.items() if value]:
        raise ConfigError(*given[0], "belongs to a study; name its folder, experiments/<question>")
    else:
        out = Path(args.out) if args.out else (runs[0] / "report" if len(runs) == 1 else runs[0].parent / "report")
        page, arms = write_report(runs, out), load_arms(runs)
    console = Console()
    for table in terminal_tables(arms):
        console.print(table)
    print(f"report: {page}")
    print(f"report: {page.with_suffix('.html')}")
    for picture in sorted(page.parent.glob("*.png")):
        print(f"picture: {picture}")
    return 0


def study_report(grid: Path, args: argparse.Namespace) -> tuple[Path, list[Arm]]:
    """The page of a study, beside its grid, and its arms.

    Raises:
      RecordError: nothing was run, or a run was made with other values than its grid has now.
    """
    study = load_study(grid, args.scale)
    folder = folder_of(grid)
    root = Path(args.runs_in or Path("runs") / study.name)
    works = [work_of(cell, folder, root, study) for cell in study.chosen(args.only or ())]
    arms, left = study_arms(study, works)
    if not arms:
        raise RecordError(f"{root}: no cell of {study.name} was finished; run `irope sweep {grid}` first")
    notes = [f"{len(left)} cells are not finished and left out: {', '.join(left)}."] if left else []
    command = ["irope", "report", str(grid)] + [f"--only={word}" for word in args.only or ()]
    command += [f"--scale={args.scale}"] * bool(args.scale)
    sweep = shlex.join(["irope", "sweep", *command[2:]])
    out = Path(args.out) if args.out else folder
    page = write_page(
        arms,
        out,
        title=study.question,
        command=f"{sweep}\n{shlex.join(command)}",
        foreword=foreword(study),
        notes=notes,
    )
    return page, arms


def study_arms(study: Study, works: Sequence[Work]) -> tuple[list[Arm], list[str]]:
    """Arms with a finished cell, that nothing else only starts from; and cells that are not finished.

    Raises:
      RecordError: a finished run with other values than its grid has now.
    """
    starts = {cell.starts_from for cell in study.cells}
    arms, left = [], []
    for label in dict.fromkeys(work.cell.arm for work in works):
        mine = [work for work in works if work.cell.arm == label]
        if all(work.cell.name in starts and not work.experiment.evals for work in mine):
            continue
        done = [work for work in mine if is_done(work)]
        for work in mine:
            if work in done:
                continue
            left.append(work.cell.name)
            if is_run(work.directory) and load_run(work.directory).fingerprint != fingerprint(work.experiment):
                raise RecordError(
                    f"{work.directory}: made with other values than the grid has now; move it away and sweep again"
                )
        if done:
            runs = [load_run(work.directory) for work in done]
            arms.append(pooled_arm(len(arms), label, runs, done[0].experiment.description))
    return arms, left


def foreword(study: Study) -> str:
    verdict = study.verdict or "Not given yet."
    return f"**Predicted.** {study.prediction}\n\n**Verdict.** {verdict}"
