"""`irope import`: a Hugging Face folder or a GGUF file becomes a run directory like any that was trained here.

Wiring: formats are `checkpoint`'s. Everything is written beside the target and renamed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from irope_jax.checkpoint.gguf import GgufFile
from irope_jax.checkpoint.hf_config import context_length, family_of, model_from_hf, text_values
from irope_jax.checkpoint.hf_names import LLAMA_IDLE
from irope_jax.checkpoint.hf_weights import SafetensorsFolder, layout_of, read_json, read_params, without_tied_head
from irope_jax.checkpoint.native import CheckpointError, Checkpoints
from irope_jax.core.config import ConfigError, fingerprint, override, to_dict
from irope_jax.core.hosts import configure_logging
from irope_jax.core.numerics import parameter_count, shape_difference
from irope_jax.core.progress import ProgressBar
from irope_jax.core.records import RunWriter
from irope_jax.data.config import DataConfig
from irope_jax.data.tokenizer import ByteTokenizer, TokenizerFile
from irope_jax.evals.perplexity import Perplexity
from irope_jax.experiment import Experiment, resolve
from irope_jax.model.config import ModelConfig, draw_layers
from irope_jax.model.decoder import init_params, restack
from irope_jax.train.loop import TrainConfig

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"


class SourceError(CheckpointError):
    """A source that cannot be imported: an argument of the command is wrong, not a run that broke."""

    exit_code = 2


@dataclass(frozen=True)
class Imported:
    """What a source holds.

    Attributes:
      model: what it describes.
      params: its weights, numpy, as our parameters.
      context: tokens it says it reads.
      tokenizer: text of a `tokenizer.json`, or None.
      special: texts of its `bos`, `eos` and `pad`.
    """

    model: ModelConfig
    params: dict[str, Any]
    context: int
    tokenizer: str | None
    special: dict[str, str]


def read_source(source: Path, *, quiet: bool = False) -> Imported:
    """A Hugging Face folder (config.json, safetensors) or a GGUF file of the Llama family.

    Raises:
      CheckpointError: nothing there, damaged, or tensors that do not fit the config.
      ConfigError: a config that says what is not supported; names the field.
    """
    if source.is_dir():
        return _read_folder(source, quiet)
    if source.suffix == ".gguf" and source.is_file():
        file = GgufFile(source)
        model = file.model()
        with ProgressBar("reading", file.tensor_count, quiet=quiet) as bar:
            params = file.params(model, bar.advance)
        return Imported(model, params, file.context_length, file.tokenizer_json(), file.special_tokens())
    fix = "name a folder with config.json and safetensors, or a .gguf file"
    raise CheckpointError(f"{source}: {'no such file or folder' if not source.exists() else 'not a model'}; {fix}")


def _read_folder(folder: Path, quiet: bool) -> Imported:
    values = read_json(folder / "config.json")
    try:
        sees, values = values.get("model_type") == "llama4", dict(text_values(values))
        model, context = model_from_hf(values), context_length(values)
    except ConfigError as error:
        raise error.within(str(folder / "config.json")) from None
    with SafetensorsFolder(folder) as tensors:
        if sees or any(name.startswith("language_model.") for name in tensors.names):
            log.info("%s: only the text part is read", folder)
            tensors.text_only()
        names = without_tied_head(tensors, model)
        rows = layout_of(family_of(values).tables, model, names)
        with ProgressBar("reading", len(names), quiet=quiet) as bar:
            params = read_params(
                rows, model, names, lambda name, _: tensors[name], idle=LLAMA_IDLE, where=folder, advance=bar.advance
            )
    if not (folder / TOKENIZER).is_file():
        return Imported(model, params, context, None, {})
    try:
        text = (folder / TOKENIZER).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / TOKENIZER}: not a readable text file ({error})") from None
    return Imported(model, params, context, text, _special_tokens(folder, values))


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
    except CheckpointError as error:
        raise SourceError(str(error)) from error
    with _in_full(target) as folder:
        experiment = _experiment(found, source, target.name, folder, overrides)
        params = _params_for(experiment.model, found)
        values = to_dict(experiment)
        if found.tokenizer is not None:
            values["data"]["tokenizer"]["path"] = str(target.absolute() / TOKENIZER)
        mark = fingerprint(values)
        with RunWriter(folder, values, mark) as writer:
            writer.event(0, "imported", source=str(source))
        with Checkpoints(folder, experiment.checkpoint, create=True) as checkpoints:
            meta = {"fingerprint": mark, "config": values, "model": values["model"], "imported_from": str(source)}
            checkpoints.save(0, {"params": params}, {}, meta)
    print(draw_layers(experiment.model))
    print(f"{parameter_count(found.params):,} parameters, {found.context:,} tokens of context: {target}")
    print(f"next: irope eval {target}   or train.init_from={str(target)!r} in a config")
    return 0


def _experiment(found: Imported, source: Path, name: str, folder: Path, overrides: list[tuple[str, str]]) -> Experiment:
    """The config of the run directory; writes the tokenizer into `folder`."""
    tokenizer = ByteTokenizer()
    if found.tokenizer is not None:
        (folder / TOKENIZER).write_text(found.tokenizer, encoding="utf-8")
        # Padding counts nowhere: any token will do where none is named, and a new id may be one too many for the model.
        pad = found.special.get("pad") or found.special.get("eos", "")
        tokenizer = TokenizerFile(str(folder / TOKENIZER), **(found.special | {"pad": pad})).pinned()
    else:
        log.warning("%s has no tokenizer that is read; text is taken as bytes, which it was not trained on", source)
    if tokenizer.vocab_size > found.model.vocab_size:
        what = "its tokenizer" if found.tokenizer else "without a tokenizer.json, text as bytes"
        raise ConfigError("vocab_size", found.model.vocab_size, f"{what} needs {tokenizer.vocab_size} tokens")
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


def _params_for(model: ModelConfig, found: Imported) -> Any:
    """What was read, stacked for the config as it was changed.

    Raises:
      ConfigError: the changed model has other parameters.
    """
    try:
        params = restack(found.params, found.model, model)
    except ConfigError as error:
        raise error.within("config.model") from None
    wanted = jax.eval_shape(lambda: nn.meta.unbox(init_params(model, jax.random.key(0))))
    if differs := shape_difference(params, wanted):
        name, has, needs = differs
        fix = f"the source has {has} at {name}, the changed model needs {needs}"
        raise ConfigError("config.model", ConfigError.ABSENT, fix)
    return params


@contextlib.contextmanager
def _in_full(target: Path) -> Iterator[Path]:
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
