"""Which mesh: all that divide, ordered by the closed form; the best few are for the compiler to judge."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from irope_jax.core.chips import Chip
from irope_jax.core.config import ConfigError
from irope_jax.model.moe import MoE
from irope_jax.plan.job import Failure, Figures, Job, Mode, roofline, timed
from irope_jax.sharding.mesh import AXES, MeshConfig

ROOM = 0.95
"""Share of a chip that a step may take by hand, where temporaries are a fit."""

REMATS = ("none", "attention", "full", "offload", "offload_inputs")


@dataclass(frozen=True)
class Candidate:
    """A mesh, a layout and what is kept, by hand."""

    job: Job
    by_hand: Figures
    seconds: float
    fits: bool

    @property
    def label(self) -> str:
        sizes = " x ".join(f"{axis} {size}" for axis, size in self.job.mesh.sizes.items() if size > 1) or "one device"
        extra = f", {self.job.model.context.layout}" if self.job.mesh.context > 1 else ""
        return sizes + extra + (f", remat {self.job.model.remat}" if self.job.mode == "train" else "")

    @property
    def lines(self) -> list[str]:
        """What to paste into a config."""
        sizes = ", ".join(f"{axis}={size}" for axis, size in self.job.mesh.sizes.items())
        found = [
            f"config.mesh = dict({sizes})",
            f'config.model.context = dict(layout="{self.job.model.context.layout}")',
        ]
        return [*found, f'config.model.remat = "{self.job.model.remat}"'] if self.job.mode == "train" else found


def meshes(devices: int) -> Iterator[MeshConfig]:
    """Every way to write the number of devices as a product over the axes."""

    def split(rest: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (rest,)
            return
        for size in (size for size in range(1, rest + 1) if rest % size == 0):
            for others in split(rest // size, axes - 1):
                yield (size, *others)

    for sizes in split(devices, len(AXES)):
        yield MeshConfig(**dict(zip(AXES, sizes)))


def candidates(
    experiment: Any,
    build: Callable[[Any], Job],
    by_hand: Callable[[Job], Figures],
    devices: int,
    chip: Chip | None,
    mode: Mode,
) -> list[Candidate]:
    """All that divide, best first: those that fit before those that do not, then by the sum of their times by hand.

    Args:
      experiment: whose `mesh`, `model.context.layout` and `model.remat` are changed.
      build: the job of a changed experiment; raises `ConfigError` where something does not divide.
      by_hand: its figures in closed form.
    """
    remats = REMATS if mode == "train" else (experiment.model.remat,)
    found, refused = [], set()
    layouts = ("zigzag", "contiguous")
    experts = any(isinstance(layer.ffn, MoE) for layer in experiment.model.period)
    for mesh, layout in itertools.product(meshes(devices), layouts):
        if mesh.expert > 1 and not experts:
            continue  # a dense model is cut there as by `data`
        if layout == "contiguous" and (mesh.context == 1 or mode != "train"):
            continue
        for remat in remats:
            if (mesh, layout) in refused:
                break
            context = replace(experiment.model.context, layout=layout)
            model = replace(experiment.model, context=context, remat=remat)
            try:
                job = build(replace(experiment, mesh=mesh, model=model))
                if remat == "none" and job.length * job.data.batch_size // devices > 1 << 14:
                    continue  # all of a layer kept: never fits at such lengths, and tracing it takes seconds
                figures = by_hand(job)
            except ConfigError:
                refused.add((mesh, layout))
                continue
            found.append(judged(job, figures, chip))
    return sorted(found, key=lambda one: (not one.fits, one.seconds, one.by_hand.total))


def judged(job: Job, by_hand: Figures, chip: Chip | None) -> Candidate:
    """A contiguous layout makes the last device of a ring do twice the mean work of layers that see everything."""
    if chip is None:
        return Candidate(job, by_hand, by_hand.sent_bytes + by_hand.flops * 1e-3, True)
    return Candidate(job, by_hand, _seconds(job, by_hand, chip), by_hand.total <= ROOM * chip.memory)


def _seconds(job: Job, figures: Figures, chip: Chip) -> float:
    found = roofline(figures, chip)
    if job.mesh.context > 1 and job.model.context.layout == "contiguous" and job.mode == "train":
        found = replace(found, compute=1.5 * found.compute)
    return found.in_turn


Result = tuple[Candidate, Figures | Failure | None]
"""A candidate and what the compiler said of it; None if nobody asked."""


def step_seconds(result: Result, chip: Chip | None) -> float:
    """Of the compiled step, else by hand."""
    one, figures = result
    if not isinstance(figures, Figures) or chip is None:
        return one.seconds
    return _seconds(one.job, timed(figures, one.by_hand), chip)


def ranked(results: Sequence[Result], chip: Chip | None) -> list[Result]:
    """Best first: those that fit before those that do not, compiled or else by hand."""

    def place(result: Result):
        one, figures = result
        fits = one.fits
        if figures is not None:
            fits = isinstance(figures, Figures) and (chip is None or figures.total <= chip.memory)
        return (not fits, step_seconds(result, chip))

    return sorted(results, key=place)


def ranked_lines(results: Sequence[Result], chip: Chip | None) -> list[str]:
    """The ranking, and the config lines of the first."""
    lines = []
    for place, result in enumerate(results, start=1):
        one, figures = result
        held = figures.total if isinstance(figures, Figures) else one.by_hand.total
        seconds = step_seconds(result, chip)
        said = f"does not compile: {figures.why}" if isinstance(figures, Failure) else f"{held / 1e9:.1f} GB"
        said += " does not fit" * (chip is not None and not isinstance(figures, Failure) and held > chip.memory)
        lines.append(f"{place:>3}  {one.label}: {said}, {seconds:.2f} s a step" + " by hand" * (figures is None))
    return [*lines, "to paste:", *(f"    {line}" for line in results[0][0].lines)]
