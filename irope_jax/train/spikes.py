"""What to do when the loss jumps: nothing, leave an update out, or go back and take other data.

Here: the policies, and a detector that judges losses one after the other. It is plain arithmetic on numbers all
processes have, so all decide alike; what it remembers is JSON and belongs into every checkpoint, so that a run that was
cut decides as one that was not. Not here: going back, which the loop does.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any, ClassVar

from irope_jax.core.config import ConfigError


@dataclass(frozen=True)
class Ignore:
    """Losses are recorded and nothing more."""

    kind: ClassVar[str] = "ignore"


@dataclass(frozen=True)
class Skip:
    """Leave out the update of a step whose loss is a spike (as of one that is not finite).

    Attributes:
      threshold: a loss above so many times the median of the last ones is a spike.
      window: how many losses the median is of; nothing is a spike before there are so many.
    """

    threshold: float = 1.5
    window: int = 50
    kind: ClassVar[str] = "skip"

    def __post_init__(self):
        _check(threshold=self.threshold, window=self.window)


@dataclass(frozen=True)
class RollBack:
    """Go back to a checkpoint from before the spike and pass over the data that led to it (PaLM, section 5.1).

    Attributes:
      factor: a loss above so many times the median of the last ones is high.
      window: how many losses the median is of; nothing is high before there are so many.
      patience: high losses in a row that make a spike; one alone often heals by itself.
      jump_batches: batches passed over beyond those between the checkpoint and the spike; at the second spike in a row
        twice as many, and so on.
      limit: spikes in a row, without a whole window of usual losses between them, after which the run stops.
    """

    factor: float = 2.0
    window: int = 50
    patience: int = 3
    jump_batches: int = 100
    limit: int = 5
    kind: ClassVar[str] = "roll_back"

    def __post_init__(self):
        _check(factor=self.factor, window=self.window)
        for name in ("patience", "jump_batches", "limit"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")


SpikePolicy = Ignore | Skip | RollBack


def _check(*, window: int, **ratio: float) -> None:
    ((name, value),) = ratio.items()
    if not value > 1:
        raise ConfigError(name, value, "a spike is above the usual loss: give a number greater than 1")
    if window < 2:
        raise ConfigError("window", window, "a median needs at least 2 losses")


@dataclass(frozen=True)
class GoBack:
    """Go back to a checkpoint of a step before `before` and pass over `batches` from there.

    Attributes:
      before: the step at which the spike began.
      step: the one at which it was certain.
      jump: batches to pass over beyond those that were seen.
      count: which spike in a row this is, from 1.
      usual: the median it was measured by.
    """

    before: int
    step: int
    jump: int
    count: int
    usual: float

    def batches(self, checkpoint: int) -> int:
        """How many to pass over after restoring the checkpoint of this step."""
        return self.step - checkpoint + self.jump


@dataclass
class SpikeDetector:
    """Judges one loss after the other.

        limit = detector.limit                      # before a step: an update of a greater loss is left out
        action = detector.saw(step, loss)           # after it: None, or GoBack
        saved = detector.state()                    # with each checkpoint
        detector = SpikeDetector.at(policy, saved)  # after restoring it
        detector = SpikeDetector.at(policy, saved, action)  # after going back to it for `action`

    Feed it every loss, or every n-th, but the same ones however the run is cut.
    """

    policy: SpikePolicy
    usual: list[float] = field(default_factory=list)
    high: list[int] = field(default_factory=list)
    count: int = 0
    calm: int = 0

    @classmethod
    def at(cls, policy: SpikePolicy, state: dict[str, Any] | None, after: GoBack | None = None) -> SpikeDetector:
        """As it was when `state` was taken (None: at the start), and after having gone back there for `after`."""
        state = state or {}
        detector = cls(policy, list(state.get("usual", ())), list(state.get("high", ())))
        detector.count, detector.calm = state.get("count", 0), state.get("calm", 0)
        if after is not None:
            detector.high, detector.count, detector.calm = [], after.count, 0
        return detector

    def state(self) -> dict[str, Any]:
        """JSON; the numbers come back as they were."""
        return {"usual": list(self.usual), "high": list(self.high), "count": self.count, "calm": self.calm}

    @property
    def limit(self) -> float:
        """The greatest loss whose update counts; infinite for policies that leave none out and before the window."""
        return self._bound(self.policy.threshold) if isinstance(self.policy, Skip) else math.inf

    def _bound(self, factor: float) -> float:
        if len(self.usual) < self.policy.window:
            return math.inf
        median = statistics.median(self.usual)
        return median * factor if median > 0 else math.inf

    def _usual(self) -> float:
        return statistics.median(self.usual) if self.usual else math.nan

    def saw(self, step: int, loss: float) -> GoBack | None:
        """Take the loss of a step.

        Raises:
          SpikeError: one spike too many.
        """
        if isinstance(self.policy, Ignore):
            return None
        bound = self.limit if isinstance(self.policy, Skip) else self._bound(self.policy.factor)
        if loss <= bound and math.isfinite(loss):
            self.usual = [*self.usual, loss][-self.policy.window :]
            self.high, self.calm = [], self.calm + 1
            if self.calm >= self.policy.window:
                self.count = 0
            return None
        if isinstance(self.policy, Skip):
            return None
        self.high.append(step)
        if len(self.high) < self.policy.patience:
            return None
        if self.count >= self.policy.limit:
            raise SpikeError(
                f"step {step}: loss {loss:.4g}, the usual is {self._usual():.4g}; gone back "
                f"{self.count} times in a row (limit {self.policy.limit}); lower the learning rate or look at the data"
            )
        count = self.count + 1
        return GoBack(self.high[0], step, self.policy.jump_batches * count, count, self._usual())


class SpikeError(RuntimeError):
    """Going back did not help; says the step, the losses and what to change."""
