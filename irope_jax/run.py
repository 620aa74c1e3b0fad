"""What each verb of the command line does: wiring between the rooms, and nothing that could live in one of them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from irope_jax.checkpoint.native import CHECKPOINTS, CheckpointError, Checkpoints
from irope_jax.core.config import ConfigError, fingerprint, nearest, to_dict
from irope_jax.core.hosts import (
    DisagreementError,
    agree,
    gather,
    is_main_process,
)
from irope_jax.core.mirrors import MirrorMissingError, WandbConfig
from irope_jax.core.records import (
    ADDED,
    ADDED_ENDED,
    ConfigChangedError,
    NullWriter,
    RecordError,
    Run,
    RunWriter,
    load_run,
)
from irope_jax.evals.registry import EvalSpec, build_evaluators
from irope_jax.evaluated import evaluated
from irope_jax.experiment import Experiment, check_devices, load_config, resolve, run_config
from irope_jax.export import export_verb
from irope_jax.generate import generate_verb
from irope_jax.join import join
from irope_jax.model.config import draw_layers
from irope_jax.plan.parts import seconds_by_part
from irope_jax.planning import plan_verb
from irope_jax.position.longrope_search import SearchError
from irope_jax.prepare import prepare_verb
from irope_jax.reporting import report_verb
from irope_jax.search import search_rope_verb
from irope_jax.sharding.mesh import make_mesh
from irope_jax.show import show_verb
from irope_jax.stages import experiment_at, settings_of
from irope_jax.study.plots import PlotsMissingError
from irope_jax.study.report import summary_tables
from irope_jax.sweep import sweep_verb
from irope_jax.train.loop import TrainingError, train
from irope_jax.train.profile import Profiler, Steps
from irope_jax.train.spikes import SpikeError
from irope_jax.train.state import fresh_params, params_for, params_from
from irope_jax.transfer import import_verb

log = logging.getLogger(__name__)

EXPECTED_ERRORS = (
    CheckpointError, DisagreementError, MirrorMissingError, PlotsMissingError, RecordError, SearchError, SpikeError,
    TrainingError,
)  # fmt: skip
"""Failures whose message alone tells a user what to do."""

EVALUATIONS = "evaluations"
"""Where below a run directory evaluations keep the cells they have finished."""

Overrides = list[tuple[str, str]]


def train_verb(args: argparse.Namespace, overrides: Overrides) -> int:
    profile = None if args.profile is None else Steps.parse(args.profile)
    join(args)
    experiment = resolve(load_config(args.config), overrides)
    directory = Path(args.run_dir or Path("runs") / experiment.name)
    values, mark = to_dict(experiment), fingerprint(experiment)
    agree("the resolved config", [mark, str(directory)], "start every process with the same command")
    # Before the run directory is made or told anything: what the config asks for may not be there.
    settings = settings_of(experiment, jax.device_count())
    steps = sum(setting.train.steps for setting in settings)
    with _writer(directory, values, mark, args.on_config_change, experiment.wandb) as writer:
        if is_finished(directory, steps):
            log.info(
                "%s is finished: trained and evaluated; nothing to do (raise train.steps with "
                "--on-config-change=accept to go on, or choose another --run-dir)",
                directory,
            )
            return 0
        outcome = train(
            directory,
            settings,
            checkpoint=experiment.checkpoint,
            seed=experiment.seed,
            writer=writer,
            meta={"fingerprint": mark, "config": values},
            profiler=Profiler(profile, directory, seconds_by_part),
        )
    if outcome.stopped_by is not None:
        log.info("stopped at step %d with everything saved in %s; the same command goes on", outcome.step, directory)
        return 128 + outcome.stopped_by
    log.info("step %d reached; run directory %s", outcome.step, directory)
    if is_main_process():
        _summary(directory)
    return 0


def _summary(directory: Path) -> None:
    """What a finished run found, and what can be done with it."""
    console = Console(stderr=True)
    for table in summary_tables([directory]):
        console.print(table)
    for command, what in (
        (f"irope report {directory}", "tables and pictures on a page"),
        (f"irope eval {directory}", "evaluate again, longer or otherwise: --config.evals..."),
        (f"irope export {directory} exported/{directory.name}", "a Hugging Face folder"),
    ):
        console.print(f"next: {command}   [dim]{what}[/dim]", highlight=False, soft_wrap=True)


def _writer(
    directory: Path, values: dict, mark: str, on_config_change: str, wandb: WandbConfig | None
) -> RunWriter | NullWriter:
    """Process 0 writes; if it cannot, no process goes on."""
    writer, refused = NullWriter(), None
    if is_main_process():
        try:
            writer = RunWriter(directory, values, mark, wandb=wandb, on_config_change=on_config_change)
        except ConfigChangedError as error:
            refused = (
                f"{directory}: begun with other values: {'; '.join(error.differences) or 'of another version'}; "
                "choose another --run-dir, or go on with --on-config-change=accept"
            )
        except (MirrorMissingError, RecordError) as error:
            refused = str(error)
    refused = gather(refused)[0]
    if refused is not None:
        raise RecordError(refused)
    return writer


def is_finished(directory: Path, steps: int) -> bool:
    """Whether a run directory was trained to its end and evaluated with the config it has now.

    `steps` are those of that config at most: gates may end a stage earlier.
    """
    # Process 0 writes the records: others may not see yet what it just wrote.
    end = gather(_finished_at(directory, steps) if is_main_process() else None)[0]
    if end is None:
        return False
    with Checkpoints(directory) as checkpoints:
        return checkpoints.latest == end


def _finished_at(directory: Path, steps: int) -> int | None:
    """The step at which a run says that it ended; None if it does not."""
    told = ("finished", "start", "config_changed")
    last = next((event for event in reversed(load_run(directory).events) if event.name in told), None)
    if last is None or last.name != "finished" or last.details.get("planned", last.step) != steps:
        return None
    return last.step if (directory / CHECKPOINTS).is_dir() else None


def eval_verb(args: argparse.Namespace, overrides: Overrides) -> int:
    join(args)
    if (args.run is None) == (args.config is None):
        raise ConfigError("RUN", args.run, "name a run directory, or a config file with --config, and not both")
    return _evaluate_config(args, overrides) if args.run is None else _evaluate_run(args, overrides)


def _evaluate_run(args: argparse.Namespace, overrides: Overrides) -> int:
    directory = Path(args.run)
    whole = resolve(run_config(directory))
    trained = experiment_at(directory, whole, args.step)
    experiment = resolve(to_dict(trained), overrides)
    if experiment.model.pattern != trained.model.pattern:
        log.info("the layers differ from those trained: %s", draw_layers(experiment.model).splitlines()[0])
    chosen = _chosen(experiment, args.only)
    mesh = make_mesh(check_devices(experiment, jax.device_count()))
    asked = [fingerprint(experiment), str(directory), args.step, args.only]
    agree("what to evaluate", asked, "start every process with the same command")
    with jax.set_mesh(mesh):
        params, step = params_for(directory, trained.model, experiment.model, mesh, args.step)
        # Another mesh measures the same; anything else would put numbers of another model or task into this run.
        as_trained = replace(experiment, mesh=trained.mesh, evals=trained.evals) == trained
        run = load_run(directory)
        recorded = _recorded(run, trained.evals, chosen) if as_trained else {}
        added = [spec for spec in recorded.values() if spec not in trained.evals]
        with _writer(directory, run.config, run.fingerprint, "refuse", None) if recorded else NullWriter() as writer:

            def tell(event: str) -> None:
                for spec in added:
                    writer.event(step, event, evaluation=spec.name, kind=spec.kind, spec=fingerprint(spec))

            tell(ADDED)
            _measure(experiment, chosen, params, step, directory, writer, recorded)
            tell(ADDED_ENDED)
    printed = [spec.name for spec in chosen if spec.name not in recorded]
    if printed:
        log.info(
            "evaluated with changed values: printed only, not added to %s: %s; an evaluation with a name of its own "
            "(--config.evals...name=...) is added",
            directory / "records.jsonl",
            ", ".join(printed),
        )
    return 0


def _evaluate_config(args: argparse.Namespace, overrides: Overrides) -> int:
    """Evaluate the model of a config that trains nothing: from another run's weights, or fresh ones."""
    if args.step is not None:
        raise ConfigError("--step", args.step, "a config has no checkpoints; the weights are those of train.init_from")
    experiment = resolve(load_config(args.config), overrides)
    chosen = _chosen(experiment, args.only)
    directory = Path(args.run_dir or Path("runs") / experiment.name)
    if (directory / CHECKPOINTS).is_dir():
        raise ConfigError(
            "--config", args.config, f"{directory} was trained; evaluate it with `irope eval {directory}`"
        )
    mesh = make_mesh(check_devices(experiment, jax.device_count()))
    values, mark = to_dict(experiment), fingerprint(experiment)
    agree("what to evaluate", [mark, str(directory), args.only], "start every process with the same command")
    with jax.set_mesh(mesh), _writer(directory, values, mark, "refuse", None) as writer:
        train = experiment.train
        if train.init_from is None:
            params, step = fresh_params(experiment.model, mesh, experiment.seed), 0
            log.info("weights are fresh ones: train.init_from names no run")
        else:
            params, step = params_from(train.init_from, experiment.model, mesh)
            log.info("weights are those of %s at step %d", train.init_from, step)
        _measure(experiment, chosen, params, step, directory, writer, {spec.name: spec for spec in chosen})
        if len(chosen) == len(experiment.evals):
            writer.event(step, "evaluated")
    log.info("recorded in %s; tables and pictures: irope report %s", directory, directory)
    return 0


