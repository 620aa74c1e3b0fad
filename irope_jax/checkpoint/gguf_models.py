"""Headers of GGUF files and the models they say: the architectures `llama` and `llama4` of llama.cpp.

Facts are of llama.cpp: `load_hparams` of src/llama-model.cpp, src/models/llama.cpp and src/models/llama4.cpp. Much of
Llama 4 has no key there but is written into the program; such numbers stand here by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from irope_jax.attention.mask import Chunked, Global
from irope_jax.checkpoint.hf_names import LLAMA4_GGUF, LLAMA_GGUF, Row
from irope_jax.checkpoint.native import CheckpointError
from irope_jax.core.config import ConfigError
from irope_jax.model.config import LayerSpec, ModelConfig, shortest_period
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.model.moe import MoE
from irope_jax.position.encoding import NoPE, RoPE
from irope_jax.position.scaling import Linear, LongRoPE, RopeScaling, Unscaled, YaRN
from irope_jax.position.temperature import LogFloor

CHUNK = 8192
"""Llama 4's chunks; `attention.sliding_window` may stand there, and whatever it says but 0, llama.cpp takes this."""

INTERVAL = 4
"""Every layer of this number sees everything and does not rotate."""

TEMPERATURE = LogFloor(floor_scale=8192, attn_scale=0.1, offset=1)
"""Of those layers."""

UNNORMED_EXPERTS = 128
"""Maverick has so many and norms no q and k, and this is how llama.cpp tells: any other number of experts norms."""

FREQUENCY_FACTORS = "rope_freqs.weight"
"""A tensor by whose entries the frequencies are divided; Llama 3's scaling comes as numbers."""

_READ = (
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout",
)  # fmt: skip
"""Keys below the architecture that are read, or change no number: a label, and the vocabulary that a tensor shows."""

_MUST_BE = {
    "attention.causal": True,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_beta_fast": 32,
    "rope.scaling.yarn_beta_slow": 1,
}
"""Keys that must have this value where they are given; what is in neither table is refused."""


