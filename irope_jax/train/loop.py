"""The training loop: one page, read top to bottom.

    restore or initialise -> (batch -> step -> record -> evaluate -> checkpoint)* -> final evaluation

What a step computes is in `step.py`, what survives a restart in `state.py`.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from irope_jax.checkpoint.native import CheckpointConfig, Checkpoints
from irope_jax.core.config import ConfigError, to_dict
from irope_jax.core.hosts import StopRequest, agree, is_main_process
from irope_jax.core.progress import ProgressBar
from irope_jax.core.records import NullWriter, RunWriter
from irope_jax.data.pipeline import DataConfig
from irope_jax.evals.evaluator import Evaluator
from irope_jax.model.config import ModelConfig
from irope_jax.model.cost import parameter_counts, train_flops_per_token
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.feed import Feed, context_layout
from irope_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from irope_jax.train.state import TrainState, evaluation_params, init_state, params_from, state_shardings
from irope_jax.train.step import make_train_step

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how to train.

    Attributes:
      steps: optimizer steps of the whole run.
      optimizer: AdamW and its schedule.
      z_loss: weight of the squared log-partition (PaLM uses 1e-4); 0 leaves it out.
      accumulate: parts a batch is cut into, one after the other, to save memory.
      log_every: steps between recorded scalars.
      eval_every: steps between evaluations; None evaluates only at the end.
      max_skipped_in_a_row: non-finite steps in a row after which the run stops with an error.
      init_from: run directory whose newest parameters to start from; None starts fresh.
    """

    steps: int
    optimizer: OptimizerConfig = OptimizerConfig()
    z_loss: float = 0.0
    accumulate: int = 1
    log_every: int = 10
    eval_every: int | None = None
    max_skipped_in_a_row: int = 10
    init_from: str | None = None

    def __post_init__(self):
        for name in ("steps", "accumulate", "log_every", "eval_every", "max_skipped_in_a_row"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, value, "must be at least 1")
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
    *,
    model: ModelConfig,
    data: DataConfig,
    config: TrainConfig,
    mesh: MeshConfig,
    checkpoint: CheckpointConfig,
    seed: int,
    evaluators: Sequence[Evaluator],
    writer: RunWriter | NullWriter,
    meta: dict[str, Any],
) -> Outcome:
    """Train until `config.steps`, from the newest checkpoint in `directory` if there is one.

    Bit-equal to an uninterrupted run wherever it is cut, on the same number of devices, and so are its records. SIGTERM
    and SIGINT save and return after the step or the measurement in hand; an evaluation cut short is done again. Of
    several processes all call this with the same arguments but `writer`; a signal to one of them stops all, a step or
    two later.

    Raises:
      TrainingError: too many non-finite steps in a row.
      DisagreementError: processes that do not see the same run directory.
      CheckpointError: a checkpoint or `init_from` that cannot be read.
    """
    device_mesh = make_mesh(mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    batches = Feed(data, context_layout(model, mesh), device_mesh)
    with (
        contextlib.closing(batches),
        Checkpoints(directory, checkpoint, create=True) as checkpoints,
        StopRequest() as stop,
    ):
        # ---- where to start -----------------------------------------------------------------------------------------
        abstract, shardings = state_shardings(model, optimizer, device_mesh)
        owed = False  # an evaluation that a signal cut short
        shared = "the run directory must lie where every process sees it, on a shared file system"
        if agree(f"{directory}: newest checkpoint", checkpoints.latest, shared) is not None:
            state, place, saved = checkpoints.restore(abstract, shardings)
            batches.set_state(place)
            owed = saved.get("evaluation_owed", False)
            log.info("resuming at step %d", int(state.step))
        else:
            state = init_state(model, optimizer, device_mesh, seed)
            if config.init_from is not None:
                params, step = params_from(config.init_from, model, device_mesh)
                log.info("parameters from %s, step %d", config.init_from, step)
                state = state.replace(params=params)
        start = int(state.step)
        counts = parameter_counts(model)
        writer.start(start, parameters=sum(counts.values()), devices=jax.device_count(), jax=jax.__version__)

        # ---- the step -----------------------------------------------------------------------------------------------
        rate = learning_rate(config.optimizer, config.steps)
        step_function = make_train_step(model, optimizer, rate, z_loss=config.z_loss, accumulate=config.accumulate)
        with_votes = lambda state, batch, votes: (*step_function(state, batch), jax.tree.map(lambda v: v.max(), votes))
        take_step = jax.jit(with_votes, donate_argnums=0, out_shardings=(shardings, None, None))
        meter = Meter(data.batch_size * data.seq_len, train_flops_per_token(model, data.seq_len, counts))

        def measure(step: int) -> bool:
            with jax.set_mesh(device_mesh):
                return evaluate(evaluators, state, step, writer, stop.ask)

        def stopped(step: int) -> Outcome:
            writer.event(step, "stopped", signal=stop.signal.name)
            return Outcome(step, int(stop.signal))

        # ---- the loop -----------------------------------------------------------------------------------------------
        if owed and not measure(start):
            return stopped(start)
        bar = ProgressBar("training", config.steps, done=start, quiet=not is_main_process())
        with jax.set_mesh(device_mesh), bar:
            for step in range(start + 1, config.steps + 1):
                state, scalars, greatest = take_step(state, next(batches), stop.vote(device_mesh))
                last = step == config.steps
                logs = step % config.log_every == 0 or last or step == 1
                figures, owed = {}, False
                if logs:
                    scalars = {name: float(value) for name, value in scalars.items()}  # waits for the device
                    writer.train(step, scalars | meter.read(step))
                    figures = {"loss": f"{scalars['loss']:.3f}", "tokens/s": f"{meter.tokens_per_second:,.0f}"}
                    check_finite(scalars, step, config.max_skipped_in_a_row)
                elif step == start + 1:
                    jax.block_until_ready(scalars)  # it compiled: its time says nothing about speed
                    meter.pause(step)
                stop.hear(greatest, newest=logs)
                bar.advance(**figures)
                if config.eval_every is not None and step % config.eval_every == 0 and not last:
                    owed = not measure(step)
                    meter.pause(step)
                if step % checkpoint.every == 0 or last or stop.signal is not None:
                    checkpoints.save(
                        step, state, batches.get_state(), {**meta, "model": to_dict(model), "evaluation_owed": owed}
                    )
                if stop.signal is not None:
                    return stopped(step)
        checkpoints.wait()
        if not measure(config.steps):
            return stopped(config.steps)
        writer.event(config.steps, "finished", skipped=int(state.skipped))
        return Outcome(config.steps)


def evaluate(
    evaluators: Sequence[Evaluator],
    state: TrainState,
    step: int,
    writer: RunWriter | NullWriter,
    stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Run every evaluation on the state's parameters and record what it measures; False if `stopped()` cut it short."""
    for evaluator in evaluators:
        for found in evaluator.run(evaluation_params(state)):
            writer.measure(step, evaluator.name, found.name, found.value, found.count, found.where)
            if stopped():
                return False
    return True


def check_finite(scalars: dict[str, float], step: int, limit: int) -> None:
    if scalars["skipped_in_a_row"] >= limit:
        raise TrainingError(
            f"step {step}: {scalars['skipped_in_a_row']:.0f} steps in a row had a loss or gradient that is not finite "
            f"(limit train.max_skipped_in_a_row={limit}; {scalars['skipped']:.0f} skipped in all); lower "
            "train.optimizer.learning_rate, lengthen its warm-up, or compute in float32"
        )


class Meter:
    """Speed since it was last read, and memory."""

    def __init__(self, tokens_per_step: int, flops_per_token: float):
        self._tokens, self._flops = tokens_per_step, flops_per_token
        self._step: int | None = None
        self._time = time.monotonic()
        self.tokens_per_second = float("nan")

    def read(self, step: int) -> dict[str, float]:
        now, figures = time.monotonic(), {"tokens": float(step * self._tokens), "memory_bytes": float(memory_in_use())}
        if self._step is not None and step > self._step:  # the first step compiles: its time says nothing
            seconds = (now - self._time) / (step - self._step)
            self.tokens_per_second = self._tokens / seconds
            figures |= {
                "step_seconds": seconds,
                "tokens_per_second": self.tokens_per_second,
                "flops_per_second": self.tokens_per_second * self._flops,
            }
        self._step, self._time = step, now
        return figures

    def pause(self, step: int) -> None:
        """Time since the last reading belongs to something else."""
        self._step, self._time = step, time.monotonic()


def memory_in_use() -> int:
    """Peak bytes: of the first local device where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
