"""One page about a comparison: Markdown with figures and tables, made from run directories alone.

Here: the order of the page and its prose. Not here: numbers (collect), tables, figures (plots). The page says what it
could not find instead of leaving it out.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import irope_jax
from irope_jax.core.records import RecordError
from irope_jax.study import attention_plots, plots, tables, task_plots
from irope_jax.study.attention import attention_table
from irope_jax.study.collect import Arm, further, load_arms, missing, nll_by_position, retrieval, together
from irope_jax.study.cost import cost_by_length, cost_tables
from irope_jax.study.goodput import goodput_table
from irope_jax.study.html import write_html
from irope_jax.study.reach import steps_table
from irope_jax.study.stages import stages_table
from irope_jax.study.text_tasks import effective_table, likelihood_table, scores_table

PAGE = "report.md"


def write_report(
    run_directories: Sequence[str | os.PathLike],
    out_directory: str | os.PathLike,
    *,
    title: str = "",
    command: str | None = None,
) -> Path:
    """Write `report.md` and its PNG figures into `out_directory`; returns the path of the page.

    Args:
      run_directories: runs to compare, in the order in which they are to appear; the first gets the first colour.
      out_directory: made if it does not exist; older pages of the same name are replaced.
      title: heading of the page; by default the names of the runs.
      command: the command that makes this page, for the reader; by default the `irope report` that does.

    Raises:
      RecordError: a run directory cannot be read, or the page cannot be written.
      plots.PlotsMissingError: matplotlib is not installed.
    """
    arms, out = load_arms(run_directories), Path(out_directory)
    if command is None:
        command = shlex.join(["irope", "report", *map(os.fspath, run_directories), "--out", os.fspath(out)])
    return write_page(arms, out, title=title, command=command)


def write_page(
    arms: Sequence[Arm], out: Path, *, title: str, command: str, foreword: str = "", notes: Sequence[str] = ()
) -> Path:
    """The page of arms, and the same as HTML beside it.

    Args:
      foreword: Markdown between the heading and the first figure.
      notes: what a reader must know, beside what is found missing.

    Raises:
      RecordError, plots.PlotsMissingError: as of `write_report`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        sections = [
            _opening(arms, out, title, foreword),
            _missing(arms, notes),
            _runs(arms),
            _stages(arms),
            _retrieval(arms, out),
            _perplexity(arms, out),
            _tasks(arms, out),
            _likelihoods(arms),
            _cost(arms, out),
            _attention(arms, out),
            _training(arms, out),
            _time(arms),
            _origin(arms, command),
        ]
        page = out / PAGE
        page.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
        write_html(page)
    except OSError as error:
        raise RecordError(f"{out}: the report cannot be written there ({error.strerror or error})") from None
    return page


def pictures(page: Path) -> list[Path]:
    """Those that a page shows, in its order."""
    return [page.parent / name for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))]


def terminal_tables(arms: Sequence[Arm]) -> list:
    """The result as rich tables to print: retrieval by context length, facts apart, and loss by position.

    Of what was not measured there is no table. Intervals are left to the page, so that 80 columns suffice.
    """
    found = [
        *map(stages_table, arms),
        *_retrieval_tables(arms, False),
        *(table for name, own in further(arms, "retrieval") for table in _retrieval_tables(own, False, name)),
        tables.nll_by_length_table(arms),
        tables.nll_by_position_table(arms),
        *map(scores_table, arms),
        effective_table(arms),
        likelihood_table(arms),
        *cost_tables(arms),
        *map(attention_table, arms),
        goodput_table(arms),
    ]
    return [table.rich() for table in found if table is not None]


def summary_tables(run_directories: Sequence[str | os.PathLike]) -> list:
    """The shortest of them, for the end of a run: its stages, else retrieval and loss by length."""
    arms = load_arms(run_directories)
    staged = [table for arm in arms if (table := stages_table(arm)) is not None]
    found = staged or [tables.retrieval_table(arms, intervals=False), tables.nll_by_length_table(arms)]
    found = [*found, goodput_table(arms)]
    return [table.rich() for table in found if table is not None]


