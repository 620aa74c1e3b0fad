"""Orbax checkpoints of a run: training state, place in the data, and what they belong to.

A checkpoint is a directory `STEP/` with three items: `state` (arrays, sharded, readable into another mesh), `data`
(JSON, the iterator's place) and `meta` (JSON: config and fingerprint). Orbax writes to a temporary name and renames, so
a checkpoint that is there is whole. Arrays are stored by tensorstore; nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from irope_jax.checkpoint.streams import BLOCK_BYTES, Keys, Layout, Piece, nested
from irope_jax.core.config import ConfigError

CHECKPOINTS = "checkpoints"
"""Where in a run directory they lie."""

_CACHE_BYTES = 2 * BLOCK_BYTES
"""Decoded chunks of arrays that are kept, for those that are larger than the blocks asked for."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      keep: how many of the newest stay.
      keep_every: multiples of this step number stay for good; None keeps none beyond `keep`.
    """

    every: int = 100
    keep: int = 2
    keep_every: int | None = None

    def __post_init__(self):
        for name in ("every", "keep", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, value, "must be at least 1")


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or cannot be read; the message names the directory and what to do."""


class Checkpoints:
    """The checkpoints of one run directory. Saving is asynchronous: use it as a context manager, which waits."""

    def __init__(self, run_directory: str | Path, config: CheckpointConfig | None = None, *, create: bool = False):
        self.directory = Path(run_directory).absolute() / CHECKPOINTS
        if not create and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no checkpoints here; train first, or name another run directory")
        config = config or CheckpointConfig()
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("state", "data", "meta"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep,
                keep_period=config.keep_every,
                create=create,
                cleanup_tmp_directories=create,
                enable_async_checkpointing=True,
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is being written, then release the directory."""
        self._manager.wait_until_finished()
        self._manager.close()

    def wait(self) -> None:
        self._manager.wait_until_finished()

    @property
    def latest(self) -> int | None:
        """Newest whole checkpoint, by step; None before the first."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: Any, meta: Mapping[str, Any]) -> None:
        """Start saving; arrays are copied off the device before this returns, so they may be donated afterwards.

        They are stored in chunks, so that a part of one can be read: onto another mesh, or for an export.
        """
        if step == self.latest:
            return
        how = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=2 * BLOCK_BYTES), state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state, how),
                data=ocp.args.JsonSave(data),
                meta=ocp.args.JsonSave(dict(meta)),
            ),
            force=True,
        )

    def save_pieces(
        self, step: int, layouts: Mapping[Keys, Layout], pieces: Iterable[Piece], meta: Mapping[str, Any]
    ) -> None:
        """Save parameters that pass by in blocks; one block is in memory at a time. There is nothing but parameters.

        The checkpoint is there from the start and whole at the end: write into a directory that gets its name last.
        """
        ones = {("params", *keys): np.zeros((1,) * len(it.shape), it.dtype) for keys, it in layouts.items()}
        self.save(step, nested(ones), {}, meta)  # the tree and its number formats, in orbax's words
        self.wait()
        stores = self._open(step)
        for keys, layout in layouts.items():
            stores[keys] = _made_anew(stores[keys], layout)
        batch, held = ts.Transaction(), 0  # every commit waits for the disk
        for keys, index, values in pieces:
            stores[keys].with_transaction(batch)[index].write(values).result()
            held += values.nbytes
            if held >= BLOCK_BYTES:
                batch.commit_async().result()
                batch, held = ts.Transaction(), 0
        batch.commit_async().result()

    def arrays(self, step: int | None = None, weights: str | None = None) -> dict[Keys, Any]:
        """Parameters of a checkpoint as tensorstores, by path: `array[index].read().result()` reads a block.

        Args:
          weights: `averaged` or `params`; by default the averaged ones if there are any.

        Raises:
          CheckpointError: nothing there, or damaged.
        """
        step = self._step(step)
        name = self._weights(step, weights)
        try:
            return self._open(step, name)
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _weights(self, step: int, asked: str | None) -> str:
        """The name of a tree of parameters in a checkpoint."""
        try:
            there = ocp.PyTreeCheckpointHandler().metadata(self.directory / str(step) / "state").tree
        except Exception as error:
            raise self._unreadable(step, error) from error
        averaged = bool(jax.tree.leaves(there.get("averaged")))
        if asked == "averaged" and not averaged:
            raise CheckpointError(f"{self.directory / str(step)}: holds no averaged weights; ask for 'params'")
        return asked or ("averaged" if averaged else "params")

    def _open(self, step: int, name: str = "params") -> dict[Keys, Any]:
        place = self.directory / str(step) / "state"
        tree = ocp.PyTreeCheckpointHandler().metadata(place).tree[name]
        store = {"driver": "ocdbt", "base": f"file://{place}/"}
        context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        opened = {}
        for path, _ in jax.tree_util.tree_leaves_with_path(tree):
            keys = tuple(str(key.key) for key in path)
            where = {**store, "path": ".".join((name, *keys)) + "/"}
            opened[keys] = ts.open({"driver": "auto", "kvstore": where}, context=context, open=True)
        return {keys: found.result() for keys, found in opened.items()}

    def restore(self, abstract: Any, shardings: Any, step: int | None = None) -> tuple[Any, Any, dict[str, Any]]:
        """`(state, data, meta)` of a step (the newest by default), each array laid out by `shardings`.

        Args:
          abstract: shapes and types expected, the same tree as was saved.
          shardings: the same tree of shardings; the mesh may differ from the one that saved.

        Raises:
          CheckpointError: nothing there, damaged, or of another shape.
        """
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
        json = ocp.args.JsonRestore
        restored = self._restore(step, {"state": ocp.args.StandardRestore(target), "data": json(), "meta": json()})
        return restored["state"], restored["data"], restored["meta"]

    def restore_params(self, abstract: Any, shardings: Any, step: int | None = None, weights: str | None = None) -> Any:
        """Only the parameters, from a state whose other leaves are not read; `weights` as for `arrays`.

        Raises:
          CheckpointError: as `restore`.
        """
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
        step = self._step(step)
        name = self._weights(step, weights)
        try:
            with ocp.PyTreeCheckpointer() as reader:
                restored = reader.restore(
                    self.directory / str(step) / "state",
                    args=ocp.args.PyTreeRestore(
                        item={name: target},
                        restore_args=ocp.checkpoint_utils.construct_restore_args({name: target}),
                        partial_restore=True,
                    ),
                )
        except Exception as error:
            raise self._unreadable(step, error) from error
        return restored[name]

    def read(self, step: int | None = None) -> tuple[Any, Any, dict[str, Any]]:
        """`(state, data, meta)` as they lie in the files, arrays as numpy: for comparing and looking, without a model.

        Raises:
          CheckpointError: nothing there, or damaged.
        """
        step = self._step(step)
        place, handler = self._manager.directory / str(step) / "state", ocp.PyTreeCheckpointHandler()
        try:
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(place).tree)
            state = handler.restore(place, args=ocp.args.PyTreeRestore(restore_args=how))
        except Exception as error:
            raise self._unreadable(step, error) from error
        rest = self._restore(step, {"data": ocp.args.JsonRestore(), "meta": ocp.args.JsonRestore()})
        return state, rest["data"], rest["meta"]

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return self._restore(step, {"meta": ocp.args.JsonRestore()})["meta"]

    def _step(self, step: int | None) -> int:
        there = self._manager.all_steps()
        if not there:
            raise CheckpointError(f"{self.directory}: no whole checkpoint; train first, or name another run directory")
        if step is not None and step not in there:
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}; there are {sorted(there)}")
        return max(there) if step is None else step

    def _restore(self, step: int | None, args: dict[str, Any]) -> Any:
        step = self._step(step)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return CheckpointError(
            f"{self.directory / str(step)}: cannot be read as this model ({reason[:200]}); "
            "check that the config is the one it was trained with, or delete the directory to fall back to an older one"
        )


def _made_anew(store: Any, layout: Layout) -> Any:
    """The same array with another shape and nothing in it, in the format the old one had."""
    spec = store.spec().to_json()
    return ts.open(
        {"driver": spec["driver"], "kvstore": spec["kvstore"]},
        create=True,
        delete_existing=True,
        dtype=store.dtype,
        shape=layout.shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=layout.chunk),
    ).result()
