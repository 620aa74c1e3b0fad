"""Where training begins: fresh, from other weights or a checkpoint, from the stage before, or back before a spike."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from irope_jax.checkpoint.native import Checkpoints
from irope_jax.core.config import ConfigError, from_dict
from irope_jax.core.hosts import agree
from irope_jax.model.config import ModelConfig
from irope_jax.sharding.mesh import make_mesh
from irope_jax.train.curriculum import Setting, Standing, restacked
from irope_jax.train.feed import Feed, context_layout
from irope_jax.train.optimizer import Optimizer, learning_rate, make_optimizer
from irope_jax.train.spikes import GoBack, SpikeDetector
from irope_jax.train.state import TrainState, beside, init_state, params_from, start_from, state_shardings

log = logging.getLogger(__name__)


@dataclass
class Begun:
    """A stage that is about to be trained, or trained on: where it stands and all that it holds."""

    setting: Setting
    standing: Standing
    mesh: Mesh
    optimizer: Optimizer
    rate: optax.Schedule
    batches: Feed
    state: TrainState
    shardings: TrainState
    detector: SpikeDetector
    owed: bool
    """An evaluation that a signal cut short."""

    @property
    def step(self) -> int:
        return int(self.state.step)

    def close(self) -> None:
        self.batches.close()


def enter(
    directory: str | Path,
    settings: Sequence[Setting],
    checkpoints: Checkpoints,
    seed: int,
    over: Standing | GoBack | None,
) -> Begun:
    """The stage that the newest checkpoint is in, or is the beginning of.

    `over` is what is known beyond it: that its stage is over, or that this is where training went back to.
    """
    shared = "the run directory must lie where every process sees it, on a shared file system"
    latest = agree(f"{directory}: newest checkpoint", checkpoints.latest, shared)
    saved = checkpoints.meta(latest) if latest is not None else {}
    standing = (
        over
        if isinstance(over, Standing)
        else from_dict(Standing, saved.get("curriculum", {}), f"{directory}.curriculum")
    )
    if standing.stage >= len(settings):
        fix = f"the newest checkpoint is in stage {standing.stage}; the config has {len(settings)}"
        raise ConfigError("config.stages", len(settings), fix)
    there = setting = settings[standing.stage]
    made_by = make_optimizer(there.train.optimizer, there.rate_steps, standing.rate_begins(there))
    crosses = standing.ended and standing.stage + 1 < len(settings)
    if crosses:
        setting = settings[standing.stage + 1]
        standing = standing.next(latest, there, setting)
    begins = standing.rate_begins(setting)
    optimizer = make_optimizer(setting.train.optimizer, setting.rate_steps, begins)
    rate = learning_rate(setting.train.optimizer, setting.rate_steps, begins)
    if optimizer.on_host and jax.default_backend() == "cpu":
        fix = "a CPU has one memory, and XLA fails on two kinds of it; use 'device'"
        raise ConfigError("config.train.optimizer.state.place", "host", fix)
    mesh = make_mesh(setting.mesh)
    batches = Feed(setting.data, context_layout(setting.model, setting.mesh), mesh)
    abstract, shardings = state_shardings(setting.model, optimizer, mesh)
    if latest is None:
        state = init_state(setting.model, optimizer, mesh, seed)
        if setting.train.init_from is not None:
            params, step = params_from(setting.train.init_from, setting.model, mesh)
            log.info("parameters from %s, step %d", setting.train.init_from, step)
            state = start_from(state, params, optimizer, shardings)
    else:
        state, place, _ = checkpoints.restore(*state_shardings(there.model, made_by, mesh))
        if crosses:
            stacked = jax.eval_shape(lambda s: restacked(s, there.model, setting.model), state)
            _check_carried(stacked, abstract, setting, standing.stage)
            with jax.set_mesh(mesh):
                move = jax.jit(lambda s: moved(s, there.model, setting, optimizer), out_shardings=shardings)
                state = move(state)
        if not crosses or setting.same_stream(there):
            batches.set_state(place)
        log.info("%s at step %d", f"stage {setting.stage.name} begins" if crosses else "resuming", int(state.step))
    owed = saved.get("evaluation_owed", False) and not crosses
    spike = over if isinstance(over, GoBack) else None
    if spike is not None:
        batches.skip(spike.batches(latest))
    detector = SpikeDetector.at(setting.train.spikes, saved.get("spikes"), spike)
    return Begun(setting, standing, mesh, optimizer, rate, batches, state, shardings, detector, owed)


def _check_carried(has: TrainState, wants: TrainState, setting: Setting, number: int) -> None:
    """Raises `ConfigError` if a stage is to carry on the state of another kind of optimizer."""
    beside = lambda state: jax.tree.structure((state.opt_state, state.averaged))
    if not setting.fresh_optimizer and beside(has) != beside(wants):
        fix = "its optimizer keeps other things than that of the stage before; use 'reset'"
        raise ConfigError(f"config.stages.{number}.optimizer_state", "carry", fix)


def moved(state: TrainState, source: ModelConfig, setting: Setting, optimizer: Optimizer) -> TrainState:
    """A state of the stage before as the next one takes it: stacked as its model, the optimizer fresh if reset."""
    state = restacked(state, source, setting.model)
    if not setting.fresh_optimizer:
        return state
    opt_state, averaged = beside(optimizer, state.params)
    return state.replace(opt_state=opt_state, averaged=averaged)
