"""Orbax checkpoints of a run: training state, place in the data, and what they belong to.

A checkpoint is a directory `STEP/` with three items: `state` (arrays, sharded, readable into another mesh), `data`
(JSON, the iterator's place) and `meta` (JSON: config and fingerprint). Orbax writes to a temporary name and renames, so
a checkpoint that is there was written whole; checksums, listed before the renaming, tell whether it still is (see
`checksums.py`). Arrays are stored by tensorstore; nothing in a checkpoint is ever executed.

A damaged checkpoint is named in the log and the one before it is used. Whoever writes into the run (`create=True`)
moves it to RUN/damaged_checkpoints, so that its step can be saved again; whoever only reads leaves it where it is. When
none is whole that is an error, and nothing is moved: to start from the beginning is for the user to decide.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from irope_jax.checkpoint import checksums
from irope_jax.checkpoint.damage import Damage
from irope_jax.checkpoint.streams import BLOCK_BYTES, Keys, Layout, Piece, nested
from irope_jax.core.config import ConfigError
from irope_jax.core.hosts import barrier, gather, is_main_process

log = logging.getLogger(__name__)

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
      on_save_error: disk full, directory not writable: stop the run, or log it and train on with the checkpoints there
        are. One process only can continue; of several, some may have saved their part.
    """

    every: int = 100
    keep: int = 2
    keep_every: int | None = None
    on_save_error: Literal["stop", "continue"] = "stop"

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
        self._config, self._create = config or CheckpointConfig(), create
        if self._config.on_save_error == "continue" and jax.process_count() > 1:
            fix = "several processes cannot know of one another what was saved; use 'stop', and restart them"
            raise ConfigError("checkpoint.on_save_error", "continue", fix)
        self._damage = Damage(self.directory)
        self._saving = 0
        with self._saving_errors(may_continue=False):
            self._manager = self._open_manager()

    def _open_manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory,
            item_names=("state", "data", "meta"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._config.keep,
                keep_period=self._config.keep_every,
                create=self._create,
                cleanup_tmp_directories=self._create,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files),
            ),
        )

    def _list_files(self) -> None:
        """Called by orbax in process 0, in the thread that saves: all is written, the directory has no name yet."""
        made = [p for p in self.directory.glob(f"{self._saving}*") if p.name.partition(".")[0] == str(self._saving)]
        if len(made) != 1:
            raise CheckpointError(f"{self.directory}: {len(made)} directories for step {self._saving}, expected one")
        checksums.write_list(made[0])

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is being written, then release the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
          CheckpointError: it could not be saved.
        """
        with self._saving_errors():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _saving_errors(self, *, may_continue: bool = True) -> Iterator[None]:
        """What goes wrong while saving becomes one line; orbax keeps the error, so the directory is opened anew."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # of the operating system, tensorstore, orbax, or several wrapped into one another
            told = CheckpointError(
                f"{self.directory}: cannot save step {self._saving} there ({_reason(error)}); free space or make it "
                "writable, then give the same command again: older checkpoints are as they were"
            )
            if not may_continue or self._config.on_save_error == "stop":
                raise told from error
            log.error("%s (checkpoint.on_save_error=continue: training on)", told)
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._open_manager()

    @property
    def latest(self) -> int | None:
        """Newest whole checkpoint, by step; None before the first. All processes must ask together.

        Raises:
          CheckpointError: there are some, and all are damaged.
        """
        return self.newest()

    def newest(self, before: int | None = None) -> int | None:
        """Newest whole checkpoint, of those before a step if one is given. All processes must ask together.

        Raises:
          CheckpointError: there are some, and all are damaged.
        """
        found, faults = gather(self._look(before) if is_main_process() else None)[0]
        for step, fault in faults:
            log.warning("%s: %s; not used", self.directory / str(step), fault)
        if found is None and faults:
            step, fault = faults[0]
            raise CheckpointError(
                f"{self.directory / str(step)}: {fault}; no earlier checkpoint is whole: "
                f"bring one back, or move {self.directory} away to train from the start"
            )
        if faults and self._create:
            self.wait()
            if is_main_process():
                for step, _ in faults:
                    self._damage.move_away(step)
            barrier("damaged checkpoints moved")
            self._manager.reload()
        return found

    def _look(self, before: int | None) -> tuple[int | None, list[tuple[int, str]]]:
        """The newest whole step, and those after it with what is wrong with them."""
        faults = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            if before is not None and step >= before:
                continue
            fault = self._damage.of(step)
            if fault is None:
                return step, faults
            faults.append((step, fault))
        return None, faults

    def discard_after(self, step: int) -> None:
        """Delete every checkpoint newer than `step`, so that training can go on from there. All processes together.

        Raises:
          CheckpointError: none of that step.
        """
        self.wait()
        self._there(step)
        for other in sorted(self._manager.all_steps(), reverse=True):  # cut short, it has deleted the newest ones
            if other > step:
                self._manager.delete(other)
                self._damage.forget(other)

    def save(self, step: int, state: Any, data: Any, meta: Mapping[str, Any]) -> None:
        """Start saving; arrays are copied off the device before this returns, so they may be donated afterwards.

        They are stored in chunks, so that a part of one can be read: onto another mesh, or for an export. It waits for
        the save before, and tells what went wrong with that.

        Raises:
          CheckpointError: this one or the one before could not be saved, and `on_save_error` is "stop".
        """
        self.wait()
        if step == self._manager.latest_step():
            return
        how = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=2 * BLOCK_BYTES), state)
        self._saving = step
        self._damage.forget(step)
        with self._saving_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state, how),
                    data=ocp.args.JsonSave(data),
                    meta=ocp.args.JsonSave(dict(meta)),
                ),
                force=True,
                custom_metadata=dict(checksums.MARK),
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
        checksums.write_list(self.directory / str(step))

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
        """The step to read: that asked for, if it is whole, or the newest that is."""
        if step is None:
            step = self.newest()
            if step is None:
                raise CheckpointError(f"{self._none()}; train first, or name another run directory")
            return step
        self._there(step)
        fault = gather(self._damage.of(step) if is_main_process() else None)[0]
        if fault is not None:
            raise CheckpointError(
                f"{self.directory / str(step)}: {fault}; read another: there are {sorted(self._manager.all_steps())}"
            )
        return step

    def _there(self, step: int) -> None:
        there = sorted(self._manager.all_steps())
        if step not in there:
            found = f"{self.directory}: no checkpoint of step {step}; there are {there}" if there else self._none()
            raise CheckpointError(found)

    def _none(self) -> str:
        return f"{self.directory}: no whole checkpoint"

    def _restore(self, step: int | None, args: dict[str, Any]) -> Any:
        step = self._step(step)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.directory / str(step)}: cannot be read as this model ({_reason(error)}); "
            "check that the config is the one it was trained with, or delete the directory to fall back to an older one"
        )


def _reason(error: BaseException) -> str:
    """The first line of an error."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


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
