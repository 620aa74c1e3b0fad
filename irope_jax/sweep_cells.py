"""A cell of a study and its run directory: what runs the cell, and how far the directory is what the grid asks for."""

from __future__ import annotations

import inspect
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from irope_jax.core.config import ConfigError, differences, fingerprint, from_dict, to_dict
from irope_jax.core.records import Event, RecordError, Run, is_run, load_run
from irope_jax.evals.registry import EvalSpec
from irope_jax.evaluated import evaluated
from irope_jax.experiment import Experiment, load_config, resolve, run_file
from irope_jax.stages import stage_experiments
from irope_jax.study.grid import Cell, Study

LOGS = "logs"
ENDED = ("finished", "evaluated")

CLOCKS = 60.0
"""Seconds by which the clocks of two hosts may differ."""


@dataclass
class Work:
    """A cell on its way.

    Attributes:
      state: `waiting`, `running`, `done`, `failed`, `stopped` or `blocked` (what it starts from failed).
      command: what runs it.
      experiment: the resolved config.
      note: why it failed.
      code: with which it stopped.
      lock: the file that this process alone holds while the cell runs.
    """

    cell: Cell
    directory: Path
    command: list[str]
    experiment: Experiment
    log: Path
    state: str = "waiting"
    note: str = ""
    process: subprocess.Popen | None = None
    code: int = 0
    lock: IO | None = None
    began: float = 0.0
    seconds: float = 0.0
    first_step: int = 0
    seen: dict[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> Path | None:
        """The run directory of the cell that this one starts from."""
        return Path(self.experiment.train.init_from) if self.cell.starts_from else None

    @property
    def steps(self) -> int:
        stages = self.experiment.stages
        return sum(stage.steps for stage in stages) if stages else self.experiment.train.steps


def folder_of(grid: str | os.PathLike) -> Path:
    """Where the grid file lies."""
    return Path(grid) if Path(grid).is_dir() else Path(grid).parent


def load_study(path: str | os.PathLike, scale: str | None = None) -> Study:
    """The study of a grid file.

    Raises:
      ConfigError: no such file, or it does not define `get_study`.
    """
    path = Path(path)
    path = path / "grid.py" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError("GRID", str(path), "no such file; name experiments/<question>/grid.py")
    try:
        make = getattr(run_file(path), "get_study", None)
        if make is None:
            raise ConfigError("GRID", str(path), "the file has no get_study(); define one that returns a Study")
        if scale and not inspect.signature(make).parameters:
            raise ConfigError("--scale", scale, f"get_study() of {path} takes no scale; leave it out")
        study = make(scale) if scale else make()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError("GRID", str(path), f"failed while running: {type(error).__name__}: {error}") from error
    if not isinstance(study, Study):
        raise ConfigError("GRID", str(path), f"get_study() returned a {type(study).__name__}, not a Study")
    return study


def work_of(cell: Cell, folder: Path, root: Path, study: Study) -> Work:
    """The command of a cell, and its config resolved: mistakes are found before anything runs.

    Raises:
      ConfigError: its config or overrides are wrong; the message names the cell.
    """
    file, colon, argument = cell.config.partition(":")
    beside = folder / file
    config = f"{os.path.normpath(beside) if beside.is_file() else file}{colon}{argument}"
    directory = root / cell.name
    values = {"name": f"{study.name}/{cell.name}", **cell.overrides}
    if cell.starts_from:
        values["train.init_from"] = str(root / cell.starts_from)
    assignments = [(path, value if isinstance(value, str) else repr(value)) for path, value in values.items()]
    command = [cell.verb, f"--config={config}", f"--run-dir={directory}"]
    command += [f"--config.{path}={value}" for path, value in assignments]
    try:
        experiment = resolve(load_config(config), assignments)
        stage_experiments(experiment)
    except ConfigError as error:
        raise error.within(f"cell {cell.name}") from None
    return Work(cell, directory, command, experiment, root / LOGS / f"{cell.name.replace('/', '.')}.log")


@dataclass(frozen=True)
class Standing:
    """How far a run directory is what its cell asks for.

    Attributes:
      state: `new`, nothing is there; `cut`, begun and not ended; `done`; `lacks`, trained to its end, but evaluations
        that the cell has by now are missing; `other`, made with other values.
      note: what is the matter with `other`, and with a `cut` that cannot be read.
      lacking: those evaluations.
      step: with which weights they are to be measured.
      evals_changed: of `cut`, its config has other evaluations than the cell, and is the same otherwise.
    """

    state: Literal["new", "cut", "done", "lacks", "other"]
    note: str = ""
    lacking: tuple[EvalSpec, ...] = ()
    step: int | None = None
    evals_changed: bool = False


def standing_of(work: Work) -> Standing:
    """What a run directory says of itself, beside what the grid has now."""
    if not is_run(work.directory):
        return Standing("new")
    try:
        run = load_run(work.directory)
    except RecordError as error:
        return Standing("cut", note=str(error))
    if note := _before_its_start(run, work):
        return Standing("other", note)
    asked, made = _asked_of(run, work), _made_with(run)
    end = _end_of(run)
    if run.fingerprint == fingerprint(asked) or made == asked:
        return Standing("done" if end else "cut")
    if work.cell.verb == "train" and made is not None and _all_but_evals(made) == _all_but_evals(asked):
        if end is None:
            return Standing("cut", evals_changed=True)
        return _evaluations(work, run, end.step, made.evals, asked.evals)
    lines = differences(run.config, to_dict(asked))
    more = f" and {len(lines) - 3} more" * (len(lines) > 3)
    what = f"made with other values than the grid has now ({'; '.join(lines[:3])}{more})"
    return Standing("other", f"{work.directory}: {what}; move it away and sweep again")


def is_finished(directory: Path) -> bool:
    """Whether a run directory says of itself that it ended, whatever it was asked."""
    try:
        return is_run(directory) and _end_of(load_run(directory)) is not None
    except RecordError:
        return False


def _end_of(run: Run) -> Event | None:
    """Where a run says that it ended; None if it has not, or goes on."""
    told = (*ENDED, "start", "config_changed")
    last = next((event for event in reversed(run.events) if event.name in told), None)
    return last if last is not None and last.name in ENDED else None


def _asked_of(run: Run, work: Work) -> Experiment:
    """What a cell asks for; the folder of all runs may have moved since the run was made."""
    experiment, before = work.experiment, run.config.get("train", {}).get("init_from")
    if work.cell.starts_from and str(before).endswith(f"/{work.cell.starts_from}"):
        experiment = replace(experiment, train=replace(experiment.train, init_from=before))
    return experiment


def _made_with(run: Run) -> Experiment | None:
    """The config of a run, where a field that there was not yet has its default; None if it is of no use any more."""
    try:
        return from_dict(Experiment, run.config)
    except ConfigError:
        return None


def _all_but_evals(experiment: Experiment) -> dict[str, Any]:
    return {name: value for name, value in to_dict(experiment).items() if name != "evals"}


def _before_its_start(run: Run, work: Work) -> str:
    """Empty, or that what a run starts from was trained after it: its weights are of an earlier one."""
    start = work.start
    if start is None or not run.events or not is_run(start):
        return ""
    try:
        ended = _end_of(load_run(start))
    except RecordError:
        return ""  # the cell it is will say what is wrong
    if ended is None or ended.time <= min(event.time for event in run.events) + CLOCKS:
        return ""
    return f"{work.directory}: begun before {start} was trained, from other weights; move it away and sweep again"


def _evaluations(work: Work, run: Run, step: int, made: Sequence[EvalSpec], asked: Sequence[EvalSpec]) -> Standing:
    """Of a finished run whose evaluations alone are not those of its cell: what is missing."""
    has = evaluated(run, made)
    for spec in asked:
        if has.taken.get(spec.name, fingerprint(spec)) != fingerprint(spec):
            fix = "give the new one a name of its own in the grid, and it is measured beside it"
            return Standing("other", f"{work.directory}: has another evaluation {spec.name!r} than the grid; {fix}")
    lacking = tuple(spec for spec in asked if spec.name not in has.complete)
    return Standing("lacks", lacking=lacking, step=step) if lacking else Standing("done")


def command_for(work: Work, standing: Standing) -> list[str]:
    """What brings a cell to its end: its own command, or the one that adds evaluations to its finished run."""
    if standing.evals_changed:
        return [*work.command, "--on-config-change=accept"]
    if not standing.lacking:
        return work.command
    evals = tuple(to_dict(spec) for spec in standing.lacking)
    return ["eval", str(work.directory), f"--step={standing.step}", f"--config.evals={evals!r}"]


def run_as_asked(work: Work, standing: Standing) -> Run:
    """The run of a cell that is `done` or `lacks`, with the cell's config and complete evaluations of the cell alone.

    Runs of an arm may have come to the same evaluations in different ways: in their configs, or added.
    """
    run = load_run(work.directory)
    names = {spec.name for spec in work.experiment.evals} - {spec.name for spec in standing.lacking}
    evals = [m for m in run.evals if m.evaluation in names]
    return replace(run, config=to_dict(_asked_of(run, work)), evals=evals)
