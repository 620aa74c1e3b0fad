"""What model a Hugging Face `config.json` describes: the plain Llama family, dense, with full attention.

Every key that would change a number is read or refused; none is passed over because it is not known here to matter.
Rotations are read by `hf_rope`, weights by `hf_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from irope_jax.attention.mask import Global
from irope_jax.checkpoint.hf_rope import rope_from_hf
from irope_jax.core.config import ConfigError, nearest
from irope_jax.model.config import LayerSpec, ModelConfig
from irope_jax.model.feed_forward import SwiGLU

FAMILIES = ("llama", "mistral")
"""Values of `model_type` whose plain form is read: RMSNorm before each part, SwiGLU, grouped queries, no biases."""

_MUST_BE = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "pretraining_tp": (1, None, 0),
    "attention_dropout": (0, 0.0),
}
"""Keys that must have one of these values where they are given."""

_ABSENT = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
}
"""What transformers 5 takes for a key that is not there, as far as it is not what is taken here anyway."""

_READ = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
    "original_max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "model_type",
)  # fmt: skip

_IDLE = (
    "architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "is_llama_config", "rope_interleaved", "output_attentions",
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
    "transformers.js_config", "layer_types",
)  # fmt: skip
"""Keys that change no number of a forward pass (`layer_types` and `rope_interleaved` are checked apart)."""


def model_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """The model of a parsed `config.json`.

    Raises:
      ConfigError: another family, a key that is not known, or a value that is not supported; names the field.
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        raise ConfigError("model_type", family, f"this family is not read; {nearest(str(family), FAMILIES)}")
    given, values = values, _ABSENT[family] | {**values}
    for key, allowed in _MUST_BE.items():
        if key in values and values[key] not in allowed:
            why = "is not supported" if key in given else "is what transformers takes for a key that is not there"
            raise ConfigError(key, values[key], f"{why}; only {' or '.join(map(repr, allowed))}")
    for key, value in values.items():
        if key not in _READ and key not in _IDLE and key not in _MUST_BE:
            raise ConfigError(key, value, "not a key whose meaning is known here; remove it if it changes no number")
    if values.get("rope_interleaved"):
        raise ConfigError("rope_interleaved", True, "is not supported; only False")
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ConfigError("layer_types", values["layer_types"], "only 'full_attention' is supported")
    size = lambda key, default=None: _whole(values, key, default)
    heads, width = size("num_attention_heads"), size("hidden_size")
    head_dim = values.get("head_dim")
    if head_dim is None:
        if width % heads:
            raise ConfigError("num_attention_heads", heads, f"does not divide hidden_size={width}; give head_dim")
        head_dim = width // heads
    eps = values.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, float | int) or not 0 < eps < 1:
        raise ConfigError("rms_norm_eps", eps, "expected a small positive number")
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ConfigError("tie_word_embeddings", tied, "expected true or false")
    rope = rope_from_hf(values)
    if rope.fraction != 1:
        fix = "transformers' Llama has no partial rotation: it ignores the key or fails on it; only 1"
        raise ConfigError("partial_rotary_factor", rope.fraction, fix)
    layer = LayerSpec(rope, Global(), SwiGLU(size("intermediate_size")))
    return ModelConfig(
        vocab_size=size("vocab_size"),
        d_model=width,
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_dim=_whole({"head_dim": head_dim}, "head_dim"),
        pattern=(layer,),
        output_head="tied" if tied else "untied",
        norm_eps=float(eps),
    )


def context_length(values: Mapping[str, Any]) -> int:
    """Tokens the model says it reads; of a config that `model_from_hf` reads."""
    return _whole(_ABSENT[values["model_type"]] | {**values}, "max_position_embeddings")


def _whole(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value < 2**31:
        raise ConfigError(key, value, "expected a whole number, 1 or more")
    return value
