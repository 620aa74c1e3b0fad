"""Where layers look, head by head: which measurements, and the table of them by kind of layer.

What the evaluation is expected to record, per length and layer (`mask` and `position` are kinds):

    attention_reach  distance, sink_mass, recent_mass, entropy, entropy_share   where ..., head
    attention_reach  even_distance, even_sink_mass, even_recent_mass            where ...
    attention_reach  entropy_by_position and so on                              where ..., from, to (head, if by heads)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from irope_jax.core.records import Measurement
from irope_jax.study.collect import Arm, Cell, aggregate
from irope_jax.study.tables import ABSENT, Table

COLUMNS = (
    ("distance", "distance", ",.1f"),
    ("even_distance", "even", ",.1f"),
    ("sink_mass", "first", ".3f"),
    ("even_sink_mass", "even", ".3f"),
    ("recent_mass", "last", ".3f"),
    ("entropy", "entropy", ".2f"),
    ("entropy_share", "share", ".2f"),
)
"""Measures of the table: name, head, format."""


def looked(arm: Arm, name: str) -> list[Measurement]:
    """What was measured under a name in the longest windows of the evaluation that speaks for the run."""
    found = arm.measurements("attention_reach", name)
    longest = max((m.where["length"] for m in found), default=None)
    return [m for m in found if m.where["length"] == longest]


def kind_of(where: dict) -> str:
    """A layer's kind in words: `chunked, rope`."""
    return f"{where['mask']}, {where['position']}"


def layer_kinds(arm: Arm) -> dict[int, str]:
    """The kind of each layer that was looked at, first to last."""
    return dict(sorted((m.where["layer"], kind_of(m.where)) for m in looked(arm, "distance")))


def by_head(arm: Arm, name: str) -> list[list[float]]:
    """A measure as lines of layers, entries of heads; NaN where it was not measured."""
    layers = list(layer_kinds(arm))
    heads = sorted({m.where["head"] for m in looked(arm, "distance")})
    found = {(m.where["layer"], m.where["head"]): m.value for m in looked(arm, name) if "head" in m.where}
    return [[found.get((layer, head), math.nan) for head in heads] for layer in layers]


def by_position(arm: Arm, name: str, keys: Sequence[str] = ("layer",)) -> dict[tuple, list[Cell]]:
    """Curves of a measure by position, means over heads: per `keys` of layers its buckets (`from`, `to`)."""
    curves: dict[tuple, list[Cell]] = {}
    for cell in aggregate(looked(arm, f"{name}_by_position"), (*keys, "from", "to")):
        curves.setdefault(tuple(cell.where[key] for key in keys), []).append(cell)
    return curves


def attention_table(arm: Arm) -> Table | None:
    """Means over layers of a kind and their heads, in the longest windows: rows = kinds of layers."""
    kinds = layer_kinds(arm)
    if not kinds:
        return None
    rows = []
    for kind in dict.fromkeys(kinds.values()):
        mask, position = kind.split(", ")
        cells = []
        for name, _, shape in COLUMNS:
            own = [m for m in looked(arm, name) if (m.where["mask"], m.where["position"]) == (mask, position)]
            found = aggregate(own, ())
            cells.append(format(found[0].value, shape) if found else ABSENT)
        rows.append((kind, f"{list(kinds.values()).count(kind)}", *cells))
    length = looked(arm, "distance")[0].where["length"]
    heads = ("layers", "n", *(head for _, head, _ in COLUMNS))
    return Table(f"{arm.label}: where its layers look in {length:,} tokens", heads, tuple(rows))
