"""`irope import`: a Hugging Face folder or a GGUF file becomes a run directory like any that was trained here.

Wiring: formats are `checkpoint`'s. Everything is written beside the target and renamed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from irope_jax.checkpoint.gguf import GgufFile
from irope_jax.checkpoint.hf_config import context_length, family_of, model_from_hf, text_values
from irope_jax.checkpoint.hf_names import LLAMA_IDLE
from irope_jax.checkpoint.hf_places import layout_of
from irope_jax.checkpoint.hf_weights import Reading, SafetensorsFolder, open_reading, read_json, without_tied_head
from irope_jax.checkpoint.native import CheckpointError, Checkpoints
from irope_jax.checkpoint.streams import Piece, gathered
from irope_jax.core.config import ConfigError, fingerprint, override, to_dict
from irope_jax.core.hosts import configure_logging
from irope_jax.core.numerics import shape_difference
from irope_jax.core.progress import megabytes
from irope_jax.core.records import RunWriter
from irope_jax.data.config import DataConfig
from irope_jax.data.tokenizer import TokenIds, TokenizerFile
from irope_jax.evals.perplexity import Perplexity
from irope_jax.experiment import Experiment, resolve
from irope_jax.model.config import ModelConfig, draw_layers
from irope_jax.model.cost import abstract_params, parameter_counts
from irope_jax.model.decoder import restack
from irope_jax.train.loop import TrainConfig

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"

KEPT = "hugging_face"
"""Where in a run directory the source's other files lie."""

COMPANIONS = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


class SourceError(CheckpointError):
    """A source that cannot be imported: an argument of the command is wrong, not a run that broke."""

    exit_code = 2


