"""What is planned, and the figures that answer: the words that the compiler's side and the closed form share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from irope_jax.attention.stored import Numbers
from irope_jax.core.chips import CHIPS, TARGETS, Chip
from irope_jax.data.pipeline import DataConfig
from irope_jax.model.cache import CacheSpec, fitting_capacity
from irope_jax.model.config import ModelConfig
from irope_jax.model.decodable import for_documents_of
from irope_jax.sharding.mesh import MeshConfig
from irope_jax.train.loop import TrainConfig

Mode = Literal["train", "prefill", "decode"]
Compiler = Literal["tpu", "gpu", "cpu"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step on one mesh.

    Attributes:
      model, data, train: of the experiment; `data.seq_len` is the length that is planned for.
      mesh: every axis filled in.
      mode: a training step; a piece of a prompt read into a cache (`prefill`) of `data.seq_len` tokens a row; or tokens
        chosen one by one behind such a cache (`decode`; figures are of one token a row).
      rows: of prefill and decode.
      numbers: format of their cache.
      piece: tokens of a prompt that prefill reads at a time.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    mesh: MeshConfig
    mode: Mode = "train"
    rows: int = 1
    numbers: Numbers = "bfloat16"
    piece: int = 2048

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.sizes.values())

    @property
    def length(self) -> int:
        return self.data.seq_len

    def at_length(self, length: int) -> Job:
        return replace(self, data=replace(self.data, seq_len=length))

    @property
    def cache(self) -> CacheSpec:
        return CacheSpec(self.rows, fitting_capacity(self.length, self.mesh.context), self.numbers)

    @property
    def cached_model(self) -> ModelConfig:
        """The model with what depends on the length of a document fixed at this one."""
        return for_documents_of(self.model, self.length)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a step costs on one device. Bytes, FLOPs, seconds; None is not known from this side.

    Attributes:
      parameters, optimizer, cache: held from step to step.
      kept: activations that wait on the device for the backward pass of their layer.
      host: bytes in the host's memory, moments and offloaded activations.
      host_traffic: bytes that go there and come back in a step.
      temporaries: all that a step holds beside what it is given, `kept` included.
      total: most that is allocated at once: arguments, temporaries and what comes out in a place of its own.
      flops: matrix products, those inside kernels included.
      kernel_flops: those inside kernels alone.
      traffic: between the chip and its memory.
      sent: by kind of collective.
      sent_by: by `layer_0` … or `""` outside the layers.
      seconds: to trace and to compile.
      unknown_trips: loops that were counted once.
    """

    parameters: int
    optimizer: int = 0
    cache: int = 0
    kept: int | None = None
    host: int = 0
    host_traffic: float = 0.0
    temporaries: int | None = None
    total: int | None = None
    flops: float = 0.0
    kernel_flops: float = 0.0
    traffic: float | None = None
    sent: dict[str, float] = field(default_factory=dict)
    sent_by: dict[str, float] = field(default_factory=dict)
    seconds: tuple[float, float] | None = None
    unknown_trips: int = 0

    @property
    def sent_bytes(self) -> float:
        return sum(self.sent.values())

    @classmethod
    def of(cls, values: dict[str, Any]) -> Figures:
        """From JSON."""
        seconds = values.get("seconds")
        return cls(**{**values, "seconds": tuple(seconds) if seconds else None})


@dataclass(frozen=True)
class Failure:
    """Why a target gives no figures, in a line; `short` bytes of memory, where that is why."""

    why: str
    short: float | None = None


@dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at least, each kind of work alone at the rate of the data sheet."""

    compute: float
    memory: float | None
    network: float
    host: float = 0.0

    @property
    def _named(self) -> dict[str, float]:
        return {"compute": self.compute, "memory": self.memory or 0.0, "network": self.network, "host": self.host}

    @property
    def bound(self) -> str:
        return max(self._named, key=self._named.get)

    @property
    def seconds(self) -> float:
        return max(self._named.values())

    @property
    def in_turn(self) -> float:
        """Where nothing overlaps but memory traffic with products: what meshes are ranked by."""
        return max(self.compute, self.memory or 0.0) + self.network + self.host


def chip_of_target(target: str) -> Chip | None:
    """The data sheet of `v5p:4x4x4`; None where nothing is known (`cpu:8`)."""
    return CHIPS.get(TARGETS.get(target.partition(":")[0].lower(), ""))


def compiler_of_target(target: str) -> Compiler:
    """Whose programs run on a target."""
    if target.lower().startswith("cpu"):
        return "cpu"
    return "gpu" if TARGETS.get(target.partition(":")[0].lower(), "").startswith("NVIDIA") else "tpu"


def target_size(target: str) -> int | None:
    """Devices of a target by its name alone; None if the name does not say."""
    shape = target.partition(":")[2]
    parts = shape.lower().split("x")
    return math.prod(map(int, parts)) if shape and all(part.isdecimal() for part in parts) else None


def timed(compiled: Figures | Failure | None, by_hand: Figures) -> Figures:
    """The compiler's figures; FLOPs by hand where its program has loops of unknown length, as decoding has."""
    if not isinstance(compiled, Figures):
        return by_hand
    return replace(compiled, flops=max(compiled.flops, by_hand.flops)) if compiled.unknown_trips else compiled


def roofline(figures: Figures, chip: Chip) -> Roofline:
    """A permute to a neighbour uses one link; other collectives both directions of one ring (`Chip.links`). The
    rate to the host is `Chip.host`.
    """
    link = lambda kind: chip.link * (1 if kind == "collective-permute" else chip.links)
    network = sum(count / link(kind) for kind, count in figures.sent.items())
    memory = None if figures.traffic is None else figures.traffic / chip.bandwidth
    return Roofline(figures.flops / chip.bf16_flops, memory, network, host=figures.host_traffic / chip.host)