def _opening(arms: Sequence[Arm], out: Path, title: str, foreword: str) -> str:
    text = [f"# {title or ' · '.join(arm.label for arm in arms)}", *([foreword] if foreword else [])]
    path = plots.headline(arms, out / "headline.png")
    if path is None:
        nothing = not any(arm.run.evals for arm in arms)
        return "\n\n".join([*text, *(["Nothing was measured: there is no result to show yet."] if nothing else [])])
    halves = []
    if any(retrieval(arm) for arm in arms):
        halves.append(f"retrieval accuracy by context length, over all facts ({_bands(arms)})")
    if any(nll_by_position(arm) for arm in arms):
        halves.append(
            "mean loss by position in the document, in the longest context each run was measured at (log2 buckets; the "
            "first positions are left to the table)"
        )
    sides = ("Left: ", "; right: ") if len(halves) == 2 else ("", "")
    caption = "".join(side + half for side, half in zip(sides, halves))
    return "\n\n".join([*text, _image(path, "headline figure"), caption[0].upper() + caption[1:] + "."])


def _of_seeds(arms: Sequence[Arm], several: str, one: str) -> str:
    """What a number and its spread are: `several` of arms of several seeds, `one` of those of one."""
    if not any(arm.seeds for arm in arms):
        return f"{one}; it says nothing about other seeds"
    alone = [arm.label for arm in arms if not arm.seeds]
    return several + (f"; of {', '.join(alone)}, with one seed, {one}" if alone else "")


def _bands(arms: Sequence[Arm]) -> str:
    pooled = "line: mean over seeds, band: from the least to the greatest of them"
    return _of_seeds(arms, pooled, "band: 95 % Wilson interval of the queries asked")


def _brackets(arms: Sequence[Arm]) -> str:
    pooled = "a cell is the mean over seeds, in brackets the least and the greatest of them"
    return _of_seeds(arms, pooled, "in brackets the 95 % Wilson interval of the queries asked")


def _missing(arms: Sequence[Arm], more: Sequence[str] = ()) -> str:
    notes = [*more, *missing(arms)]
    if not notes:
        return ""
    return "\n".join(["> **Read this first**", ">", *(f"> - {note}" for note in notes)])


def _stages(arms: Sequence[Arm]) -> str:
    found = [table for arm in arms if (table := stages_table(arm)) is not None]
    return "\n\n".join(["## Stages", *(f"{table.title}:\n\n{table.markdown()}" for table in found)]) if found else ""


def _runs(arms: Sequence[Arm]) -> str:
    text = ["## What was run", tables.runs_table(arms).markdown()]
    table = tables.difference_table(arms)
    if table is not None:
        text += ["The fields in which their configurations differ:", table.markdown()]
    elif len(arms) > 1:
        text.append("Their configurations do not differ in any field but name and description.")
    return "\n\n".join(text)


def _told_apart(arms: Sequence[Arm]) -> bool:
    """Whether some fact lay across a border of chunks; else those inside are all."""
    return any(retrieval(arm, "straddling") for arm in arms)


def _retrieval_tables(arms: Sequence[Arm], intervals: bool = True, about: str = "") -> list[tables.Table | None]:
    kinds = ("all", "inside", "straddling") if _told_apart(arms) else ("all",)
    return [tables.retrieval_table(arms, facts, intervals=intervals, about=about) for facts in kinds]


