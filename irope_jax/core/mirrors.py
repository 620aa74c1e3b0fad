"""Copies of what a run records, for looking at: TensorBoard files, Weights & Biases. Nothing reads them back."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol


class MirrorMissingError(RuntimeError):
    """A mirror was asked for whose package is not installed; says how to get it."""


class Mirror(Protocol):
    """Where scalars go as well."""

    def add_scalar(self, tag: str, value: float, step: int) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, beside the run directory: `pip install wandb`.

    Attributes:
      project: project there.
      entity: user or team; None is the account's default.
      mode: `offline` writes files that `wandb sync` uploads later.
    """

    kind: ClassVar[str] = "wandb"
    project: str = "irope_jax"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


def open_tensorboard(directory: Path, purge_step: int | None) -> Mirror:
    """Raises `MirrorMissingError` without tensorboardX."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise MirrorMissingError(
            "tensorboard=True needs tensorboardX: `pip install tensorboardX`, or switch the mirror off"
        ) from None
    return SummaryWriter(str(directory), purge_step=purge_step, flush_secs=10)


class Wandb:
    """A run of Weights & Biases that goes on when the run directory does.

    Scalars of a step are sent together when the next step's come. Steps are given as the field `step`: a run that went
    back to a checkpoint counts some of them again, which its own counter would refuse.

    Raises:
      MirrorMissingError: wandb is not installed.
    """

    def __init__(self, spec: WandbConfig, directory: Path, name: str, mark: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise MirrorMissingError(
                "wandb is not installed: `pip install wandb`, or set config.wandb to None"
            ) from None
        self._run = wandb.init(
            project=spec.project, entity=spec.entity, mode=spec.mode, name=name, dir=str(directory),
            id=_run_id(directory, mark), resume="allow", config=dict(config),
        )  # fmt: skip
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._step: int | None = None
        self._values: dict[str, float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if step != self._step:
            self._flush()
        self._step = step
        self._values[tag] = value

    def _flush(self) -> None:
        if self._values:
            self._run.log({"step": self._step, **self._values})
            self._values = {}

    def close(self) -> None:
        self._flush()
        self._run.finish()


def _run_id(directory: Path, mark: str) -> str:
    """The id of the run there: chosen once and kept in the run directory."""
    path = directory / "wandb_id"
    if not path.exists():
        path.write_text(f"{mark[:8]}-{uuid.uuid4().hex[:8]}", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
