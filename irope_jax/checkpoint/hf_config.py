"""What model a Hugging Face `config.json` describes, of the families in `hf_families`.

Every key that would change a number is read or refused; none is passed over because it is not known here to matter.
Rotations are read by `hf_rope`, weights by `hf_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from irope_jax.checkpoint.hf_families import FAMILIES, Family, Values
from irope_jax.core.config import ConfigError, nearest
from irope_jax.model.config import ModelConfig, shortest_period

_MUST_BE = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "attention_dropout": (0, 0.0),
    "rope_interleaved": (None, False),
}
"""Keys that must have one of these values where they are given, whatever the family."""

_ABSENT = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
"""What transformers takes for a key that is not there, where a family says nothing else."""

_READ = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
    "original_max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "model_type",
)  # fmt: skip

IDLE = (
    "architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "is_llama_config", "output_attentions",
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
    "transformers.js_config", "layer_types", "output_router_logits", "pretraining_tp", "mlp_bias", "max_window_layers",
    "router_jitter_noise", "for_llm_compressor",
)  # fmt: skip
"""Keys that change no number of a forward pass (some are checked apart where a family has them)."""


def text_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the text model: a Llama 4 that also sees holds it as `text_config`."""
    if values.get("model_type") != "llama4":
        return values
    text = values.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError("text_config", text, "a llama4 config describes its text model here; expected an object")
    return {"model_type": "llama4_text", **text}


def family_of(values: Mapping[str, Any]) -> Family:
    """The entry of a config's `model_type`.

    Raises:
      ConfigError: it is not read.
    """
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError("model_type", family, f"this family is not read; {nearest(str(family), FAMILIES)}")
    return FAMILIES[family]


def model_from_hf(given: Mapping[str, Any]) -> ModelConfig:
    """The model of a parsed `config.json` (of its text part: `text_values`).

    Raises:
      ConfigError: another family, a key that is not known, or a value that is not supported; names the field.
    """
    family = family_of(given)
    values = Values(given, _ABSENT | {**family.absent})
    for key, allowed in (_MUST_BE | {**family.must_be}).items():
        if key in values.all and not _among(values.all[key], allowed):
            why = "is not supported" if key in given else "is what transformers takes for a key that is not there"
            raise ConfigError(key, values.all[key], f"{why}; only {' or '.join(map(repr, allowed))}")
    for key, value in given.items():
        if key not in _READ and key not in IDLE and key not in _MUST_BE and key not in {*family.read, *family.must_be}:
            raise ConfigError(key, value, "not a key whose meaning is known here; remove it if it changes no number")
    kinds = given.get("layer_types") or []
    if "layer_types" not in family.read and (not isinstance(kinds, list) or {*map(str, kinds)} - {"full_attention"}):
        raise ConfigError("layer_types", given["layer_types"], "only 'full_attention' is supported")
    heads, width = values.whole("num_attention_heads"), values.whole("hidden_size")
    if values.get("head_dim") is None and width % heads:
        raise ConfigError("num_attention_heads", heads, f"does not divide hidden_size={width}; give head_dim")
    return ModelConfig(
        vocab_size=values.whole("vocab_size"),
        d_model=width,
        num_layers=values.whole("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=values.whole("num_key_value_heads", heads),
        head_dim=values.whole("head_dim", width // heads),
        pattern=shortest_period(family.layers(values)),
        output_head="tied" if values.flag("tie_word_embeddings") else "untied",
        norm_eps=values.number(family.eps, 0, 1),
        **family.options(values),
    )


def _among(value: Any, allowed: tuple) -> bool:
    """Whether it is one of them, of the same type: 0 is not False."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def context_length(values: Mapping[str, Any]) -> int:
    """Tokens the model says it reads; of a config that `model_from_hf` reads."""
    return Values(values, family_of(values).absent).whole("max_position_embeddings")
