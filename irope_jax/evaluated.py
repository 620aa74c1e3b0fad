"""Which evaluations a run directory has: those of its config, and those that were added when it was finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from irope_jax.core.config import fingerprint
from irope_jax.core.records import ADDED, ADDED_ENDED, Run
from irope_jax.evals.registry import EvalSpec


@dataclass(frozen=True)
class Evaluated:
    """Evaluations of a run, by name.

    Attributes:
      taken: the fingerprint of the evaluation that a name stands for in its records.
      complete: names of those that were measured to their end, with the weights that the run ended with.
    """

    taken: dict[str, str]
    complete: frozenset[str]


def evaluated(run: Run, made: Sequence[EvalSpec]) -> Evaluated:
    """What a run has, whose config has the evaluations `made`; training that has ended has measured all of those."""
    taken, recorded = {spec.name: fingerprint(spec) for spec in made}, {m.evaluation for m in run.evals}
    added, end = set(), None
    for event in run.events:
        if event.name == "start":
            added, end = set(), None  # of other weights than those it will end with
        elif event.name == "finished":
            end = event.step
        elif event.name == ADDED and event.details["evaluation"] in recorded:  # else the attempt found nothing
            taken.setdefault(event.details["evaluation"], event.details["spec"])
        elif event.name == ADDED_ENDED and event.step == end:
            added.add(event.details["evaluation"])
    return Evaluated(taken, frozenset({spec.name for spec in made} | added))