@dataclass(frozen=True)
class Header:
    """What a file says before its weights.

    Attributes:
      where: for messages.
      fields: values by their whole key.
      vocab_size: rows of the embedding; None if there is no such matrix.
      untied: whether there is an output matrix.
      factors: those of `FREQUENCY_FACTORS`, if it is there.
    """

    where: str
    fields: Mapping[str, Any]
    vocab_size: int | None = None
    untied: bool = False
    factors: tuple[float, ...] | None = None

    @property
    def arch(self) -> str:
        return str(self.fields.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """A value below the architecture."""
        return self.fields.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{self.where}: {self.arch}.{key} is {value!r}, expected a finite number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A number that the file has as float32: the shortest one that is the same there."""
        return single(self.number(key, default))

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.number(key, default)
        if value != int(value) or value < least:
            where = f"{self.where}: {self.arch}.{key}"
            raise CheckpointError(f"{where} is {value!r}, expected a whole number, {least} or more")
        return int(value)


def single(value: float) -> float:
    """The shortest number that is the same as float32."""
    return float(str(np.float32(value)))


@dataclass(frozen=True)
class Architecture:
    """How files of one `general.architecture` are read.

    Attributes:
      layers: all layers, from a header and its rotation; entries of heads paired as our own models have it.
      rows: names of tensors.
      read: keys that are read beside those of all.
      must_be: keys that must have this value where they are given.
    """

    layers: Callable[[Header, RoPE], tuple[LayerSpec, ...]]
    rows: Sequence[Row]
    read: tuple[str, ...] = ()
    must_be: Mapping[str, Any] = field(default_factory=dict)


def _llama(header: Header, rope: RoPE) -> tuple[LayerSpec, ...]:
    """Paired by halves, as transformers has it."""
    return (LayerSpec(rope, Global(), SwiGLU(header.whole("feed_forward_length"))),) * header.whole("block_count")


def _llama4(header: Header, rope: RoPE) -> tuple[LayerSpec, ...]:
    """A mixture in every `interleave_moe_layer_step`th layer, none where that is 0 or more than there are layers."""
    experts, width = header.whole("expert_count"), header.whole("expert_feed_forward_length")
    step = header.whole("interleave_moe_layer_step", least=0)
    qk_norm, rope = "none" if experts == UNNORMED_EXPERTS else "rms", replace(rope, pairing="interleaved")
    if qk_norm == "rms" and isinstance(rope.scaling, YaRN):
        # llama.cpp multiplies cos and sin by it and then norms, so nothing of it is left
        rope = replace(rope, scaling=replace(rope.scaling, attention_factor=1.0))
    layers = []
    for i in range(header.whole("block_count")):
        ffn: SwiGLU | MoE
        if step and (i + 1) % step == 0:
            ffn = MoE(experts, width, header.whole("expert_used_count"), shared=SwiGLU(width))
        else:
            ffn = SwiGLU(header.whole("feed_forward_length"))
        if (i + 1) % INTERVAL:
            layers.append(LayerSpec(rope, Chunked(CHUNK), ffn, qk_norm=qk_norm))
        else:
            layers.append(LayerSpec(NoPE(), Global(), ffn, temperature=TEMPERATURE))
    return tuple(layers)


ARCHITECTURES = {
    "llama": Architecture(
        _llama,
        LLAMA_GGUF,
        must_be={"expert_count": 0, "expert_used_count": 0, "attention.sliding_window": 0},
    ),
    "llama4": Architecture(
        _llama4,
        LLAMA4_GGUF,
        read=("expert_count", "expert_used_count", "expert_feed_forward_length", "interleave_moe_layer_step"),
        must_be={
            "attention.sliding_window": CHUNK,
            "attention.sliding_window_pattern": INTERVAL,
            "expert_shared_count": 1,
            "expert_gating_func": 2,  # sigmoid
            "expert_weights_norm": False,
        },
    ),
}
"""By `general.architecture`."""


def check_keys(header: Header) -> None:
    """Raises `CheckpointError` if there is a key that changes the model in a way that is not known here."""
    if header.arch not in ARCHITECTURES:
        known = " and ".join(map(repr, ARCHITECTURES))
        raise CheckpointError(f"{header.where}: a model of architecture {header.arch!r}; only {known} are read")
    arch = ARCHITECTURES[header.arch]
    must_be = {**_MUST_BE, **arch.must_be}
    for name, value in header.fields.items():
        key = name.removeprefix(f"{header.arch}.")
        if key == name or key in _READ or key in arch.read:
            continue
        if key not in must_be:
            raise CheckpointError(f"{header.where}: {name} is {value!r}, a key whose meaning is not known here")
        if value != must_be[key]:
            raise CheckpointError(f"{header.where}: {name} is {value!r}; only {must_be[key]!r} is supported")


def model_of(header: Header) -> ModelConfig:
    """The model a header says.

    Raises:
      CheckpointError: numbers that make no model, or a rotation that is not known.
    """
    heads, width = header.whole("attention.head_count"), header.whole("embedding_length")
    head_dim = header.whole("attention.key_length", width // heads)
    if header.whole("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{header.where}: keys and values of different width are not supported")
    turned = header.whole("rope.dimension_count", head_dim)
    if turned != head_dim:
        raise CheckpointError(f"{header.where}: turns {turned} of {head_dim} entries; only whole heads are read")
    if header.vocab_size is None:
        raise CheckpointError(f"{header.where}: has no matrix token_embd.weight")
    try:
        rope = RoPE(header.real("rope.freq_base", 10000.0), _scaling(header))
        return ModelConfig(
            vocab_size=header.vocab_size,
            d_model=width,
            num_layers=header.whole("block_count"),
            num_heads=heads,
            num_kv_heads=header.whole("attention.head_count_kv", heads),
            head_dim=head_dim,
            pattern=shortest_period(ARCHITECTURES[header.arch].layers(header, rope)),
            output_head="untied" if header.untied else "tied",
            norm_eps=header.real("attention.layer_norm_rms_epsilon"),
        )
    except ConfigError as error:
        raise CheckpointError(f"{header.where}: {error}") from None


def _scaling(header: Header) -> RopeScaling:
    # a factor without a type (old files have only rope.scale_linear) is linear, and 0 says nothing
    kind = header.get("rope.scaling.type", "linear")
    factor = header.real("rope.scaling.factor", header.number("rope.scale_linear", 0)) or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(f"{header.where}: rope scaling {kind!r} is not known; none, linear and yarn are")
    if header.factors is not None:
        if kind != "none" and factor != 1:
            raise CheckpointError(f"{header.where}: both {FREQUENCY_FACTORS} and {kind} scaling; only one is read")
        return LongRoPE(
            header.whole("context_length"), 1.0, header.factors, header.factors, attention_policy="none"
        )  # no document is shorter than another here
    if kind == "none" or factor == 1:
        return Unscaled()
    if kind == "linear":
        return Linear(factor)
    return YaRN(factor, header.whole("rope.scaling.original_context_length"))


def as_in_the_file(model: ModelConfig) -> ModelConfig:
    """The same with entries of heads in the order in which both architectures have them: neighbours turn together."""
    layers = (
        replace(layer, position=replace(layer.position, pairing="interleaved"))
        if isinstance(layer.position, RoPE)
        else layer
        for layer in model.pattern
    )
    return replace(model, pattern=tuple(layers))
