"""The training loop, read top to bottom.

    (restore or initialise -> (batch -> step -> record -> evaluate -> checkpoint)* -> next stage)* -> final evaluation

What a step computes is in `step.py`, what survives a restart in `state.py`, what a stage is in `curriculum.py`, how one
begins in `entry.py`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from irope_jax.checkpoint.native import CheckpointConfig, Checkpoints
from irope_jax.core.config import ConfigError, to_dict
from irope_jax.core.hosts import is_main_process
from irope_jax.core.progress import ProgressBar
from irope_jax.core.records import NullWriter, RunWriter
from irope_jax.core.stopping import StopRequest
from irope_jax.core.watchdog import Watchdog, WatchdogConfig
from irope_jax.evals.evaluator import Evaluator, Measurement
from irope_jax.model.cost import parameter_counts, train_flops_per_token
from irope_jax.train.curriculum import Setting, Standing, judge, measured_before
from irope_jax.train.entry import Begun, enter
from irope_jax.train.meter import Meter, Stopwatch
from irope_jax.train.optimizer import OptimizerConfig, learning_rate
from irope_jax.train.profile import Profiler
from irope_jax.train.spikes import GoBack, Ignore, Skip, SpikePolicy
from irope_jax.train.state import TrainState, evaluation_params
from irope_jax.train.step import make_train_step

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how to train.

    Attributes:
      steps: optimizer steps of the whole run.
      optimizer: the algorithm, its schedule, and which parameters it trains.
      z_loss: weight of the squared log-partition (PaLM uses 1e-4); 0 leaves it out.
      accumulate: parts a batch is cut into, one after the other, to save memory.
      log_every: steps between recorded scalars.
      by_layer: record also the norms of gradients, updates and parameters of each layer's two parts.
      eval_every: steps between evaluations; None evaluates only at the end.
      eval_during: names of the evaluations taken every so many steps, and not the others; None takes all. At the end of
        the run and of each of its stages all are taken.
      max_skipped_in_a_row: skipped steps in a row after which the run stops with an error.
      spikes: what happens when the recorded loss jumps: `ignore`, `skip` updates, or `roll_back` and jump the data.
      watchdog: when a run that does not move says where it stands.
      init_from: run directory whose newest parameters to start from; None starts fresh.
    """

    steps: int
    optimizer: OptimizerConfig = OptimizerConfig()
    z_loss: float = 0.0
    accumulate: int = 1
    log_every: int = 10
    by_layer: bool = False
    eval_every: int | None = None
    eval_during: tuple[str, ...] | None = None
    max_skipped_in_a_row: int = 10
    spikes: SpikePolicy = Ignore()
    watchdog: WatchdogConfig = WatchdogConfig()
    init_from: str | None = None

    def __post_init__(self):
        for name in ("steps", "accumulate", "log_every", "eval_every", "max_skipped_in_a_row"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, value, "must be at least 1")
        if self.eval_during is not None and self.eval_every is None:
            raise ConfigError("eval_during", self.eval_during, "says which of them; set eval_every to say when")
        try:
            learning_rate(self.optimizer, self.steps)
        except ConfigError as error:
            raise error.within("optimizer") from None


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says what was seen and what to change."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: the step reached, and the signal that stopped it, if one did."""

    step: int
    stopped_by: int | None = None


def train(
    directory: str | Path,
    settings: Sequence[Setting],
    *,
    checkpoint: CheckpointConfig,
    seed: int,
    writer: RunWriter | NullWriter,
    meta: dict[str, Any],
    profiler: Profiler | None = None,
) -> Outcome:
    """Train all stages, from the newest checkpoint in `directory` if there is one.

    Bit-equal to an uninterrupted run wherever it is cut, on the same number of devices, and so are its records. SIGTERM
    and SIGINT save and return after the step or the measurement in hand; an evaluation cut short is done again. Of
    several processes all call this with the same arguments but `writer`; a signal to one of them stops all, a step or
    two later.

    Between stages the state goes through the checkpoint at the border, so a run that is cut there goes on as one that
    is not.

    `profiler` traces some steps; what is trained does not depend on it.

    Raises:
      TrainingError: too many non-finite steps in a row, a gate that did not open and must, or a stage that has left no
        whole checkpoint for the next one.
      DisagreementError: processes that do not see the same run directory.
      CheckpointError: a checkpoint or `init_from` that cannot be read.
    """
    with (
        Checkpoints(directory, checkpoint, create=True) as checkpoints,
        StopRequest() as stop,
        Watchdog(settings[0].train.watchdog) as dog,
    ):
        over: Outcome | Standing | GoBack | None = None
        watch, profiler = Stopwatch(), profiler or Profiler(None, Path(directory))
        while not isinstance(over, Outcome):
            if isinstance(over, GoBack):
                over = _go_back(over, checkpoints, writer)
            with watch.during("start-up"):
                begun = enter(directory, settings, checkpoints, seed, over)
            with contextlib.closing(begun), contextlib.closing(profiler):
                over = _train_stage(
                    begun, settings, checkpoints, stop, dog, writer, checkpoint.every, meta, watch, profiler
                )
        return over


