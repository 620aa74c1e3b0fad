"""Tables of a comparison: built once as text, shown as Markdown, plain text or on a terminal.

Here: what stands in which cell and how numbers are written. Not here: aggregation (collect), prose (report).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from irope_jax.study.collect import (
    Arm,
    Cell,
    Facts,
    by_length,
    in_multiples,
    lookup,
    nll_by_length,
    nll_by_position,
    retrieval,
    together,
)

ABSENT = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns. The first column names the row; `numeric` aligns the others to the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True

    def markdown(self) -> str:
        rule = ["---"] + ["---:" if self.numeric else "---"] * (len(self.columns) - 1)
        lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (self.columns, *self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))

    def plain(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        sides = ["<"] + [">" if self.numeric else "<"] * (len(widths) - 1)
        text = ["  ".join(f"{c:{side}{width}}" for c, side, width in zip(line, sides, widths)) for line in lines]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self.title, text[0].rstrip(), rule, *(line.rstrip() for line in text[1:])])

    def rich(self):
        """A `rich.table.Table` for the terminal."""
        import rich.box
        import rich.table

        table = rich.table.Table(title=self.title, box=rich.box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if self.numeric and i else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(cell.replace("[", "\\[") for cell in row))
        return table


def retrieval_table(
    arms: Sequence[Arm], facts: Facts = "all", *, intervals: bool = True, about: str = ""
) -> Table | None:
    """Accuracy (95 % Wilson interval): rows = runs, columns = context length. `None` if no such fact was asked.

    `about` names the evaluation where a run has several.
    """
    arms = together(arms, "retrieval")
    found = {arm.label: retrieval(arm, facts) for arm in arms}
    which = {
        "all": "all facts",
        "inside": "facts inside one chunk",
        "straddling": "facts that straddle a chunk border",
    }
    title = f"{about}: retrieval" if about else "Retrieval"
    return _by_length(arms, found, f"{title} accuracy, {which[facts]}", lambda cell: accuracy(cell, intervals))


def nll_by_length_table(arms: Sequence[Arm]) -> Table | None:
    """Mean loss over whole contexts: rows = runs, columns = context length. `None` if not measured."""
    found = {arm.label: nll_by_length(arm) for arm in arms}
    return _by_length(arms, found, "Loss by context length, nats per token", lambda cell: nll(cell.value))


def nll_by_position_table(arms: Sequence[Arm]) -> Table | None:
    """Loss and perplexity by position: rows = position buckets, columns = runs. `None` if not measured."""
    found = {arm.label: {(c.where["from"], c.where["to"]): c for c in nll_by_position(arm)} for arm in arms}
    buckets = sorted({bucket for cells in found.values() for bucket in cells})
    if not buckets:
        return None
    trained = {arm.training_length for arm in arms}
    length = trained.pop() if len(trained) == 1 else None
    rows = []
    for low, high in buckets:
        beyond = "→ " if length and low >= length else ""
        name = beyond + (f"{low:,} to {high - 1:,}" if high - low > 1 else f"{low:,}")
        cells = (found[arm.label].get((low, high)) for arm in arms)
        rows.append((name, *(f"{nll(c.value)} ({perplexity(c.value)})" if c else ABSENT for c in cells)))
    title = "Loss in nats per token (perplexity) by position" + (", → beyond the training length" if length else "")
    return Table(title, ("position", *(arm.label for arm in arms)), tuple(rows))


def runs_table(arms: Sequence[Arm]) -> Table:
    """What was run."""
    rows = []
    for arm in arms:
        parameters = arm.recorded("parameters")
        done, planned = arm.run.last_step, arm.planned_steps
        origin = lookup(arm.run.config, "train", "init_from")
        others = f" (of the first of {len(arm.seeds)} seeds; the others from their own)" if arm.seeds else ""
        start = f"Started from the parameters of `{origin}`{others}." if origin else None
        description = arm.run.config.get("description")
        how = [description if description != arm.label else None, start]
        rows.append(
            (
                arm.label,
                " ".join(filter(None, how)) or ABSENT,
                f"{parameters:,}" if parameters is not None else ABSENT,
                f"{arm.training_length:,}" if arm.training_length else ABSENT,
                "evaluated"
                if arm.untrained
                else f"{done:,}"
                if planned in (None, done)
                else f"{done:,} of {planned:,}",
                f"`{arm.run.fingerprint}`",
            )
        )
    columns = ("run", "how it was trained", "parameters", "training length", "steps", "config")
    return Table("Runs", columns, tuple(rows), numeric=False)


def training_table(arms: Sequence[Arm]) -> Table:
    """What training cost and where it ended."""
    rows = []
    for arm in arms:
        names = ("loss", "tokens", "tokens_per_second", "flops_per_second", "memory_bytes", "skipped")
        losses, tokens, speed, flops, memory, skipped = (_finite(arm.run.series(name)[1]) for name in names)
        tail = losses[-max(1, len(losses) // 20) :]
        restarts = max(0, sum(event.name == "start" for event in arm.run.events) - 1)
        rows.append(
            (
                arm.label,
                nll(statistics.fmean(tail)) if tail else ABSENT,
                quantity(tokens[-1]) if tokens else ABSENT,
                quantity(statistics.median(speed)) if speed else ABSENT,
                quantity(statistics.median(flops)) if flops else ABSENT,
                f"{quantity(max(memory))}B" if memory else ABSENT,
                f"{int(skipped[-1])}" if skipped else ABSENT,
                str(restarts),
            )
        )
    columns = ("run", "final loss", "tokens", "tokens/s", "FLOP/s", "peak memory", "skipped steps", "restarts")
    return Table("Training", columns, tuple(rows))


def difference_table(arms: Sequence[Arm], limit: int = 30) -> Table | None:
    """The config fields in which the runs differ: rows = fields, columns = runs. `None` if there are none."""
    flat = [_flatten(arm.run.config) for arm in arms]
    fields = list(dict.fromkeys(field for one in flat for field in one))
    rows = [(f"`{field}`", *(_plain(one[field]) if field in one else ABSENT for one in flat)) for field in fields]
    rows = [row for row in rows if len(set(row[1:])) > 1 and row[0] not in ("`name`", "`description`")]
    if not rows:
        return None
    if len(rows) > limit:
        rows = [*rows[:limit], (f"… and {len(rows) - limit} more fields", *[""] * len(arms))]
    return Table("Differences", ("field", *(arm.label for arm in arms)), tuple(rows), numeric=False)


def accuracy(cell: Cell, interval: bool = True) -> str:
    """`0.984 (0.97–0.99)`; 1 is written only where all were right."""
    value = f"{cell.value:.3f}"
    if cell.value < 1 and float(value) == 1:
        value = "0.999+"
    low, high = cell.interval
    return f"{value} ({low:.2f}–{high:.2f})" if interval else value


def nll(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "NaN" if math.isnan(value) else "infinite"


def perplexity(value: float) -> str:
    if not math.isfinite(value) or value > 25:
        return "NaN" if math.isnan(value) else "huge"
    return f"{math.exp(value):.2f}" if value < math.log(100) else f"{math.exp(value):,.0f}"


def quantity(value: float) -> str:
    """Three digits and a decimal prefix: 12.3 k, 4.56 M."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def three_digits(value: float) -> str:
    """0.00123, 12.3, 1,234: three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def times(multiple: float) -> str:
    """`16×`."""
    return f"{multiple:g}×" if multiple >= 1 or multiple <= 0 else f"1/{1 / multiple:g}×"


def _by_length(arms: Sequence[Arm], found: dict[str, list[Cell]], title: str, write) -> Table | None:
    relative = in_multiples(arms)
    placed = {arm.label: by_length(arms, arm, found[arm.label]) for arm in arms}
    columns = sorted({place for cells in placed.values() for place in cells})
    if not columns:
        return None
    lengths = {arm.training_length for arm in arms}
    if not relative:
        heads = [f"{column:,} tokens" for column in columns]
    elif len(lengths) == 1:
        (length,) = lengths
        heads = [f"{times(column)} ({round(column * length):,})" for column in columns]
    else:
        heads = [times(column) for column in columns]
    rows = ((label, *(write(cells[c]) if c in cells else ABSENT for c in columns)) for label, cells in placed.items())
    return Table(title, ("run", *heads), tuple(rows))


def _flatten(value, path: str = "") -> dict:
    """Dotted path of every plain value; lists of plain values stay whole."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        items = enumerate(value)
    else:
        return {path: value}
    flat = {}
    for key, inner in items:
        flat.update(_flatten(inner, f"{path}.{key}" if path else str(key)))
    return flat


def _plain(value, width: int = 48) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= width else text[: width - 1] + "…"


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