def _chosen(experiment: Experiment, only: Sequence[str] | None) -> list[EvalSpec]:
    """The evaluations of a config, or those asked for by name."""
    names = [spec.name for spec in experiment.evals]
    for name in only or ():
        if name not in names:
            raise ConfigError("--only", name, f"no such evaluation in the config; {nearest(name, names)}")
    chosen = [spec for spec in experiment.evals if not only or spec.name in only]
    if not chosen:
        raise ConfigError("config.evals", [], "this config has no evaluations; see configs/quickstart.py for two")
    return chosen


def _measure(
    experiment: Experiment,
    chosen: Sequence[EvalSpec],
    params: Any,
    step: int,
    directory: Path,
    writer: RunWriter | NullWriter,
    recorded: dict[str, EvalSpec],
) -> None:
    """Run evaluations; print what they find, and record it under the names of `recorded`."""
    model, tokenizer = experiment.model, experiment.data.tokenizer
    for evaluator in build_evaluators(chosen, model, tokenizer, directory=directory / EVALUATIONS):
        for found in evaluator.run(params):
            if evaluator.name in recorded:
                writer.measure(step, evaluator.name, found.name, found.value, found.count, found.where)
            if is_main_process():
                where = "  ".join(f"{k}={v}" for k, v in found.where.items())
                print(f"{evaluator.name}  {found.name}  {found.value:.4f}  n={found.count}  {where}", flush=True)


def _recorded(run: Run, trained: Sequence[EvalSpec], chosen: Sequence[EvalSpec]) -> dict[str, EvalSpec]:
    """The evaluations, by name, whose numbers may join the records of a run.

    Those of its config as they are; and others under names that neither the config nor another evaluation has taken.
    """
    taken = evaluated(run, trained).taken
    return {spec.name: spec for spec in chosen if taken.get(spec.name, fingerprint(spec)) == fingerprint(spec)}


VERBS = {
    "train": train_verb,
    "eval": eval_verb,
    "export": export_verb,
    "generate": generate_verb,
    "import": import_verb,
    "plan": plan_verb,
    "prepare": prepare_verb,
    "report": report_verb,
    "search-rope": search_rope_verb,
    "show": show_verb,
    "sweep": sweep_verb,
}