def _go_back(spike: GoBack, checkpoints: Checkpoints, writer: RunWriter | NullWriter) -> GoBack:
    """Make the newest checkpoint from before a spike the newest of all.

    Raises:
      TrainingError: there is none.
    """
    to = checkpoints.newest(spike.before)
    if to is None:
        raise TrainingError(
            f"step {spike.step}: the loss is far above the usual {spike.usual:.4g}, and no checkpoint is older; save "
            "more often (checkpoint.every, checkpoint.keep), or train with another rate"
        )
    checkpoints.discard_after(to)
    jumped = spike.batches(to)
    writer.event(to, "rolled_back", spike_at=spike.before, seen_at=spike.step, usual=spike.usual, jumped=jumped)
    log.warning("loss spike at step %d: back to step %d, past %d batches", spike.before, to, jumped)
    return spike


def _train_stage(
    begun: Begun,
    settings: Sequence[Setting],
    checkpoints: Checkpoints,
    stop: StopRequest,
    dog: Watchdog,
    writer: RunWriter | NullWriter,
    save_every: int,
    meta: dict[str, Any],
    watch: Stopwatch,
    profiler: Profiler,
) -> Outcome | Standing | GoBack:
    """Train a stage to its end; where the next one begins, if another follows, or a spike to go back from."""
    setting, standing, device_mesh, config = begun.setting, begun.standing, begun.mesh, begun.setting.train
    model, data, gate = setting.model, setting.data, setting.gate
    start, end = begun.step, standing.began + config.steps
    final = standing.stage + 1 == len(settings)
    counts = parameter_counts(model)
    writer.start(start, parameters=sum(counts.values()), devices=jax.device_count(), jax=jax.__version__)
    if setting.stage is not None and start == standing.began:
        rows = dict(length=data.seq_len, batch_size=data.batch_size, at_most=config.steps)
        writer.event(start, "stage", number=standing.stage, stage=setting.stage.name, **rows)

    # ---- the step ---------------------------------------------------------------------------------------------------
    step_function = make_train_step(
        model,
        begun.optimizer,
        lambda step: begun.rate(step - standing.reset_at),
        z_loss=config.z_loss,
        accumulate=config.accumulate,
        by_layer=config.by_layer,
    )
    greatest = lambda votes: jax.tree.map(lambda v: v.max(), votes)
    with_votes = lambda state, batch, votes, most: (*step_function(state, batch, most), greatest(votes))
    take_step = jax.jit(with_votes, donate_argnums=0, out_shardings=(begun.shardings, None, None))
    flops = train_flops_per_token(model, data.seq_len, counts)
    meter = Meter(data.batch_size * data.seq_len, flops, begun=(standing.began, standing.tokens))
    state = begun.state

    def measure(step: int, evaluators: Sequence[Evaluator]) -> Measured | None:
        dog.beat(step, "evaluation")
        with jax.set_mesh(device_mesh), watch.during("evaluation"):
            return evaluate(evaluators, state, step, writer, stop.ask)

    def review(step: int) -> tuple[Measured | None, bool]:
        """What is due after a step is measured: `(None if a signal cut it, whether the stage is over)`."""
        last, asked = step == end, gate is not None and gate.due(step - standing.began)
        planned = config.eval_every is not None and step % config.eval_every == 0 and not (last and final)
        judges = {condition.evaluation for condition in gate.conditions} if gate and (asked or last) else set()
        during = lambda e: planned and (config.eval_during is None or e.name in config.eval_during)
        chosen = [e for e in setting.evaluators if (last and not final) or during(e) or e.name in judges]
        found = measure(step, chosen) if chosen else []
        if found is None or not judges:
            return found, last
        verdict = judge(gate, found, standing.before)
        writer.event(step, "gate", opens=verdict.opens, **verdict.values)
        if last and not verdict.opens and gate.at_limit == "stop":
            raise TrainingError(
                f"step {step}: the gate of stage {setting.stage.name!r} did not open in its {config.steps} steps "
                f"({', '.join(f'{label} is {value:.4g}' for label, value in verdict.values.items())}); "
                "give it more steps, or set at_limit='go_on'"
            )
        rest = [e for e in setting.evaluators if e not in chosen] if verdict.opens and not final else []
        more = measure(step, rest) if rest else []
        return (None if more is None else found + more), last or verdict.opens

    def now(over: bool, found: Measured | None) -> Standing:
        if not over:
            return standing
        then = settings[standing.stage + 1].gate if not final else None
        return replace(standing, ended=True, before=measured_before(then, found or []))

    def save(step: int, over: bool, found: Measured | None) -> None:
        dog.beat(step, "checkpoint")
        told = {"model": to_dict(model), "evaluation_owed": found is None, "curriculum": to_dict(now(over, found))}
        told["spikes"] = begun.detector.state()
        with watch.during("checkpoint"):
            checkpoints.save(step, state, begun.batches.get_state(), {**meta, **told})
        writer.event(step, "spent", **watch.lap())

    def stopped(step: int) -> Outcome:
        writer.event(step, "stopped", signal=stop.signal.name)
        return Outcome(step, int(stop.signal))

    # ---- the loop ---------------------------------------------------------------------------------------------------
    step, over, found = start, standing.ended or (start == end and not begun.owed), []
    if begun.owed:
        found, over = review(start)
        if found is None:
            return stopped(start)
    title = f"training {setting.stage.name}" if setting.stage else "training"
    bar = ProgressBar(title, config.steps, done=start - standing.began, quiet=not is_main_process())
    with jax.set_mesh(device_mesh), bar:
        while not over:
            step += 1
            most = begun.detector.limit if isinstance(config.spikes, Skip) else None
            with watch.during("data"):
                batch = next(begun.batches)
            vote = stop.vote(device_mesh)
            profiler.before(step)
            with watch.during("compile") if step == start + 1 else contextlib.nullcontext():
                state, scalars, votes = take_step(state, batch, vote, most)
            with watch.during("profile"):
                program = lambda s=state, b=batch, v=vote, m=most: take_step.lower(s, b, v, m).compile().as_text()
                if profiler.after(step, scalars, program):
                    meter.pause(step)
            dog.beat(step)
            logs = step % config.log_every == 0 or step in (end, 1)
            figures = {}
            if logs:
                scalars = {name: float(value) for name, value in scalars.items()}  # waits for the device
                writer.train(step, scalars | meter.read(step))
                figures = {"loss": f"{scalars['loss']:.3f}", "tokens/s": f"{meter.tokens_per_second:,.0f}"}
                check_finite(scalars, step, config.max_skipped_in_a_row)
                spike = begun.detector.saw(step, scalars["loss"])
                if spike is not None:
                    return spike
            elif step == start + 1:
                jax.block_until_ready(scalars)  # it compiled: its time says nothing about speed
                meter.pause(step)
            stop.hear(votes, newest=logs)
            bar.advance(**figures)
            begins = time.monotonic()
            found, over = review(step)
            if time.monotonic() - begins > 1e-3:
                meter.pause(step)
            if step % save_every == 0 or over or stop.signal is not None:
                ended = over and found is not None and not (final and step == end)  # a last stage may get more steps
                save(step, ended, found)
            if stop.signal is not None:
                return stopped(step)
    with watch.during("checkpoint"):
        checkpoints.wait()
    if not final:
        if checkpoints.latest != step:
            raise TrainingError(
                f"step {step}: stage {setting.stage.name!r} has left no whole checkpoint; free space or look after the "
                "disk, then give the same command again: training goes on from the one before"
            )
        return now(True, found)
    done = {name for name, _ in found}
    if measure(step, [e for e in setting.evaluators if e.name not in done]) is None:
        return stopped(step)
    writer.event(step, "spent", **watch.lap())
    writer.event(step, "finished", skipped=int(state.skipped), planned=sum(one.train.steps for one in settings))
    return Outcome(step)


Measured = list[tuple[str, Measurement]]
"""What evaluations found, each with the name of its evaluation."""


def evaluate(
    evaluators: Sequence[Evaluator],
    state: TrainState,
    step: int,
    writer: RunWriter | NullWriter,
    stopped: Callable[[], bool] = lambda: False,
) -> Measured | None:
    """Run every evaluation on the state's parameters and record what it measures; None if `stopped()` cut it short."""
    measured = []
    for evaluator in evaluators:
        for found in evaluator.run(evaluation_params(state)):
            writer.measure(step, evaluator.name, found.name, found.value, found.count, found.where)
            measured.append((evaluator.name, found))
            if stopped():
                return None
    return measured


def check_finite(scalars: dict[str, float], step: int, limit: int) -> None:
    if scalars["skipped_in_a_row"] >= limit:
        raise TrainingError(
            f"step {step}: {scalars['skipped_in_a_row']:.0f} steps in a row had a loss or gradient that is not finite "
            f"(limit train.max_skipped_in_a_row={limit}; {scalars['skipped']:.0f} skipped in all); lower "
            "train.optimizer.learning_rate, lengthen its warm-up, or compute in float32"
        )
