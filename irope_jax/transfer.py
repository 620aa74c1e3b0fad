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

from irope_jax.checkpoint.gguf import GgufFile
from irope_jax.checkpoint.hf_config import context_length, model_from_hf
from irope_jax.checkpoint.hf_names import LLAMA, LLAMA_IDLE
from irope_jax.checkpoint.hf_weights import SafetensorsFolder, drop_tied_head, read_json, read_params
from irope_jax.checkpoint.native import CheckpointError, Checkpoints
from irope_jax.core.config import ConfigError, fingerprint, override, to_dict
from irope_jax.core.hosts import configure_logging
from irope_jax.core.numerics import parameter_count
from irope_jax.core.progress import ProgressBar
from irope_jax.core.records import RunWriter
from irope_jax.data.config import DataConfig
from irope_jax.data.tokenizer import ByteTokenizer, TokenizerFile
from irope_jax.evals.perplexity import Perplexity
from irope_jax.experiment import Experiment, resolve
from irope_jax.model.config import ModelConfig, draw_layers
from irope_jax.train.loop import TrainConfig

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"


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
        model, context = model_from_hf(values), context_length(values)
    except ConfigError as error:
        raise error.within(str(folder / "config.json")) from None
    with SafetensorsFolder(folder) as tensors:
        names = drop_tied_head(tensors.names, values)
        with ProgressBar("reading", len(names), quiet=quiet) as bar:
            params = read_params(
                LLAMA, model, names, lambda name, _: tensors[name], idle=LLAMA_IDLE, where=folder, advance=bar.advance
            )
    tokenizer, special = folder / "tokenizer.json", {}
    if (folder / "tokenizer_config.json").is_file():
        given = read_json(folder / "tokenizer_config.json")
        for name in ("bos", "eos", "pad"):
            token = given.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            special |= {name: token} if isinstance(token, str) else {}
    text = tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else None
    return Imported(model, params, context, text, special)


def import_verb(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    configure_logging()
    source, target = Path(args.source), Path(args.target)
    if target.exists():
        raise ConfigError("DST", str(target), "is there already; choose another, or remove it")
    found = read_source(source)
    with _in_full(target) as folder:
        experiment = _experiment(found, source, target.name, folder, overrides)
        values = to_dict(experiment)
        if found.tokenizer is not None:
            values["data"]["tokenizer"]["path"] = str(target.absolute() / TOKENIZER)
        mark = fingerprint(values)
        with RunWriter(folder, values, mark) as writer:
            writer.event(0, "imported", source=str(source))
        with Checkpoints(folder, experiment.checkpoint, create=True) as checkpoints:
            meta = {"fingerprint": mark, "config": values, "model": values["model"], "imported_from": str(source)}
            checkpoints.save(0, {"params": found.params}, {}, meta)
    print(draw_layers(experiment.model))
    print(f"{parameter_count(found.params):,} parameters, {found.context:,} tokens of context: {target}")
    print(f"next: irope eval {target}   or train.init_from={str(target)!r} in a config")
    return 0


def _experiment(
    found: Imported, source: Path, name: str, folder: Path, overrides: list[tuple[str, str]]
) -> Experiment:
    """The config of the run directory; writes the tokenizer into `folder`."""
    tokenizer = ByteTokenizer()
    if found.tokenizer is not None:
        (folder / TOKENIZER).write_text(found.tokenizer, encoding="utf-8")
        tokenizer = TokenizerFile(str(folder / TOKENIZER), **found.special).pinned()
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


@contextlib.contextmanager
def _in_full(target: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `target` if all goes well and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder
        os.chmod(folder, 0o755)  # temporary folders are made for their owner alone
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
