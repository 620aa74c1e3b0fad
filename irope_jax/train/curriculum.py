"""A run as a row of stages: what each trains, when it is over, and what the next one takes from it.

Belongs here: the specs, the decision whether a gate opens, and how a training state goes from one stage's model and
mesh to the next one's. How a stage is resolved from a config is `experiment`'s, how it is trained `loop`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax

from irope_jax.core.config import ConfigError
from irope_jax.data.config import DataConfig
from irope_jax.evals.evaluator import Evaluator, Measurement
from irope_jax.model.config import ModelConfig
from irope_jax.model.decoder import restack
from irope_jax.sharding.mesh import MeshConfig


@dataclass(frozen=True)
class Condition:
    """A bound on what an evaluation measures; exactly one of the last three is given.

    Attributes:
      evaluation: its `name` in `config.evals`.
      measure: such as `nll_by_length` or `accuracy`.
      where: cells that count, such as `{'length': 256}`; of several the mean, weighed by their counts.
      at_most, at_least: the bound.
      within: at most this share above what it was when the stage began: 0.02 is two percent.
    """

    evaluation: str
    measure: str
    where: dict[str, float] = field(default_factory=dict)
    at_most: float | None = None
    at_least: float | None = None
    within: float | None = None

    def __post_init__(self):
        given = [name for name in ("at_most", "at_least", "within") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError("at_most", self.at_most, "give exactly one of at_most, at_least and within")

    @property
    def label(self) -> str:
        where = ",".join(f"{name}={value:g}" for name, value in self.where.items())
        return f"{self.evaluation}.{self.measure}" + (f"[{where}]" if where else "")

    def value(self, found: Iterable[tuple[str, Measurement]]) -> float:
        """The mean of what it speaks of.

        Raises:
          ConfigError: nothing of the kind was measured.
        """
        total = count = 0.0
        for evaluation, one in found:
            here = all(one.where.get(name) == value for name, value in self.where.items())
            if evaluation == self.evaluation and one.name == self.measure and here:
                total, count = total + one.value * one.count, count + one.count
        if not count:
            fix = "nothing of the kind is measured; see the evaluation's lengths and what it records"
            raise ConfigError("gate.conditions", self.label, fix)
        return total / count

    def holds(self, value: float, before: float | None) -> bool:
        """Whether it holds of a value, given the one from before the stage (None where there was nothing before)."""
        if self.at_least is not None:
            return value >= self.at_least
        if self.at_most is not None:
            return value <= self.at_most
        return before is None or value <= before * (1 + self.within)


@dataclass(frozen=True)
class Gate:
    """When a stage may end before its last step: as soon as all conditions hold.

    Attributes:
      conditions: what must hold.
      every: steps between measurements.
      least_steps: steps before the first.
      at_limit: what happens if the last step comes first: `go_on` to the next stage, or `stop` the run with an error.
    """

    conditions: tuple[Condition, ...]
    every: int = 100
    least_steps: int = 0
    at_limit: Literal["go_on", "stop"] = "go_on"

    def __post_init__(self):
        if not self.conditions:
            raise ConfigError("conditions", self.conditions, "give at least one, or leave the gate out")
        if self.every < 1:
            raise ConfigError("every", self.every, "steps between measurements, 1 or more")

    def due(self, step: int) -> bool:
        """Whether to measure after this many steps of the stage."""
        return step >= self.least_steps and step % self.every == 0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage changes of the config as the stage before left it; the first changes the config itself.

    Attributes:
      name: in records and reports.
      steps: its last step; or
      tokens: as many steps as take this many.
      length: `data.seq_len`.
      batch_tokens: `data.batch_size` as tokens of a batch.
      change: further values by dotted path, `*` for every layer that has such a field:
        `{'model.pattern.*.position.theta': 8e6, 'model.pattern.*.mask.size': 512, 'mesh.context': 8}`.
      schedule: the learning rate's schedule spans the `stage`, warm-up included, or goes on as that of the whole `run`.
      optimizer_state: moments and counts are carried into the stage, or `reset`.
      gate: what ends it early; None trains all steps.
    """

    name: str
    steps: int | None = None
    tokens: int | None = None
    length: int | None = None
    batch_tokens: int | None = None
    change: dict[str, Any] = field(default_factory=dict)
    schedule: Literal["stage", "run"] = "stage"
    optimizer_state: Literal["carry", "reset"] = "carry"
    gate: Gate | None = None

    def __post_init__(self):
        if (self.steps is None) == (self.tokens is None):
            raise ConfigError("steps", self.steps, "give the steps of the stage, or its tokens")
        for name in ("steps", "tokens", "length", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, value, "must be at least 1")


