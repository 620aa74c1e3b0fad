"""A question as a grid of runs: what is varied, over which configs, and what each cell is called.

    def get_study(scale="laptop"):
        start = Cell(name="start", config="base.py:start")
        arms = [
            Cell(name="irope", config="base.py:irope", starts_from="start", tags=("headline",)),
            Cell(name="all_rope", config="base.py:irope", overrides={"model.pattern": ROPE}, starts_from="start"),
        ]
        return Study(name="what_irope_buys", question=..., prediction=..., cells=product([start, *arms], seeds(3)))

Values only: running cells is `irope sweep`, reading what they found is the rest of this room. A grid is a Python file,
like a config: reading one runs its code.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from irope_jax.core.config import ConfigError, nearest

_NAME = re.compile(r"[A-Za-z0-9_.=+-]+(/[A-Za-z0-9_.=+-]+)*")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study.

    Attributes:
      name: of the cell and of its run directory below that of the study; slashes make folders.
      config: `FILE[:ARG]`; a relative file is looked for beside the grid.
      overrides: plain values by dotted path of the config, as `--config.a.b=VALUE` would set them.
      arm: what several cells have in common that differ in their seed only: reports take means over an arm. By default
        the name without its seed.
      label: what reports call the arm; its name by default.
      starts_from: name of the cell whose trained weights this one begins with; it is run after that one.
      tags: to choose cells by, beside their names.
      verb: `eval` for a config that trains nothing.
    """

    name: str
    config: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    arm: str = ""
    label: str = ""
    starts_from: str = ""
    tags: tuple[str, ...] = ()
    verb: Literal["train", "eval"] = "train"

    def __post_init__(self):
        if not _NAME.fullmatch(self.name) or ".." in self.name:
            raise ConfigError("cell.name", self.name, "letters, digits and _ . = + - only, in folders parted by /")
        if not self.arm:
            kept = [part for part in self.name.split("/") if not part.startswith("seed=")]
            object.__setattr__(self, "arm", "/".join(kept) or self.name)

    @property
    def seed(self) -> str:
        """What tells the cells of an arm apart; empty for an arm of one cell."""
        return next((part for part in self.name.split("/") if part.startswith("seed=")), "")

    @property
    def words(self) -> tuple[str, ...]:
        """What chooses it."""
        return tuple(filter(None, (*self.tags, self.arm, self.label, self.name, self.seed)))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, what was expected, and the runs that answer it.

    Attributes:
      name: of the folder below `runs/`.
      question, prediction: written before anything is run.
      verdict: written afterwards; empty until then.
      cells: in the order in which they are run and shown; those a cell starts from come before it.
    """

    name: str
    question: str
    prediction: str
    cells: tuple[Cell, ...]
    verdict: str = ""

    def __post_init__(self):
        object.__setattr__(self, "cells", tuple(self.cells))
        seen: set[str] = set()
        for cell in self.cells:
            if cell.name in seen:
                raise ConfigError("study.cells", cell.name, "two cells have this name; give each its own")
            if cell.starts_from and cell.starts_from not in seen:
                fix = f"{cell.name} starts from a cell that does not come before it; {nearest(cell.starts_from, seen)}"
                raise ConfigError("cell.starts_from", cell.starts_from, fix)
            seen.add(cell.name)
        if not self.cells:
            raise ConfigError("study.cells", (), "a study has at least one cell")
        by_label: dict[str, str] = {}
        for arm, label in self.labels().items():
            if (other := by_label.setdefault(label, arm)) != arm:
                raise ConfigError(
                    "cell.label", label, f"the arms {other} and {arm} are both called so; tell them apart"
                )

    def labels(self) -> dict[str, str]:
        """What reports call each arm."""
        return {cell.arm: cell.label or cell.arm for cell in self.cells}

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.arm for cell in self.cells))

    def cell(self, name: str) -> Cell:
        return next(cell for cell in self.cells if cell.name == name)

    def chosen(self, words: Sequence[str]) -> tuple[Cell, ...]:
        """Cells that a word names, and those they start from.

        A word is a tag, an arm or its label, a cell, a seed (`seed=0`) or a folder of cells.

        Raises:
          ConfigError: a word that names nothing.
        """
        if not words:
            return self.cells
        wanted: set[str] = set()
        for word in words:
            found = [c for c in self.cells if word in c.words or c.name.startswith(f"{word}/")]
            if not found:
                names = {name for c in self.cells for name in c.words}
                raise ConfigError(
                    "--only", word, f"no cell, arm, tag or seed is called so; {nearest(word, sorted(names))}"
                )
            for cell in found:
                while cell is not None:
                    wanted.add(cell.name)
                    cell = self.cell(cell.starts_from) if cell.starts_from else None
        return tuple(cell for cell in self.cells if cell.name in wanted)


@dataclass(frozen=True)
class Axis:
    """Ways to vary a cell: overrides by label. The label is `NAME=LABEL` in names, or LABEL alone without a name."""

    name: str
    ways: Mapping[str, Mapping[str, Any]]

    def applied(self, label: str) -> tuple[str, Mapping[str, Any]]:
        return (f"{self.name}={label}" if self.name else label), self.ways[label]


def axis(name: str, values: Iterable[Any], *paths: str) -> Axis:
    """Every value set at all of the paths: `axis("chunk", (16, 32), "model.pattern.0.mask.size")`."""
    return Axis(name, {str(value): dict.fromkeys(paths, value) for value in values})


def seeds(count: int, init_from: str = "") -> Axis:
    """The same with other initial values and another order of the data.

    Args:
      init_from: the runs of an arm of another study, `runs/STUDY/ARM`: every seed starts from that of its number.
    """
    values = lambda n: {"seed": n, "data.seed": n} | ({"train.init_from": f"{init_from}/seed={n}"} if init_from else {})
    return Axis("seed", {str(n): values(n) for n in range(count)})


def plain_name(label: str) -> str:
    """A label as the name of a cell: `iRoPE, no temperature` is `iRoPE-no_temperature`."""
    return re.sub(r"[^A-Za-z0-9_.=+-]", "", label.replace(", ", "-").replace(" ", "_"))


def product(cells: Iterable[Cell], *axes: Axis) -> tuple[Cell, ...]:
    """Every cell in every combination of ways; a cell that starts from another of them does so in the same way."""
    return _varied(cells, list(itertools.product(*(one.ways for one in axes))), axes)


def zipped(cells: Iterable[Cell], *axes: Axis) -> tuple[Cell, ...]:
    """Every cell in the first ways of all axes, in the second ways of all, and so on.

    Raises:
      ConfigError: axes of unequal lengths.
    """
    lengths = {one.name: len(one.ways) for one in axes}
    if len(set(lengths.values())) > 1:
        raise ConfigError("zipped", lengths, "the axes must have equally many ways")
    return _varied(cells, list(zip(*(one.ways for one in axes))), axes)


def chained(*cells: Cell) -> tuple[Cell, ...]:
    """Each starts from the one before it."""
    return (cells[0], *(replace(after, starts_from=before.name) for before, after in itertools.pairwise(cells)))


def _varied(cells: Iterable[Cell], labels: Sequence[tuple[str, ...]], axes: Sequence[Axis]) -> tuple[Cell, ...]:
    cells = tuple(cells)
    own, found = {cell.name for cell in cells}, []
    for cell in cells:
        for combination in labels:
            applied = [one.applied(label) for one, label in zip(axes, combination, strict=True)]
            suffix = "".join(f"/{part}" for part, _ in applied)
            overrides = dict(cell.overrides)
            for _, changes in applied:
                overrides |= changes
            start = cell.starts_from + (suffix if cell.starts_from in own else "")
            others = "".join(f"/{part}" for part, _ in applied if not part.startswith("seed="))
            label = cell.label and ", ".join([cell.label, *others.split("/")[1:]])
            made = {"name": cell.name + suffix, "arm": cell.arm + others, "label": label}
            found.append(replace(cell, **made, overrides=overrides, starts_from=start))
    return tuple(found)
