"""The whole run, resolved into one frozen `Experiment`. After `resolve` no dictionary and no flag exists.

Config files are Python (`get_config(arg) -> ml_collections.ConfigDict`): running one runs its code. A resolved config,
such as `config.json` in a run directory, is plain data and can be read from anyone.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from irope_jax.checkpoint.native import CheckpointConfig
from irope_jax.context.layout import ContextLayout
from irope_jax.core.config import ConfigError, from_dict, nearest, override, to_dict
from irope_jax.core.mirrors import WandbConfig
from irope_jax.core.records import RecordError
from irope_jax.data.pipeline import DataConfig
from irope_jax.evals.registry import EvalSpec
from irope_jax.model.config import ModelConfig
from irope_jax.model.cost import abstract_params
from irope_jax.sharding.mesh import MeshConfig, abstract_mesh
from irope_jax.sharding.rules import tree_shardings
from irope_jax.train.curriculum import Stage
from irope_jax.train.loop import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run: what is trained, on what, how, where, and what is measured.

    Attributes:
      name: short name, the label of the run in reports.
      description: a sentence or two that a report prints beside the name: what this run is and how it was trained.
      seed: of the initial parameters; the order of the data has its own in `data.seed`.
      model: layers and widths.
      data: documents, lengths, batches.
      train: steps and optimizer.
      mesh: devices.
      checkpoint: when to save.
      evals: evaluations, run on schedule in training, at its end, and by `irope eval`.
      stages: what changes while it trains, one stage after the other, each from the values the one before left;
        `train.steps` then counts nothing. None is a run of one piece.
      wandb: Weights & Biases to send the records to as well; None sends nothing.
    """

    name: str
    description: str = ""
    seed: int = 0
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evals: tuple[EvalSpec, ...] = ()
    stages: tuple[Stage, ...] = ()
    wandb: WandbConfig | None = None

    def __post_init__(self):
        need = self.data.tokenizer.vocab_size
        if self.model.vocab_size < need:
            raise ConfigError("model.vocab_size", self.model.vocab_size, f"the tokenizer needs at least {need}")
        if self.data.batch_size % self.train.accumulate:
            raise ConfigError(
                "train.accumulate", self.train.accumulate, f"does not divide data.batch_size={self.data.batch_size}"
            )
        for i, evaluation in enumerate(self.evals):
            if evaluation.name in [e.name for e in self.evals[:i]]:
                raise ConfigError(f"evals.{i}.name", evaluation.name, "another evaluation has this name; rename one")
            try:
                evaluation.check(self.data.tokenizer)
            except ConfigError as error:
                raise error.within("data" if error.field.startswith("tokenizer") else f"evals.{i}") from None


def check_devices(experiment: Experiment, device_count: int) -> MeshConfig:
    """The mesh filled in for `device_count` devices, with every size that must divide by it checked.

    Raises:
      ConfigError: naming the field, its value and the fix.
    """
    try:
        mesh = experiment.mesh.fill(device_count)
    except ConfigError as error:
        raise error.within("config.mesh") from None
    model, data, train = experiment.model, experiment.data, experiment.train
    layout = ContextLayout(model.context.layout, mesh.context)
    rules = [
        (
            "data.batch_size",
            data.batch_size,
            train.accumulate * mesh.batch_parts,
            "train.accumulate x data x fsdp x expert",
        ),
        ("data.seq_len", data.seq_len, layout.multiple, f"mesh.context in {layout.kind} order"),
    ]
    for i, evaluation in enumerate(experiment.evals):
        rules += [(f"evals.{i}.lengths", length, mesh.context, "mesh.context") for length in evaluation.lengths]
    for field, size, parts, why in rules:
        if size % parts:
            raise ConfigError(f"config.{field}", size, f"must be a multiple of {why} = {parts}; {near(size, parts)}")
    try:
        tree_shardings(abstract_params(model), abstract_mesh(mesh))
    except ConfigError as error:
        raise error.within("config") from None
    return mesh


def near(size: int, parts: int) -> str:
    below, above = size // parts * parts, -(-size // parts) * parts
    return f"try {above}" if below == 0 else f"try {below} or {above}"


def resolve(values: Mapping[str, Any], overrides: Iterable[tuple[str, str]] = ()) -> Experiment:
    """Nested values (a `ConfigDict`, parsed JSON) and `a.b = text` overrides to an `Experiment`.

    Raises:
      ConfigError: one line naming the field, its value and the fix.
    """
    experiment = from_dict(Experiment, values)
    overrides = list(overrides)
    return from_dict(Experiment, override(to_dict(experiment), overrides)) if overrides else experiment


def load_config(reference: str) -> dict[str, Any]:
    """Nested plain values of `path/to/config.py`, `path/to/config.py:arg`, or a resolved `config.json`.

    Raises:
      ConfigError: no such file, no `get_config`, an argument it does not take, or an error inside it.
    """
    path_text, _, argument = reference.partition(":")
    path = Path(path_text)
    if path.suffix not in (".py", ".json"):
        raise ConfigError("config", reference, "name a .py file with get_config(), or a resolved config.json")
    if not path.is_file():
        options = [str(p) for p in sorted(path.parent.glob(f"*{path.suffix}"))] if path.parent.is_dir() else []
        hint = nearest(str(path), options) if options else f"{path.parent} has no {path.suffix} file"
        raise ConfigError("config", reference, f"no such file; {hint}")
    if path.suffix == ".json":
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ConfigError("config", reference, f"not a readable JSON file ({error})") from None
        if not isinstance(values, dict):
            raise ConfigError("config", reference, "expected a JSON object")
        return values["config"] if isinstance(values.get("config"), dict) else values
    try:
        values = _call_get_config(path, argument)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError("config", reference, f"failed while running: {type(error).__name__}: {error}") from error
    return _plain(values)


def run_config(directory: Path) -> dict[str, Any]:
    """Nested plain values of the config that a run directory was made with.

    Raises:
      RecordError: it is not a run directory.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise RecordError(f"{directory}: not a run directory (no config.json); name one of `irope train` or `import`")
    return load_config(str(path))


def run_file(path: Path) -> ModuleType:
    """The module of a config or grid file, which is run; it may build on its neighbours."""
    spec = importlib.util.spec_from_file_location(f"irope_file_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.absolute()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent.absolute()))
    return module


def _call_get_config(path: Path, argument: str) -> Any:
    module = run_file(path)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError("config", str(path), "the file has no get_config(); define one that returns a ConfigDict")
    takes = len(inspect.signature(get_config).parameters)
    if argument and not takes:
        fix = "its get_config() takes no argument; leave out what follows the colon"
        raise ConfigError("config", f"{path}:{argument}", fix)
    return get_config(argument) if argument else get_config()


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