@dataclass(frozen=True)
class Setting:
    """A stage, resolved: everything the loop needs of it.

    Attributes:
      stage: None where a run has no stages.
      train: a `loop.TrainConfig`; its `steps` are the most that the stage takes.
      rate_steps: steps that the schedule of the learning rate spans.
      evaluators: those of its config, built for its model.
    """

    stage: Stage | None
    model: ModelConfig
    data: DataConfig
    train: Any
    mesh: MeshConfig
    rate_steps: int
    evaluators: Sequence[Evaluator] = ()

    @property
    def gate(self) -> Gate | None:
        return self.stage.gate if self.stage else None

    @property
    def fresh_optimizer(self) -> bool:
        """Whether the stage begins with an optimizer that knows nothing of what was before."""
        return self.stage is not None and self.stage.optimizer_state == "reset"

    def same_stream(self, other: Setting) -> bool:
        """Whether its data go on where those of another stage stopped."""
        return replace(self.data, batch_size=1, prefetch=0) == replace(other.data, batch_size=1, prefetch=0)


@dataclass(frozen=True)
class Standing:
    """Where in the row of stages a checkpoint stands; saved with it.

    Attributes:
      stage: number of the stage that saved it, from 0.
      began: steps of the run before the stage.
      tokens: places of rows that these steps read.
      reset_at: step of the run at which the optimizer was last fresh.
      ended: the stage is over; the next one starts from here.
      before: what conditions measured when the stage began, by label; of an ended one, those of the next.
    """

    stage: int = 0
    began: int = 0
    tokens: int = 0
    reset_at: int = 0
    ended: bool = False
    before: dict[str, float] = field(default_factory=dict)

    def next(self, step: int, setting: Setting, then: Setting) -> Standing:
        """At the beginning of the stage `then`, after `setting` was over at `step`."""
        tokens = self.tokens + (step - self.began) * setting.data.batch_size * setting.data.seq_len
        reset_at = step if then.fresh_optimizer else self.reset_at
        return Standing(self.stage + 1, step, tokens, reset_at, False, self.before)

    def rate_begins(self, setting: Setting) -> int:
        """Count of the optimizer at which the schedule of its stage begins."""
        spans_run = setting.stage is not None and setting.stage.schedule == "run"
        return 0 if spans_run else self.began - self.reset_at


class Verdict(NamedTuple):
    """What a gate found: whether it opens, and the values of its conditions by label."""

    opens: bool
    values: dict[str, float]


def judge(gate: Gate, found: Sequence[tuple[str, Measurement]], before: Mapping[str, float]) -> Verdict:
    """Whether all conditions of a gate hold of `(evaluation, measurement)` pairs."""
    values = {condition.label: condition.value(found) for condition in gate.conditions}
    opens = all(one.holds(values[one.label], before.get(one.label)) for one in gate.conditions)
    return Verdict(opens, values)


def measured_before(gate: Gate | None, found: Sequence[tuple[str, Measurement]]) -> dict[str, float]:
    """What the conditions of a gate measure before its stage: those that are relative need it."""
    relative = [condition for condition in gate.conditions if condition.within is not None] if gate else []
    return {condition.label: condition.value(found) for condition in relative}


def restacked(tree: Any, source: ModelConfig, target: ModelConfig) -> Any:
    """A training state whose parameters, and all that mirrors them, are stacked as another model's period has it."""
    if len(source.period) == len(target.period):
        return tree
    mirrors = lambda node: isinstance(node, dict) and "periods" in node
    return jax.tree.map(lambda node: restack(node, source, target) if mirrors(node) else node, tree, is_leaf=mirrors)
