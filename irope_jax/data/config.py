"""What a data pipeline is made of, as frozen config; the errors that can be found without reading any data.

The pipeline itself is `pipeline`; sources, tasks, packing and tokenizers define their own specs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from irope_jax.core.config import ConfigError
from irope_jax.data.packing import Counted, OnePerRow, PackingSpec, Randomised, TrainingPositions
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.synthetic import TaskSpec
from irope_jax.data.tokenizer import ByteTokenizer, TokenizerSpec


@dataclass(frozen=True)
class LengthBuckets:
    """How often documents come, by their length: long ones more often, within each source (arXiv 2402.10171).

    What the source contributes to the mixture stays what `weight` says; only what it is made of changes.

    Attributes:
      edges: growing lengths in tokens; a document of just that many is above the edge.
      weights: one for below the first edge, between each two, and above the last: how many times an epoch shows such a
        document. 2 is twice, 0.5 every other epoch (each epoch another half of them), 0 never.
    """

    edges: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        if not self.edges or list(self.edges) != sorted(set(self.edges)) or self.edges[0] < 1:
            raise ConfigError("edges", self.edges, "give growing lengths in tokens, such as (4096, 32768)")
        if len(self.weights) != len(self.edges) + 1:
            fix = f"{len(self.edges)} edges make {len(self.edges) + 1} buckets; give each a weight"
            raise ConfigError("weights", self.weights, fix)
        if min(self.weights) < 0 or not any(self.weights):
            raise ConfigError("weights", self.weights, "must be 0 or more, and not all 0")


@dataclass(frozen=True)
class MixtureStep:
    """Weights of the mixture from a batch on.

    Attributes:
      start: number of the batch, from 0.
      weights: one for each ingredient, in order; 0 rests it.
    """

    start: int
    weights: tuple[float, ...]

    def __post_init__(self):
        if self.start < 0:
            raise ConfigError("start", self.start, "must be 0 or more")
        if not self.weights or min(self.weights) < 0 or not any(self.weights):
            raise ConfigError("weights", self.weights, "must be 0 or more, and not all 0")


@dataclass(frozen=True)
class Ingredient:
    """One part of the mixture.

    Attributes:
      source: documents (a source) or generated samples (a task).
      weight: relative share of the predicted tokens, kept from document to document.
      lengths: (least, most) tokens of a task's samples, uniform; `None` is `seq_len + 1`, one whole row. Text has none.
      by_length: how often documents of a text source come, by length; `None` is once an epoch. Tasks have none.
    """

    source: SourceSpec | TaskSpec = field(default_factory=Corpus)
    weight: float = 1.0
    lengths: tuple[int, int] | None = None
    by_length: LengthBuckets | None = None

    def __post_init__(self):
        if self.by_length is not None and self.is_task:
            raise ConfigError("by_length", self.by_length, "only text has it; a task has lengths=(least, most)")
        if self.weight <= 0:
            raise ConfigError("weight", self.weight, "must be positive; leave the ingredient out instead of 0")
        if self.lengths is not None and not self.is_task:
            raise ConfigError("lengths", self.lengths, "only tasks have it; text is cut by seq_len")
        if self.lengths is not None and not 2 <= self.lengths[0] <= self.lengths[1]:
            raise ConfigError("lengths", self.lengths, "give (least, most) with 2 <= least <= most")

    @property
    def is_task(self) -> bool:
        return isinstance(self.source, TaskSpec)

    def sample_lengths(self, seq_len: int) -> tuple[int, int]:
        """(least, most) tokens of a task's samples for rows of `seq_len`."""
        return self.lengths or (seq_len + 1, seq_len + 1)


@dataclass(frozen=True)
class DataConfig:
    """Everything that decides which batch comes when.

    Attributes:
      seq_len: T, places of a row (a row shows T inputs and T targets, T + 1 tokens).
      batch_size: rows of the global batch; all processes together.
      mixture: what is mixed.
      mixture_schedule: other weights of the mixture, each from a batch on; before the first those of the mixture hold.
      packing: how documents share rows.
      positions: how tokens of a document are numbered in training: counted, or a random growing selection.
      tokenizer: text to ids.
      seed: order, cuts and samples.
      prefetch: batches made ahead by a background thread; 0 makes each when asked.
    """

    seq_len: int = 1024
    batch_size: int = 8
    mixture: tuple[Ingredient, ...] = (Ingredient(),)
    mixture_schedule: tuple[MixtureStep, ...] = ()
    packing: PackingSpec = field(default_factory=OnePerRow)
    positions: TrainingPositions = field(default_factory=Counted)
    tokenizer: TokenizerSpec = field(default_factory=ByteTokenizer)
    seed: int = 0
    prefetch: int = 2

    def __post_init__(self):
        for name in ("seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        for name in ("seed", "prefetch"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must be 0 or more")
        if not self.mixture:
            raise ConfigError("mixture", self.mixture, "name at least one ingredient, such as Ingredient(Corpus())")
        for place, step in enumerate(self.mixture_schedule):
            if len(step.weights) != len(self.mixture):
                fix = f"the mixture has {len(self.mixture)} ingredients; give each a weight, 0 to rest it"
                raise ConfigError(f"mixture_schedule.{place}.weights", step.weights, fix)
            if place and step.start <= self.mixture_schedule[place - 1].start:
                fix = "each step must start after the one before it"
                raise ConfigError(f"mixture_schedule.{place}.start", step.start, fix)
        if isinstance(self.positions, Randomised) and self.positions.limit < self.seq_len:
            fix = f"a document may have seq_len={self.seq_len} tokens; choose from at least as many positions"
            raise ConfigError("positions.limit", self.positions.limit, fix)
        multiple = self.packing.document_multiple
        if multiple > 1 and self.seq_len % multiple:
            fix = f"seq_len={self.seq_len} is not a multiple of it; documents could not fill a row"
            raise ConfigError("packing.document_multiple", multiple, fix)
        for place, ingredient in enumerate(self.mixture):
            if ingredient.is_task:
                self._check_task(f"mixture.{place}", ingredient)

    def weights_at(self, batch: int) -> tuple[float, ...]:
        """Weights of the ingredients in a batch, counted from 0."""
        begun = [step.weights for step in self.mixture_schedule if step.start <= batch]
        return begun[-1] if begun else tuple(ingredient.weight for ingredient in self.mixture)

    def _check_task(self, path: str, ingredient: Ingredient) -> None:
        least, most = ingredient.sample_lengths(self.seq_len)
        if most > self.seq_len + 1:
            fix = f"a row has room for seq_len + 1 = {self.seq_len + 1} tokens"
            raise ConfigError(f"{path}.lengths", (least, most), fix)
        try:
            ingredient.source.check(self.tokenizer, least)
        except ConfigError as error:
            if error.field == "length":
                field = "seq_len" if ingredient.lengths is None else f"{path}.lengths"
                raise ConfigError(field, ingredient.lengths or self.seq_len, error.fix) from None
            raise error if error.field.startswith("tokenizer") else error.within(f"{path}.source") from None