@dataclass(frozen=True)
class Imported:
    """What a source holds.

    Attributes:
      model: what it describes.
      weights: where they are, checked against the model and not read yet.
      context: tokens it says it reads.
      tokenizer: text of a `tokenizer.json`, or None.
      special: texts of its `bos`, `eos` and `pad`.
      companions: other files of the folder, by name, that an export gives back.
    """

    model: ModelConfig
    weights: Reading
    context: int
    tokenizer: str | None
    special: dict[str, str]
    companions: dict[str, bytes] = field(default_factory=dict)

    @property
    def ids(self) -> dict[str, int]:
        """Of `bos`, `eos` and `pad`, as far as config.json names tokens that the model has."""
        values, found = json.loads(self.companions.get("config.json", b"{}")), {}
        for name in ("bos", "eos", "pad"):
            number = values.get(f"{name}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if type(number) is int and 0 <= number < self.model.vocab_size:
                found[name] = number
        return found

    @cached_property
    def params(self) -> dict[str, Any]:
        """All weights in memory, as numpy: for small models."""
        return gathered(self.weights.layouts(self.model), self.weights.pieces(self.model))


def read_source(source: Path) -> Imported:
    """A Hugging Face folder (config.json, safetensors) or a GGUF file of the Llama family, checked and not yet read.

    Raises:
      CheckpointError: nothing there, damaged, or tensors that do not fit the config.
      ConfigError: a config that says what is not supported; names the field.
    """
    if source.is_dir():
        return _read_folder(source)
    if source.suffix == ".gguf" and source.is_file():
        file = GgufFile(source)
        model = file.model()
        weights, tokenizer = file.reading(model), file.tokenizer_json()
        return Imported(
            model, weights, file.context_length, tokenizer, file.special_tokens(), companions=file.companions()
        )
    fix = "name a folder with config.json and safetensors, or a .gguf file"
    raise CheckpointError(f"{source}: {'no such file or folder' if not source.exists() else 'not a model'}; {fix}")


def _read_folder(folder: Path) -> Imported:
    values = read_json(folder / "config.json")
    try:
        sees, values = values.get("model_type") == "llama4", dict(text_values(values))
        model, context = model_from_hf(values), context_length(values)
    except ConfigError as error:
        raise error.within(str(folder / "config.json")) from None
    tensors = SafetensorsFolder(folder)
    if sees or any(name.startswith("language_model.") for name in tensors.names):
        log.info("%s: only the text part is read", folder)
        tensors.text_only()
    names = without_tied_head(tensors, model)
    rows = layout_of(family_of(values).tables, model, names)
    weights = open_reading(rows, model, tensors, names, idle=LLAMA_IDLE)
    kept = {"config.json": json.dumps(values, indent=2).encode()} | _companions(folder)
    if not (folder / TOKENIZER).is_file():
        return Imported(model, weights, context, None, {}, kept)
    text = _bytes_of(folder / TOKENIZER)
    try:
        tokenizer = text.decode("utf-8")
    except ValueError as error:
        raise CheckpointError(f"{folder / TOKENIZER}: not a readable text file ({error})") from None
    return Imported(model, weights, context, tokenizer, _special_tokens(folder, values), kept)


def _companions(folder: Path) -> dict[str, bytes]:
    """Files beside the weights that an export gives back as they were."""
    found = {name: _bytes_of(folder / name) for name in COMPANIONS if (folder / name).is_file()}
    for name in found:
        if name.endswith(".json"):
            read_json(folder / name)
    return found


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _special_tokens(folder: Path, values: dict[str, Any]) -> dict[str, str]:
    """Texts of `bos`, `eos` and `pad`: as tokenizer_config.json names them, else by their ids in config.json."""
    named = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    added = read_json(folder / TOKENIZER).get("added_tokens")
    added = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    found = {}
    for name in ("bos", "eos", "pad"):
        token, number = named.get(f"{name}_token"), values.get(f"{name}_token_id")
        token = token.get("content") if isinstance(token, dict) else token
        number = number[0] if isinstance(number, list) and number else number
        if token is None and number is not None:
            token = next((other.get("content") for other in added if other.get("id") == number), None)
        if isinstance(token, str):
            found[name] = token
    return found


def import_verb(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    configure_logging()
    source, target = Path(args.source), Path(args.target)
    if os.path.lexists(target):
        raise ConfigError("DST", str(target), "is there already; choose another, or remove it")
    try:
        found = read_source(source)
        with in_full(target) as folder:
            experiment = _import_into(folder, found, source, target, overrides)
    except CheckpointError as error:
        raise SourceError(str(error)) from error
    print(draw_layers(experiment.model))
    count = sum(parameter_counts(experiment.model).values())
    print(f"{count:,} parameters, {found.context:,} tokens of context: {target}")
    print(f"next: irope eval {target}   or train.init_from={str(target)!r} in a config")
    return 0


def _import_into(
    folder: Path, found: Imported, source: Path, target: Path, overrides: list[tuple[str, str]]
) -> Experiment:
    """Make `folder` a run directory that will be called `target`."""
    experiment = _experiment(found, source, target.name, folder, overrides)
    check_layers(experiment.model, found.model)
    values = to_dict(experiment)
    if found.tokenizer is not None:
        values["data"]["tokenizer"]["path"] = str(target.absolute() / TOKENIZER)
    if found.companions:
        (folder / KEPT).mkdir()
        for name, content in found.companions.items():
            (folder / KEPT / name).write_bytes(content)
    mark = fingerprint(values)
    with RunWriter(folder, values, mark) as writer:
        writer.event(0, "imported", source=str(source), context=found.context)
    layouts = found.weights.layouts(experiment.model)
    total = sum(math.prod(it.shape) * it.dtype.itemsize for it in layouts.values())
    meta = {"fingerprint": mark, "config": values, "model": values["model"], "imported_from": str(source)}
    with (
        Checkpoints(folder, experiment.checkpoint, create=True) as checkpoints,
        megabytes("reading", total) as advance,
    ):
        pieces = counted(found.weights.pieces(experiment.model), advance)
        checkpoints.save_pieces(0, layouts, pieces, meta)
    return experiment


def counted(pieces: Iterable[Piece], advance: Callable[[int], None]) -> Iterator[Piece]:
    """The same pieces, their bytes told once they are dealt with."""
    for piece in pieces:
        yield piece
        advance(piece.values.nbytes)


def _experiment(found: Imported, source: Path, name: str, folder: Path, overrides: list[tuple[str, str]]) -> Experiment:
    """The config of the run directory; writes the tokenizer into `folder`."""
    if found.tokenizer is not None:
        (folder / TOKENIZER).write_text(found.tokenizer, encoding="utf-8")
        # Padding counts nowhere: any token will do where none is named, and a new id may be one too many for the model.
        pad = found.special.get("pad") or found.special.get("eos", "")
        tokenizer = TokenizerFile(str(folder / TOKENIZER), **(found.special | {"pad": pad})).pinned()
    else:
        log.warning("%s has no tokenizer that is read: text needs one, see data.tokenizer", source)
        tokenizer = TokenIds(found.model.vocab_size, **found.ids)
    if tokenizer.vocab_size > found.model.vocab_size:
        fix = f"its tokenizer needs {tokenizer.vocab_size} tokens"
        raise ConfigError("vocab_size", found.model.vocab_size, fix)
    length = min(found.context, 1024)
    base = dict(
        name=name,
        description=f"imported from {source.name}",
        model=to_dict(found.model),
        data=to_dict(DataConfig(seq_len=length)) | {"tokenizer": to_dict(tokenizer)},
        train=to_dict(TrainConfig(steps=1)),
        evals=[to_dict(Perplexity(lengths=(length,), tokens=8192, batch_tokens=4096))],
    )
    return resolve(override(base, overrides) if overrides else base)


def check_layers(model: ModelConfig, source: ModelConfig) -> None:
    """Whether weights of the source are those of the config as it was changed.

    Raises:
      ConfigError: the changed model has other parameters.
    """
    abstract = lambda config: nn.meta.unbox(abstract_params(config))
    try:
        has = jax.eval_shape(lambda params: restack(params, source, model), abstract(source))
    except ConfigError as error:
        raise error.within("config.model") from None
    if differs := shape_difference(has, abstract(model)):
        name, has, needs = differs
        fix = f"the source has {has} at {name}, the changed model needs {needs}"
        raise ConfigError("config.model", ConfigError.ABSENT, fix)


@contextlib.contextmanager
def in_full(target: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `target` if all goes well and vanishes otherwise."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ConfigError("DST", str(target), f"no folder can be made there ({error.strerror})") from None
    try:
        yield folder
        os.chmod(folder, 0o755)  # temporary folders are made for their owner alone
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
