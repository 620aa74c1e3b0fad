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
class Ingredient:
    """One part of the mixture.

    Attributes:
      source: documents (a source) or generated samples (a task).
      weight: relative share of the predicted tokens (within a percent).
      lengths: (least, most) tokens of a task's samples, uniform; `None` is `seq_len + 1`, one whole row. Text has none.
    """

    source: SourceSpec | TaskSpec = field(default_factory=Corpus)
    weight: float = 1.0
    lengths: tuple[int, int] | None = None

    def __post_init__(self):
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
      packing: how documents share rows.
      positions: how tokens of a document are numbered in training: counted, or a random growing selection.
      tokenizer: text to ids.
      seed: order, cuts and samples.
      prefetch: batches made ahead by a background thread; 0 makes each when asked.
    """

    seq_len: int = 1024
    batch_size: int = 8
    mixture: tuple[Ingredient, ...] = (Ingredient(),)
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
