"""What the training loop reads: batches as global arrays, each process loading only the rows its devices need."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from irope_jax.context.layout import ContextLayout
from irope_jax.core.config import ConfigError
from irope_jax.core.types import Batch
from irope_jax.data.pipeline import DataConfig, make_iterator
from irope_jax.model.config import ModelConfig
from irope_jax.sharding.feed import global_array, row_block, rows_needed
from irope_jax.sharding.mesh import MeshConfig
from irope_jax.sharding.rules import batch_sharding

log = logging.getLogger(__name__)


def context_layout(model: ModelConfig, mesh: MeshConfig) -> ContextLayout:
    """How the model wants the tokens of a row to lie on the devices along the context axis of a mesh."""
    return ContextLayout(model.context.layout, mesh.fill(jax.device_count()).context)


class Feed(Iterator[Batch]):
    """Endless global batches `[B, T]` on the mesh, cut along B and T, the tokens of a row placed by `layout`.

    The stream does not depend on the number of processes, nor does its state, which is that of `BatchIterator`.

    Raises:
      ConfigError: the layout cannot cut rows of `data.seq_len`, or as `make_iterator`.
    """

    def __init__(self, data: DataConfig, layout: ContextLayout, mesh: Mesh):
        try:
            layout.check(data.seq_len)
        except ConfigError as error:
            raise ConfigError("config.data.seq_len", data.seq_len, error.fix) from None
        self._layout, self._sharding, self._rows = layout, batch_sharding(mesh), data.batch_size
        needed = rows_needed(self._sharding, (data.batch_size, data.seq_len))
        blocks = {process: row_block(ranges, data.batch_size) for process, ranges in needed.items()}
        if whole := sorted(process for process, block in blocks.items() if block is None):
            log.warning(
                "%d of %d processes load all %d rows of each batch, first process %d: those they need are no equal, "
                "consecutive part of it; other sizes or another order of devices in the mesh would load less",
                len(whole), len(blocks), data.batch_size, whole[0],
            )  # fmt: skip
        index, count = blocks[jax.process_index()] or (0, 1)
        self._first_row = index * (data.batch_size // count)
        self._batches = make_iterator(data, process_index=index, process_count=count)

    def __next__(self) -> Batch:
        placed = self._layout.place(next(self._batches))
        return jax.tree.map(
            lambda x: global_array(x, self._sharding, first_row=self._first_row, rows=self._rows), placed
        )

    def get_state(self) -> dict[str, Any]:
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches.set_state(state)

    def skip(self, count: int) -> None:
        """Pass over so many batches without loading them."""
        self._batches.skip(count)

    def close(self) -> None:
        self._batches.close()