def _retrieval(arms: Sequence[Arm], out: Path) -> str:
    found = [table for table in _retrieval_tables(arms) if table is not None]
    if not found:
        return "" if any(arm.run.evals for arm in arms) else "## Retrieval\n\nNot measured."
    shown = together(arms, "retrieval")
    asked = {arm.label: [cell.count for cell in retrieval(arm)] for arm in shown}
    counts = [f"{label} {min(n):,}" + (f" to {max(n):,}" if max(n) > min(n) else "") for label, n in asked.items() if n]
    intro = (
        "Facts are placed over the whole context and asked for at its end. Columns are context lengths, in multiples "
        f"of the training length; {_brackets(arms)}. Queries per context length: " + "; ".join(counts) + "."
    )
    text = ["## Retrieval", intro]
    for table in found:
        text += [f"**{table.title}**", table.markdown()]
    if len(found) == 1:
        recorded = any(retrieval(arm, "inside") for arm in arms)
        unknown = "Whether a fact straddled a chunk border was not recorded."
        text.append("No fact lay across a border of chunks." if recorded else unknown)
    path = plots.heat_maps(arms, out / "retrieval_heat_map.png")
    if path is not None:
        text += ["By context length and depth of the fact (0 % is the beginning of the context), all facts:"]
        text += [_image(path, "retrieval accuracy by context length and depth")]
    text += _retrieval_pictures(arms, out, "retrieval")
    for name, own in further(arms, "retrieval"):
        text += [f"### {name}", f"The evaluation called {name!r}; its facts and questions are its own."]
        for table in filter(None, _retrieval_tables(own, about=name)):
            text += [f"**{table.title}**", table.markdown()]
        file = "retrieval_" + re.sub(r"[^A-Za-z0-9]+", "_", name)
        path = plots.retrieval_by_length(own, out / f"{file}.png")
        text += [_image(path, f"{name}: retrieval accuracy by context length, all facts")] if path else []
        text += _retrieval_pictures(own, out, file, f"{name}: ")
    return "\n\n".join(text)


def _retrieval_pictures(arms: Sequence[Arm], out: Path, file: str, label: str = "") -> list[str]:
    """Of facts inside a chunk and of those across its border, where there are such."""
    found = []
    if not _told_apart(arms):
        return found
    for facts, about in (("inside", "facts inside one chunk"), ("straddling", "facts across a chunk border")):
        path = plots.retrieval_by_length(arms, out / f"{file}_{facts}.png", facts)
        if path is not None:
            found.append(_image(path, f"{label}retrieval accuracy by context length, {about}"))
    return found


def _perplexity(arms: Sequence[Arm], out: Path) -> str:
    by_position, by_length = tables.nll_by_position_table(arms), tables.nll_by_length_table(arms)
    if by_position is None and by_length is None:
        return "" if any(arm.run.evals for arm in arms) else "## Perplexity\n\nNot measured."
    text = ["## Perplexity"]
    path = plots.perplexity_by_position(arms, out / "perplexity_by_position.png")
    if by_position is not None:
        longest = [f"{arm.label} {c[0].where['length']:,}" for arm in arms if (c := nll_by_position(arm))]
        text.append(f"In the longest context measured, in tokens: {', '.join(longest)}.")
        text += [_image(path, "perplexity by position"), f"**{by_position.title}**", by_position.markdown()]
    else:
        text.append("By position it was not measured.")
    if by_length is not None:
        text += [f"**{by_length.title}** (mean over the whole context)", by_length.markdown()]
    return "\n\n".join(text)


def _tasks(arms: Sequence[Arm], out: Path) -> str:
    found = [table for arm in arms if (table := scores_table(arm)) is not None]
    if not found:
        return ""
    effective = effective_table(arms)
    text = [
        "## Tasks in words",
        "Questions about long texts, by context length in tokens; scores from 0 to 1, in brackets the 95 % Wilson "
        "interval as if each question were right or wrong.",
    ]
    if effective is not None:
        text += [
            f"**{effective.title}** (the greatest length measured whose mean score is above the threshold)",
            effective.markdown(),
        ]
        text.append(_image(task_plots.suite_by_length(arms, out / "suite_by_length.png"), "suite score by length"))
    for table in found:
        text += [f"**{table.title}**", table.markdown()]
    text.append(_image(task_plots.tasks_by_length(arms, out / "tasks_by_length.png"), "score of each task by length"))
    path = task_plots.task_maps(arms, out / "task_heat_maps.png")
    if path is not None:
        text += ["By context length and depth of what is asked for (0 % is the beginning of the context):"]
        text += [_image(path, "score by context length and depth")]
    return "\n\n".join(text)


