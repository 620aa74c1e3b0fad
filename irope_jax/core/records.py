"""The run directory: what was asked for, and everything that was measured while it ran.

    RUN/config.json     the resolved experiment as nested plain values, and its fingerprint
    RUN/records.jsonl   one JSON object per line, only ever appended to
    RUN/tensorboard/    a mirror for looking at; nothing reads it back

Three kinds of lines, each with `step` (updates completed) and `time` (seconds since 1970):

    {"kind": "train", "step": 20, "time": ..., "loss": 2.31, "grad_norm": 0.8, ...}
    {"kind": "eval", "step": 20, "time": ..., "evaluation": "retrieval", "name": "accuracy", "value": 0.97,
     "count": 512, "where": {"length": 4096, "depth": 0.5}}
    {"kind": "event", "step": 20, "time": ..., "name": "start", "details": {}}

Floats that JSON cannot say are the strings "NaN", "Infinity", "-Infinity". A process killed while it wrote leaves a
torn last line: readers ignore it, the next writer removes it. A run that goes back to a checkpoint says so by the event
`start`; readers then drop what was recorded beyond that step before it.

Here: writing and reading that directory. Not here: what is worth measuring (train, evals), aggregation and pictures
(study). No jax, so that reports run anywhere.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from irope_jax.core.config import differences
from irope_jax.core.mirrors import Mirror, Wandb, WandbConfig, open_tensorboard
from irope_jax.core.plain_json import dumps, loads

CONFIG_FILE = "config.json"
RECORDS_FILE = "records.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"

ADDED, ADDED_ENDED = "evaluation", "evaluation_ended"
"""Events around an evaluation that a finished run's config does not have: its name, kind and fingerprint."""

_FORMAT = 1
_RESERVED = ("kind", "step", "time")


class RecordError(RuntimeError):
    """A run directory that cannot be read or written as it stands; one line naming the file, the line and the fix."""


class ConfigChangedError(RecordError):
    """A run directory was opened with another configuration than the one it was made with.

    Attributes:
      differences: `path: old -> new` lines.
    """

    def __init__(self, directory: Path, changed: list[str]):
        self.differences = changed
        listed = "; ".join(changed) or "only the fingerprint (made by another version of this package?)"
        super().__init__(
            f"{directory}: this run was made with another configuration. Changed: {listed}. "
            "Choose another run directory, or accept the change explicitly (on_config_change='accept')"
        )


@dataclass(frozen=True)
class TrainRecord:
    """Scalars of the training step that was completed as number `step`."""

    step: int
    time: float
    scalars: dict[str, float]


@dataclass(frozen=True)
class Measurement:
    """One number an evaluation found: the mean `value` of `count` things under the conditions `where`."""

    step: int
    time: float
    evaluation: str
    name: str
    value: float
    count: int
    where: dict[str, Any]


