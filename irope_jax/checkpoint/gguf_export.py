"""Our parameters as a GGUF file that llama.cpp loads, block by block: no tensor need be in memory as a whole.

Header and list of tensors are the `gguf` library's. It writes numbers that are in memory, so those are written here.
What the header says is read again as an import reads it: the first field that comes back as something else is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from irope_jax.attention.mask import Global
from irope_jax.checkpoint.gguf import gguf_library
from irope_jax.checkpoint.gguf_models import (
    ARCHITECTURES,
    FREQUENCY_FACTORS,
    UNNORMED_EXPERTS,
    Header,
    as_in_the_file,
    model_of,
    single,
)
from irope_jax.checkpoint.hf_export import FORMATS, Writing
from irope_jax.checkpoint.hf_places import Place, wanted_tensors
from irope_jax.checkpoint.hf_writers import refuse_differences
from irope_jax.checkpoint.streams import Keys
from irope_jax.core.config import ConfigError, nearest
from irope_jax.model.config import ModelConfig
from irope_jax.model.moe import MoE
from irope_jax.position import encoding
from irope_jax.position.rope import Frequencies
from irope_jax.position.rotary import RoPE
from irope_jax.position.scaling import Linear, LongRoPE, Unscaled, YaRN

FAMILIES = {"llama": "llama", "llama4_text": "llama4"}
"""Architectures by the `model_type` of the same in Hugging Face."""

_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}
"""`general.file_type`, a label."""


def model_to_gguf(model: ModelConfig, context: int, family: str | None = None) -> tuple[Header, ModelConfig]:
    """`(header, there)`: keys that say this model, and the model that reading them gives; it computes the same.

    Args:
      model: what is to be said.
      context: tokens it is to say it reads.
      family: one of `FAMILIES`; None takes llama for a model whose layers all turn and see everything.

    Raises:
      ConfigError: something that llama.cpp has no words for; names the field.
    """
    if family is not None and family not in FAMILIES:
        raise ConfigError("--family", family, f"a GGUF file is written of none such; {nearest(family, FAMILIES)}")
    if context < 1:
        raise ConfigError("--context", context, "tokens that the file says it reads; use 1 or more")
    plain = all(isinstance(layer.mask, Global) and encoding.rotation(layer.position) for layer in model.layers)
    arch = FAMILIES[family or ("llama" if plain else "llama4_text")]
    who, remedy = f"llama.cpp's {arch}", "change it, or export a Hugging Face folder"
    said = lambda rope, head_dim: _rotation_said(rope, head_dim, who)
    first = next((i for i, layer in enumerate(model.layers) if encoding.rotation(layer.position)), 0)
    rope = encoding.rotation(model.layers[first].position) or RoPE()
    try:
        said(rope, model.head_dim)
        scaling, factors = _scaling(rope, model.head_dim, normed=model.layers[first].qk_norm == "rms")
    except ConfigError as error:
        raise error.within(f"config.model.pattern.{first % len(model.pattern)}.position") from None
    values = _common(model, context, rope) | scaling | (_llama4(model) if arch == "llama4" else {})
    fields = {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in values.items()}
    header = Header("what would be written", fields, model.vocab_size, model.output_head == "untied", factors)
    there = model_of(header)
    # numbers of a header are float32
    refuse_differences(replace(model, norm_eps=single(model.norm_eps)), there, said, who, remedy)
    try:
        wanted_tensors(ARCHITECTURES[arch].rows, model)
    except ConfigError as error:
        raise ConfigError("config.model", error.value, f"{who} has no such parameter") from None
    return header, as_in_the_file(there)


def _common(model: ModelConfig, context: int, rope: RoPE) -> dict[str, Any]:
    dense = next((layer.ffn.hidden_dim for layer in model.layers if not isinstance(layer.ffn, MoE)), None)
    return {
        "vocab_size": model.vocab_size,
        "context_length": context,
        "embedding_length": model.d_model,
        "block_count": model.num_layers,
        "feed_forward_length": dense or _mixture(model).hidden_dim,
        "attention.head_count": model.num_heads,
        "attention.head_count_kv": model.num_kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": single(model.norm_eps),
        "rope.dimension_count": model.head_dim,
        "rope.freq_base": single(rope.theta),
    }


def _mixture(model: ModelConfig) -> MoE | None:
    return next((layer.ffn for layer in model.layers if isinstance(layer.ffn, MoE)), None)


def _llama4(model: ModelConfig) -> dict[str, Any]:
    """llama.cpp loads no Llama 4 without experts, and tells by their number whether q and k are normed.

    So a dense model says that it has one expert, or as many as Maverick if it norms none, from a layer on that is past
    its last: nothing of a mixture is then loaded. Sliding windows are not mentioned: 0 would turn chunks off, and the
    rotation of the last layer; anything else is taken for 8192.
    """
    mixed = [i for i, layer in enumerate(model.layers) if isinstance(layer.ffn, MoE)]
    mixture = _mixture(model)
    if mixture is None:
        normed = any(layer.qk_norm == "rms" for layer in model.layers)
        mixture = MoE(1 if normed else UNNORMED_EXPERTS, model.layers[0].ffn.hidden_dim)
    return {
        "expert_count": mixture.num_experts,
        "expert_used_count": mixture.top_k,
        "expert_feed_forward_length": mixture.hidden_dim,
        "interleave_moe_layer_step": mixed[0] + 1 if mixed else model.num_layers + 1,
    }


def _scaling(rope: RoPE, head_dim: int, normed: bool) -> tuple[dict[str, Any], tuple[float, ...] | None]:
    """Keys of a rotation, or factors for every pair where it has none.

    Keys of YaRN also multiply q and k by its attention factor, of which a norm after the rotation leaves nothing.
    """
    magnified = normed or _magnitude(rope, head_dim) != 1
    match rope.scaling:
        case Unscaled():
            return {"rope.scaling.type": "none"}, None
        case Linear(factor):
            return {"rope.scaling.type": "linear", "rope.scaling.factor": single(factor)}, None
        case YaRN(factor, length, beta_fast=32, beta_slow=1, truncate=True) if magnified:
            keys = {"type": "yarn", "factor": single(factor), "original_context_length": length}
            return {f"rope.scaling.{key}": value for key, value in keys.items()}, None
    return {"rope.scaling.type": "none"}, _factors(rope, head_dim)


def _factors(rope: RoPE, head_dim: int) -> tuple[float, ...]:
    """By what the frequency of each pair is divided, as float32."""
    plain, scaled = Frequencies.geometric(head_dim, rope.theta), rope.scaling.frequencies(head_dim, rope.theta)
    return tuple(float(factor) for factor in (plain.inv_freq / scaled.inv_freq).astype(np.float32))


def _magnitude(rope: RoPE, head_dim: int) -> float:
    """What the scaling multiplies q and k by; the logits get its square."""
    return single(math.sqrt(rope.logit_factor(head_dim)))


def _rotation_said(rope: RoPE, head_dim: int, who: str) -> RoPE:
    """A rotation by its numbers: all that turn alike are one.

    Raises:
      ConfigError: frequencies that depend on the text, or stand still.
    """
    if rope.fraction != 1:
        raise ConfigError("fraction", rope.fraction, f"{who} turns whole heads; only 1")
    if rope.follows_length:
        shorter, longer = getattr(rope.scaling, "short_factor", None), getattr(rope.scaling, "long_factor", ())
        if shorter is None or (shorter or (1.0,) * len(longer)) != longer or rope.scaling.first_tokens:
            fix = f"{who} has one set of frequencies for texts of all lengths; choose a scaling that has one"
            raise ConfigError("scaling.kind", rope.scaling.kind, fix)
    factors = _factors(rope, head_dim)
    scaling = LongRoPE(2, 1.0, factors, factors, attention_factor=_magnitude(rope, head_dim))
    return RoPE(single(rope.theta), scaling, blur=rope.blur)


@dataclass(frozen=True)
class GgufWriting:
    """A file to be written.

    Attributes:
      header: `model_to_gguf`'s.
      writing: where the numbers come from, as `hf_export` has it; its `there` is `model_to_gguf`'s too.
      name: of the model.
      tokenizer: keys below `tokenizer.`.
    """

    header: Header
    writing: Writing
    name: str
    tokenizer: Mapping[str, Any]

    def tensors(self) -> list[tuple[str, list[Place]]]:
        """All of them, in the order in which they are written."""
        return list(self.writing.tensors().items())

    def of(self, name: str, places: Sequence[Place]) -> Writing:
        """How a tensor is written: vectors and routers are float32 in every file, as llama.cpp reads no other."""
        vector = len(self.writing.shape(places)) == 1
        return replace(self.writing, dtype="float32") if vector or ".ffn_gate_inp." in name else self.writing

    def dtypes(self) -> dict[Keys, np.dtype]:
        """Number formats of our parameters in the file."""
        ours = self.writing.ours
        return {place.path(ours): self.of(name, places).numbers for name, places in self.tensors() for place in places}

    @property
    def fields(self) -> dict[str, Any]:
        """All keys."""
        general = {"type": "model", "name": self.name, "file_type": _FILE_TYPES[self.writing.dtype]}
        return self.header.fields | {f"general.{key}": value for key, value in general.items()} | {**self.tokenizer}


def write_gguf(path: Path, what: GgufWriting, advance: Callable[[int], None] = lambda _: None) -> int:
    """The whole file; returns the number of its tensors.

    Args:
      advance: told the bytes of every block that is written.

    Raises:
      CheckpointError: a number that the format cannot hold, or the library is missing.
    """
    gguf = gguf_library("writing")
    writer = gguf.GGUFWriter(path, what.header.arch)
    for key, value in what.fields.items():
        if key != "general.architecture":  # the writer's own
            _add(writer, key, value)
    factors = None if what.header.factors is None else np.array(what.header.factors, np.float32)
    if factors is not None:
        writer.add_tensor_info(FREQUENCY_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    tensors = what.tensors()
    for name, places in tensors:
        writing = what.of(name, places)
        shape, numbers = writing.shape(places), writing.numbers
        kind = gguf.GGMLQuantizationType[FORMATS[writing.dtype]]
        writer.add_tensor_info(name, shape, numbers, math.prod(shape) * numbers.itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "ab") as file:
        pad = lambda: file.write(b"\0" * (-file.tell() % writer.data_alignment))
        pad()
        if factors is not None:
            file.write(factors.tobytes())
            pad()
        for name, places in tensors:
            for block in what.of(name, places).blocks(name, places):
                file.write(np.ascontiguousarray(block).view(np.uint8).reshape(-1))
                advance(block.nbytes)
            pad()
    return len(tensors) + (factors is not None)


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)