def _likelihoods(arms: Sequence[Arm]) -> str:
    table = likelihood_table(arms)
    if table is None:
        return ""
    intro = "Losses in nats per token, accuracies from 0 to 1; n counts tokens or questions."
    return "\n\n".join(["## Other likelihoods", intro, table.markdown()])


def _cost(arms: Sequence[Arm], out: Path) -> str:
    path = cost_by_length(arms, out / "cost_by_length.png")
    if path is None:
        return ""
    text = ["## Time and memory by length", "Medians, compilation left out.", _image(path, "time and memory by length")]
    for table in cost_tables(arms):
        text += [f"**{table.title}**", table.markdown()]
    return "\n\n".join(text)


def _attention(arms: Sequence[Arm], out: Path) -> str:
    found = [table for arm in arms if (table := attention_table(arm)) is not None]
    if not found:
        return ""
    intro = (
        "Means over held-out text, over heads and layers of a kind: the distance of what is attended to, in tokens, "
        "weighted by probability; the mass on the first tokens of the document (on chunked layers, of the chunk) and "
        "on the last ones; the entropy in nats, and its share of the greatest possible. Beside them, as *even*, what "
        "attention would have that gives the same to all it may see. Great mass on the first tokens is a sink, often "
        "a head's way to look at nothing."
    )
    text = ["## Where layers look", intro]
    text += [f"**{table.title}**\n\n{table.markdown()}" for table in found]
    text.append(_image(attention_plots.head_maps(arms, out / "attention_heads.png"), "distance and sinks by head"))
    path = attention_plots.entropy_curves(arms, out / "attention_entropy.png")
    if path is not None:
        text += ["Thin: layers. Thick: means of a kind. Dashed: attention that is even over the whole document."]
        text += [_image(path, "entropy of attention by position")]
    return "\n\n".join(text)


def _training(arms: Sequence[Arm], out: Path) -> str:
    if all(arm.untrained for arm in arms):
        return ""
    text = ["## Training"]
    path = plots.loss_curves(arms, out / "loss_curves.png")
    if path is None:
        return "## Training\n\nNo loss was recorded."
    text += [_image(path, "training loss"), "Thin: as recorded. Thick: exponential mean over a thirtieth of the run."]
    text += [tables.training_table(arms).markdown()]
    text += ["The final loss is the mean over the last twentieth of the records; speeds are medians."]
    steps = steps_table(arms)
    if steps is not None:
        text += [f"**{steps.title}** (measured while it trained)", steps.markdown()]
    return "\n\n".join(text)


def _time(arms: Sequence[Arm]) -> str:
    table = goodput_table(arms)
    return f"## Time\n\n{table.title}:\n\n{table.markdown()}" if table is not None else ""


def _origin(arms: Sequence[Arm], command: str) -> str:
    versions = [f"irope-jax {irope_jax.__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {metadata.version(name)}" for name in ("matplotlib", "numpy")]
    made_with = f"Made with {', '.join(versions)}."
    lines = ["## How this page was made", f"```bash\n{command}\n```", made_with]
    for arm in arms:
        for run in arm.seeds or (arm.run,):
            start = next((event.details for event in reversed(run.events) if event.name == "start"), {})
            details = ", ".join(
                f"{key} {value}" for key, value in start.items() if isinstance(value, (str, int, float))
            )
            lines.append(f"- {arm.label}: `{run.directory}`" + (f" ({details})" if details else ""))
    return "\n\n".join([*lines[:3], "\n".join(lines[3:])])


def _image(path: Path, text: str) -> str:
    return f"![{text}]({path.name})"