@dataclass(frozen=True)
class Event:
    """Something that happened: a start, a checkpoint, a skipped step, a changed configuration."""

    step: int
    time: float
    name: str
    details: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run directory as read by `load_run`: records in the order written, superseded ones dropped."""

    directory: Path
    config: dict[str, Any]
    fingerprint: str
    train: list[TrainRecord] = field(default_factory=list)
    evals: list[Measurement] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @property
    def name(self) -> str:
        """`config["name"]`, or the name of the directory."""
        return str(self.config.get("name") or self.directory.resolve().name)

    @property
    def last_step(self) -> int:
        """The greatest step of a train line; 0 before the first."""
        return max((record.step for record in self.train), default=0)

    def series(self, scalar: str) -> tuple[list[int], list[float]]:
        """Steps and values of one training scalar, where it was recorded."""
        found = [(record.step, record.scalars[scalar]) for record in self.train if scalar in record.scalars]
        return [step for step, _ in found], [value for _, value in found]


class RunWriter:
    """Appends to a run directory; creates it, or continues the one that is there.

    Only one process of a run writes (process 0); the others hold a `NullWriter`. Each line reaches the operating system
    before the call returns, so what a killed process recorded stays recorded.

    Args:
      directory: the run directory.
      config: the resolved experiment as nested plain values (`core.config.to_dict`).
      fingerprint: its `core.config.fingerprint`.
      tensorboard: mirror scalars to `directory/tensorboard`.
      wandb: mirror them to Weights & Biases too.
      on_config_change: what to do if the directory holds a run with another fingerprint. "accept" replaces its
        config.json and records an event `config_changed` with the differences.

    Raises:
      ConfigChangedError: another fingerprint and `on_config_change="refuse"`.
      RecordError: the directory is damaged or is not a run directory.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        config: Mapping[str, Any],
        fingerprint: str,
        *,
        tensorboard: bool = True,
        wandb: WandbConfig | None = None,
        on_config_change: Literal["refuse", "accept"] = "refuse",
    ):
        self.directory = Path(directory)
        self._tensorboard = tensorboard
        self._tensorboard_mirror: Mirror | None = None
        self._mirrors: list[Mirror] = []
        self._purge_step: int | None = None
        config_path, records_path = self.directory / CONFIG_FILE, self.directory / RECORDS_FILE
        config = json.loads(dumps(config))
        changed, old_fingerprint = [], None
        if config_path.exists():
            old_config, old_fingerprint = _read_config(self.directory)
            if old_fingerprint != fingerprint:
                changed = differences(old_config, config)
                if on_config_change == "refuse":
                    raise ConfigChangedError(self.directory, changed)
        elif records_path.exists():
            raise RecordError(f"{config_path}: missing beside {RECORDS_FILE}; choose another run directory")
        last = _repair_tail(records_path)
        last_step, self._before = (0, None) if last is None else (last.step, last.time)
        self.directory.mkdir(parents=True, exist_ok=True)
        if old_fingerprint is None:
            _write_config(self.directory, config, fingerprint)
        self._file = open(records_path, "ab", buffering=0)  # noqa: SIM115 (closed by close())
        if old_fingerprint not in (None, fingerprint):
            # The event first: a kill in between must not leave a changed config that nothing tells of.
            self.event(last_step, "config_changed", differences=changed, old_fingerprint=old_fingerprint)
            _write_config(self.directory, config, fingerprint)
        if wandb is not None:
            name = str(config.get("name") or self.directory.name)
            self._mirrors.append(Wandb(wandb, self.directory, name, fingerprint, config))

    def start(self, step: int, /, **details: Any) -> None:
        """Training (re)starts with `step` updates completed: whatever was recorded of later steps is superseded.

        Training calls this once before its first step; an evaluation of a finished run does not. The event's `before`
        is the time of the last line of the process before, if there was one.
        """
        self._purge_step = int(step) + 1
        before = {} if self._before is None else {"before": self._before}
        self.event(step, "start", **before, **details)
        self._before = None

    def train(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record scalars of the step completed as number `step`; values may be NaN or infinite."""
        if clash := [name for name in scalars if name in _RESERVED]:
            raise ValueError(f"a training scalar cannot be called {clash[0]!r}; that key names the line itself")
        values = {name: _number(value) for name, value in scalars.items()}
        self._append("train", step, values)
        for name, value in values.items():
            self._mirror_scalar(f"train/{name}", value, step)

    def measure(
        self, step: int, evaluation: str, name: str, value: float, count: int, where: Mapping[str, Any] | None = None
    ) -> None:
        """Record one measurement of the parameters after `step` updates.

        Args:
          step: updates completed.
          evaluation: which evaluation, e.g. "retrieval".
          name: which number of it, e.g. "accuracy".
          value: the mean over `count` things.
          count: how many things (tokens, queries) it is the mean of.
          where: the conditions, plain values, e.g. `{"length": 4096, "depth": 0.5}`. Two measurements with equal step,
            evaluation, name and conditions are the same measurement taken twice: readers keep the later.
        """
        where = dict(where or {})
        value = _number(value)
        fields = {"evaluation": evaluation, "name": name, "value": value, "count": int(count), "where": where}
        self._append("eval", step, fields)
        conditions = "".join(f"/{key}_{where[key]}" for key in where)
        self._mirror_scalar(f"eval/{evaluation}/{name}{conditions}", value, step)

    def event(self, step: int, name: str, /, **details: Any) -> None:
        """Record that something happened; `details` are plain values."""
        self._append("event", step, {"name": name, "details": details})

    def close(self) -> None:
        self._file.close()
        while self._mirrors:
            self._mirrors.pop().close()
        self._tensorboard_mirror = None

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _append(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        line = dumps({"kind": kind, "step": int(step), "time": round(time.time(), 3), **fields})
        # One write for the whole line: a kill between two writes would tear more lines than one.
        self._file.write(line.encode() + b"\n")

    def _mirror_scalar(self, tag: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            return
        if self._tensorboard and self._tensorboard_mirror is None:
            self._tensorboard_mirror = open_tensorboard(self.directory / TENSORBOARD_DIRECTORY, self._purge_step)
            self._mirrors.append(self._tensorboard_mirror)
        for mirror in self._mirrors:
            mirror.add_scalar(tag, value, int(step))


class NullWriter:
    """A `RunWriter` that writes nothing: what every process but the first holds."""

    def start(self, step: int, /, **details: Any) -> None:
        pass

    def train(self, step: int, scalars: Mapping[str, float]) -> None:
        pass

    def measure(
        self, step: int, evaluation: str, name: str, value: float, count: int, where: Mapping[str, Any] | None = None
    ) -> None:
        pass

    def event(self, step: int, name: str, /, **details: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> NullWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass


def is_run(directory: str | os.PathLike) -> bool:
    """Whether a directory holds a run (which may still be damaged)."""
    return (Path(directory) / CONFIG_FILE).exists()


def load_run(directory: str | os.PathLike) -> Run:
    """Read a run directory.

    A torn last line is ignored. Train and eval lines beyond the step of a later `start` are dropped, and of
    measurements taken twice the later is kept. Events are all kept.

    Raises:
      RecordError: not a run directory, or a file is damaged; the message names the file and the line.
    """
    directory = Path(directory)
    config, fingerprint = _read_config(directory)
    run = Run(directory, config, fingerprint)
    path = directory / RECORDS_FILE
    if not path.exists():
        return run
    train: list[TrainRecord] = []
    evals: dict[tuple, Measurement] = {}
    for number, line in enumerate(_complete_lines(path), start=1):
        with _damage_at(path, number):
            record = _record(line)
        if isinstance(record, TrainRecord):
            train.append(record)
        elif isinstance(record, Measurement):
            key = (record.step, record.evaluation, record.name, dumps(record.where, sort_keys=True))
            evals.pop(key, None)
            evals[key] = record
        else:
            run.events.append(record)
            if record.name == "start":
                train = [r for r in train if r.step <= record.step]
                evals = {k: r for k, r in evals.items() if r.step <= record.step}
    run.train.extend(train)
    run.evals.extend(evals.values())
    return run


def _record(line: bytes) -> TrainRecord | Measurement | Event:
    fields = loads(line)
    kind, step, when = fields.pop("kind"), int(fields.pop("step")), float(fields.pop("time"))
    if kind == "train":
        return TrainRecord(step, when, {name: _number(value) for name, value in fields.items()})
    if kind == "eval":
        value, count, where = _number(fields.pop("value")), int(fields.pop("count")), dict(fields.pop("where"))
        return Measurement(step, when, fields.pop("evaluation"), fields.pop("name"), value, count, where)
    if kind == "event":
        return Event(step, when, fields.pop("name"), dict(fields.pop("details")))
    raise ValueError(f"unknown kind {kind!r}")


@contextlib.contextmanager
def _damage_at(path: Path, number: int):
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise RecordError(
            f"{path}, line {number}: not a record ({what}); remove that line, or restore the file from a copy"
        ) from None


def _complete_lines(path: Path) -> list[bytes]:
    """Lines that end with a newline; what follows the last one was torn by a kill."""
    return path.read_bytes().split(b"\n")[:-1]


def _repair_tail(path: Path) -> TrainRecord | Measurement | Event | None:
    """Cut a torn last line off. Returns the last line, None if there is none."""
    if not path.exists():
        return None
    lines = _complete_lines(path)
    kept = sum(len(line) + 1 for line in lines)
    if kept < path.stat().st_size:
        os.truncate(path, kept)
    if not lines:
        return None
    with _damage_at(path, len(lines)):
        return _record(lines[-1])


def _read_config(directory: Path) -> tuple[dict, str]:
    path = directory / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file; {directory} is not a run directory") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read ({error}); restore it from a copy") from None
    try:
        whole = json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise RecordError(f"{path}, line {line}: not JSON ({error}); restore it from a copy") from None
    if not (isinstance(whole, dict) and isinstance(whole.get("config"), dict) and "fingerprint" in whole):
        raise RecordError(f"{path}, line 1: has no 'config' with its 'fingerprint'; restore it from a copy")
    if whole.get("format") != _FORMAT:
        raise RecordError(f"{path}, line 1: format {whole.get('format')!r}, this version reads {_FORMAT}")
    return whole["config"], str(whole["fingerprint"])


def _write_config(directory: Path, config: dict, fingerprint: str) -> None:
    text = dumps({"format": _FORMAT, "fingerprint": fingerprint, "config": config}, indent=2)
    unfinished = directory / (CONFIG_FILE + ".new")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, directory / CONFIG_FILE)


def _number(value: Any) -> float | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return float(value)
