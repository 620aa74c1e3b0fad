"""The protocol of an evaluation. No particular evaluation lives here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Measurement:
    """One number found out about a model.

    Attributes:
      name: what was measured, such as `accuracy`.
      value: the number, a mean over `count` things (tokens, queries).
      count: how many things.
      where: the cell it belongs to, such as `{"length": 8192, "depth": 0.5}`.
    """

    name: str
    value: float
    count: int
    where: dict[str, float | int | bool | str] = field(default_factory=dict)


class Evaluator(Protocol):
    """An evaluation built for one model. `run` may be called many times, with other parameters each time."""

    name: str

    def run(self, params: Any) -> Iterator[Measurement]:
        """Measurements as they become known, so that progress shows and a cut run keeps what it had."""
        ...
