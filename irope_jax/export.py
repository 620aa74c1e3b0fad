"""`irope export`: a run directory becomes a Hugging Face folder, or a GGUF file, that other programs load.

Wiring: formats are `checkpoint`'s. Everything is written beside the target and renamed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irope_jax.checkpoint.gguf_export import GgufWriting, model_to_gguf, write_gguf
from irope_jax.checkpoint.gguf_models import ARCHITECTURES
from irope_jax.checkpoint.gguf_tokenizer import tokenizer_fields, without_tokenizer
from irope_jax.checkpoint.hf_export import Writing, write_weights
from irope_jax.checkpoint.hf_families import FAMILIES
from irope_jax.checkpoint.hf_weights import read_json
from irope_jax.checkpoint.hf_writers import model_to_hf
from irope_jax.checkpoint.native import Checkpoints
from irope_jax.checkpoint.streams import Keys
from irope_jax.core.config import ConfigError, to_dict
from irope_jax.core.hosts import configure_logging
from irope_jax.core.progress import megabytes
from irope_jax.data.tokenizer import TokenizerFile
from irope_jax.data.tokenizer_json import tokenizer_files
from irope_jax.experiment import Experiment, resolve, run_config
from irope_jax.model.config import ModelConfig
from irope_jax.model.cost import parameter_counts
from irope_jax.stages import experiment_at
from irope_jax.transfer import KEPT, TOKENIZER, check_layers, in_full, read_source
from irope_jax.verify import compare, compare_gguf


@dataclass(frozen=True)
class Exported:
    """A run, as far as an export needs it.

    Attributes:
      experiment: its config, changed as the command line says.
      trained: the model whose parameters there are.
      arrays: those, by path.
      step: of the checkpoint.
      kept: files of the source that the run, or the one whose tokenizer it uses, was imported from; by name.
    """

    experiment: Experiment
    trained: ModelConfig
    arrays: dict[Keys, Any]
    step: int
    kept: dict[str, bytes]

    @property
    def config(self) -> dict[str, Any]:
        """The source's config.json; empty without one."""
        return json.loads(self.kept["config.json"]) if "config.json" in self.kept else {}


def export_verb(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    configure_logging()
    directory, target = Path(args.run), Path(args.target)
    if os.path.lexists(target):
        raise ConfigError("DST", str(target), "is there already; choose another, or remove it")
    if args.shard_size <= 0:
        raise ConfigError("--shard-size", args.shard_size, "gigabytes of a file; use more than 0")
    if args.no_tokenizer and target.suffix != ".gguf":
        raise ConfigError("--no-tokenizer", True, "is for GGUF files; of a folder, remove tokenizer.json")
    trained = experiment_at(directory, resolve(run_config(directory)), args.step)
    experiment = resolve(to_dict(trained), overrides)
    check_layers(experiment.model, trained.model)
    with Checkpoints(directory) as checkpoints:
        step = checkpoints.latest if args.step is None else args.step
        found = Exported(experiment, trained.model, checkpoints.arrays(step), step, kept_files(directory, experiment))
        return (_write_gguf if target.suffix == ".gguf" else _write_folder)(found, target, args)


def kept_files(directory: Path, experiment: Experiment) -> dict[str, bytes]:
    """What an import kept beside the weights; a run that was trained from one finds it by its tokenizer."""
    places = [directory / KEPT]
    if isinstance(experiment.data.tokenizer, TokenizerFile):
        places.append(Path(experiment.data.tokenizer.path).expanduser().parent / KEPT)
    place = next((place for place in places if place.is_dir()), None)
    found = {} if place is None else {path.name: path.read_bytes() for path in sorted(place.iterdir())}
    if "config.json" in found:
        read_json(place / "config.json")
    return found


def _write_folder(found: Exported, target: Path, args: argparse.Namespace) -> int:
    model, tokenizer = found.experiment.model, found.experiment.data.tokenizer
    context = _context(found, args)
    config, there = model_to_hf(model, context, args.family, found.config)
    dtype = args.dtype or _dtype(found)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    # the key of transformers 5 and of 4, but where an imported config has one of them
    named = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype", "torch_dtype"]
    config = ids | config | dict.fromkeys(named, dtype)
    rows = FAMILIES[config["model_type"]].tables[0]
    writing = Writing(found.arrays, found.trained, there, rows, dtype)
    files = tokenizer_files(tokenizer, context)
    if "tokenizer_config.json" in found.kept:
        del files["tokenizer_config.json"]
    files |= {"generation_config.json": _as_json({key: config[key] for key in ids})}
    files |= {name: content for name, content in found.kept.items() if name != TOKENIZER}
    files |= {"config.json": _as_json(config)}
    total = sum(parameter_counts(model).values()) * writing.numbers.itemsize
    with in_full(target) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        with megabytes("writing", total) as advance:
            count = write_weights(folder, writing, int(args.shard_size * 1e9), advance)
        report = compare(folder, read_source(folder), writing) if args.verify else []
    print(f"{config['model_type']}, {count:,} tensors as {dtype}, step {found.step}: {target}")
    for line in report:
        print(line)
    return 0


def _write_gguf(found: Exported, target: Path, args: argparse.Namespace) -> int:
    model, tokenizer = found.experiment.model, found.experiment.data.tokenizer
    context = _context(found, args)
    header, there = model_to_gguf(model, context, args.family)
    if args.no_tokenizer:
        fields = without_tokenizer(tokenizer)
    else:
        fields = tokenizer_fields(tokenizer, model.vocab_size, found.kept)
    # of what is not float16 already, llama.cpp's converter makes bfloat16
    dtype = args.dtype or ("float16" if _dtype(found) == "float16" else "bfloat16")
    writing = Writing(found.arrays, found.trained, there, ARCHITECTURES[header.arch].rows, dtype)
    what = GgufWriting(header, writing, found.experiment.name, fields)
    total = sum(parameter_counts(model).values()) * writing.numbers.itemsize
    with _file_in_full(target) as path:
        with megabytes("writing", total) as advance:
            count = write_gguf(path, what, advance)
        report = compare_gguf(path, read_source(path), what, tokenizer) if args.verify else []
    print(f"{header.arch}, {count:,} tensors as {dtype}, context {context:,}, step {found.step}: {target}")
    for line in report:
        print(line)
    return 0


@contextlib.contextmanager
def _file_in_full(target: Path) -> Iterator[Path]:
    """A file to write, which becomes `target` if all goes well and vanishes otherwise."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise ConfigError("DST", str(target), f"no file can be made there ({error.strerror})") from None
    os.close(number)
    path = Path(name)
    try:
        yield path
        path.chmod(0o644)  # temporary files are made for their owner alone
        path.rename(target)
    finally:
        path.unlink(missing_ok=True)


def _context(found: Exported, args: argparse.Namespace) -> int:
    """Tokens that the export says it reads."""
    return args.context or found.config.get("max_position_embeddings") or found.experiment.data.seq_len


def _dtype(found: Exported) -> str:
    """Number format of the weights, as imported or trained."""
    config = found.config
    return config.get("dtype") or config.get("torch_dtype") or found.experiment.model.precision.params


def _as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
