"""`irope report`: run directories, or the runs of a study, as one page."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from irope_jax.core.config import ConfigError
from irope_jax.core.records import RecordError, is_run
from irope_jax.study.collect import Arm, load_arms
from irope_jax.study.grid import Study
from irope_jax.study.report import pictures, terminal_tables, write_page, write_report
from irope_jax.study.seeds import pooled_arm
from irope_jax.sweep_cells import Work, folder_of, load_study, run_as_asked, standing_of, work_of

Overrides = list[tuple[str, str]]


def report_verb(args: argparse.Namespace, overrides: Overrides) -> int:
    runs = [Path(run) for run in args.runs]
    of_studies = {"--only": args.only, "--scale": args.scale, "--runs": args.runs_in, "--beside": args.beside}
    grids = [run for run in runs if run.suffix == ".py" or ((run / "grid.py").is_file() and not is_run(run))]
    if grids and len(grids) < len(runs):
        raise ConfigError("RUN", str(grids[0]), "studies are not reported with run directories; name either")
    if len(grids) > 1:
        page, arms = studies_report(grids, args)
    elif grids:
        page, arms = study_report(grids[0], args)
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
    for picture in pictures(page):
        print(f"picture: {picture}")
    return 0


def study_report(grid: Path, args: argparse.Namespace) -> tuple[Path, list[Arm]]:
    """The page of a study, beside its grid, or of another scale among its runs; and its arms.

    With `--beside` also those of runs elsewhere.

    Raises:
      RecordError: nothing was run, or a run was made with other values than its grid has now.
    """
    study = load_study(grid, args.scale)
    roots = [Path(args.runs_in or Path("runs") / study.name), *map(Path, args.beside or ())]
    if len(roots) > 1 and not args.out:
        raise ConfigError("--out", ConfigError.ABSENT, "a comparison is no study's own page; say where to write it")
    arms, notes = _of_roots(grid, study, roots, args.only)
    page = write_page(
        arms,
        Path(args.out or (roots[0] / "report" if args.scale else folder_of(grid))),
        title=study.question + f" (scale: {args.scale})" * bool(args.scale),
        command="\n".join(_commands([grid], args, roots[:1])),
        foreword=foreword(study),
        notes=notes,
    )
    return page, arms


def studies_report(grids: Sequence[Path], args: argparse.Namespace) -> tuple[Path, list[Arm]]:
    """One page of several studies, each from the folder of its name in `runs/`, or below `--runs`."""
    if not args.out:
        raise ConfigError(
            "--out", ConfigError.ABSENT, "a page of several studies is no study's own; say where to write it"
        )
    if args.beside:
        raise ConfigError("--beside", args.beside[0], "compares the runs of one study; name one")
    studies = [load_study(grid, args.scale) for grid in grids]
    roots = [Path(args.runs_in or "runs") / study.name for study in studies]
    arms, notes = [], []
    for grid, study, root in zip(grids, studies, roots, strict=True):
        found, left = _of_roots(grid, study, [root], args.only)
        arms += [replace(arm, index=len(arms) + i, label=f"{study.name}/{arm.label}") for i, arm in enumerate(found)]
        notes += left
    page = write_page(
        arms,
        Path(args.out),
        title=" / ".join(study.question for study in studies),
        command="\n".join(_commands(grids, args, roots)),
        foreword="\n\n".join(f"{study.question}\n\n{foreword(study)}" for study in studies),
        notes=notes,
    )
    return page, arms


def _commands(grids: Sequence[Path], args: argparse.Namespace, roots: Sequence[Path]) -> list[str]:
    """What makes the runs of each study, in the folder it has them in, and the page."""
    chosen = [f"--only={word}" for word in args.only or ()] + [f"--scale={args.scale}"] * bool(args.scale)
    own = [[f"--runs={root}"] * bool(args.runs_in) for root in roots]
    swept = [["irope", "sweep", str(grid), *chosen, *runs] for grid, runs in zip(grids, own)]
    reported = ["irope", "report", *map(str, grids), *chosen, *[f"--runs={args.runs_in}"] * bool(args.runs_in)]
    reported += [f"--beside={root}" for root in args.beside or ()] + [f"--out={args.out}"] * bool(args.out)
    return [shlex.join(words) for words in (*swept, reported)]


def _of_roots(grid: Path, study: Study, roots: Sequence[Path], only: Sequence[str]) -> tuple[list[Arm], list[str]]:
    """Arms of a study in each of some folders, told apart by the folder if there are several; and notes."""
    arms, notes = [], []
    for root in roots:
        works = [work_of(cell, folder_of(grid), root, study) for cell in study.chosen(only or ())]
        found, left = study_arms(study, works)
        if not found:
            raise RecordError(f"{root}: no cell of {study.name} was finished; run `irope sweep {grid}` first")
        where = f" ({root})" if len(roots) > 1 else ""
        arms += [replace(arm, index=len(arms) + i, label=arm.label + where) for i, arm in enumerate(found)]
        notes += [note + where for note in left]
    return arms, notes


def study_arms(study: Study, works: Sequence[Work]) -> tuple[list[Arm], list[str]]:
    """Arms with a finished cell, that nothing else only starts from; and what is missing, a sentence each.

    Raises:
      RecordError: a run with other values than its grid has now.
    """
    starts = {cell.starts_from for cell in study.cells}
    arms, left, lacking = [], [], []
    labels = study.labels()
    for arm in dict.fromkeys(work.cell.arm for work in works):
        mine = [work for work in works if work.cell.arm == arm]
        if all(work.cell.name in starts and not work.experiment.evals for work in mine):
            continue
        runs = []
        for work in mine:
            standing = standing_of(work)
            if standing.state == "other":
                raise RecordError(standing.note)
            if standing.state not in ("done", "lacks"):
                left.append(work.cell.name + f" ({standing.note})" * bool(standing.note))
                continue
            runs.append(run_as_asked(work, standing))
            lacking += [f"{work.cell.name} {spec.name}" for spec in standing.lacking]
        if runs:
            arms.append(pooled_arm(len(arms), labels[arm], runs))
    notes = [f"{len(left)} cells are not finished and left out: {', '.join(left)}."] if left else []
    if lacking:
        notes.append(f"Evaluations of the grid that are not measured yet and left out: {', '.join(lacking)}.")
    return arms, notes


def foreword(study: Study) -> str:
    verdict = study.verdict or "Not given yet."
    return f"**Predicted.** {study.prediction}\n\n**Verdict.** {verdict}"
