"""A model as `config.json` of a Hugging Face family: the inverse of `hf_config`, checked by reading back.

A writer says what its family has keys for and does not look whether that is the whole model. Whether it is shows when
the config is read again: the first field that comes back as something else is named, so nothing is dropped unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from irope_jax.attention.mask import Chunked, Global, Sliding
from irope_jax.checkpoint.hf_config import IDLE, model_from_hf
from irope_jax.checkpoint.hf_families import CHUNKED, FAMILIES, FULL, SLIDING
from irope_jax.checkpoint.hf_places import wanted_tensors
from irope_jax.checkpoint.hf_rope import rope_from_hf, rope_to_hf
from irope_jax.context.strategy import ContextConfig
from irope_jax.core.config import ConfigError, nearest, to_dict
from irope_jax.core.types import Precision
from irope_jax.model.config import LayerSpec, ModelConfig
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.model.moe import MoE
from irope_jax.model.routing import Balance, SoftmaxRouter
from irope_jax.position import encoding
from irope_jax.position.rotary import RoPE
from irope_jax.position.temperature import LogFloor, LogN

Config = dict[str, Any]


def model_to_hf(
    model: ModelConfig, context: int, family: str | None = None, kept: Mapping[str, Any] | None = None
) -> tuple[Config, ModelConfig]:
    """`(config, there)`: the parsed `config.json` that says this model, and the model that reading it gives.

    `there` computes the same; it may pair the entries of a head differently, and says nothing of training.

    Args:
      model: what is to be said.
      context: tokens it is to say it reads, where no scaling decides that.
      family: a `model_type`; None takes the first that can say it, that of `kept` before others.
      kept: the config that the model was once imported with; where it still says this model it is given back as it
        was, else what changes no number is taken from it.

    Raises:
      ConfigError: something that the family, or no family, has words for; names the field.
    """
    if family is not None and family not in WRITERS:
        raise ConfigError("--family", family, f"no family that is written; {nearest(family, WRITERS)}")
    refusals: dict[str, ConfigError] = {}
    for name in (family,) if family else _candidates(model, kept):
        mine = kept if kept and kept.get("model_type") == name else {}
        try:
            if mine:
                same = {**mine, "max_position_embeddings": context}
                try:
                    return same, _says(same, model, name)
                except ConfigError:
                    pass  # it was changed since
            values = {"architectures": [WRITERS[name][0]], "model_type": name} | _common(model, context, name)
            values |= WRITERS[name][1](model)
            values = {key: value for key, value in mine.items() if key in IDLE} | values
            return values, _says(values, model, name)
        except ConfigError as error:
            refusals[name] = error
    (_, error), *others = refusals.items()
    fix = error.fix + (f" (tried in vain: {', '.join(name for name, _ in others)})" if others else "")
    raise ConfigError(error.field, error.value, fix)


def _candidates(model: ModelConfig, kept: Mapping[str, Any] | None) -> list[str]:
    """Families in the order to try: that of iRoPE first where layers see only a part, or do not turn."""
    plain = all(isinstance(layer.mask, Global) and encoding.rotation(layer.position) for layer in model.layers)
    first = ["llama" if plain else "llama4_text"]
    if kept and kept.get("model_type") in WRITERS:
        first.insert(0, kept["model_type"])
    return list(dict.fromkeys([*first, *WRITERS]))


def _says(values: Mapping[str, Any], model: ModelConfig, family: str) -> ModelConfig:
    """The model that a config says, which computes the same.

    Raises:
      ConfigError: it does not; names the first field that differs.
    """
    try:
        there = model_from_hf(values)
    except ConfigError as error:
        fix = f"{family} of Hugging Face would have to say {error.field}={error.value!r}, which it cannot: {error.fix}"
        raise ConfigError("config.model", ConfigError.ABSENT, fix) from None
    who, remedy = f"{family} of Hugging Face", "change it, or export as another --family"
    refuse_differences(model, there, _rope_said, who, remedy)
    try:
        wanted_tensors(FAMILIES[family].tables[0], model)
    except ConfigError as error:
        raise ConfigError("config.model", error.value, f"{family} of Hugging Face has no such parameter") from None
    return there


def refuse_differences(
    model: ModelConfig, there: ModelConfig, said: Callable[[RoPE, int], RoPE], who: str, remedy: str
) -> None:
    """Whether what a format says of a model computes the same; training and the order of pairs apart.

    Args:
      model: what was to be said.
      there: what reading it gives.
      said: a rotation and the width of heads -> the one form of all that are the same in this format.
      who: the format, and `remedy` what can be done, both for the message.

    Raises:
      ConfigError: it does not; names the first field that differs.
    """
    for index, (ours, theirs) in enumerate(zip(model.layers, there.layers)):
        path = f"config.model.pattern.{index % len(model.pattern)}"
        try:
            wanted = _layer_computes(ours, model.head_dim, said)
        except ConfigError as error:
            raise error.within(path) from None
        _refuse_difference(path, wanted, _layer_computes(theirs, there.head_dim, said), who, remedy)
    _refuse_difference("config.model", _rest_computes(model), _rest_computes(there), who, remedy)


def _rope_said(rope: RoPE, head_dim: int) -> RoPE:
    """There are several ways to say one scaling.

    Raises:
      ConfigError: a rotation for which transformers has no words.
    """
    return replace(rope_from_hf(rope_to_hf(replace(rope, pairing="half"), head_dim)), blur=rope.blur)


def _layer_computes(layer: LayerSpec, head_dim: int, said: Callable[[RoPE, int], RoPE]) -> Any:
    """What of a layer changes the numbers that a trained model gives, as plain values."""
    ffn, temperature, position = layer.ffn, layer.temperature, layer.position
    if isinstance(ffn, MoE):
        shared = replace(ffn.shared, chunk=None) if ffn.shared else None
        ffn = replace(ffn, shared=shared, balance=Balance(), exchange="auto")
    elif isinstance(ffn, SwiGLU):
        ffn = replace(ffn, chunk=None)
    if isinstance(temperature, LogFloor | LogN):
        temperature = replace(temperature, when="always")
    if isinstance(position, RoPE):
        try:
            position = said(position, head_dim)
        except ConfigError as error:
            raise error.within("position") from None
    return to_dict(replace(layer, ffn=ffn, temperature=temperature, position=position))


def _rest_computes(model: ModelConfig) -> dict[str, Any]:
    """The same of everything beside the layers."""
    trained = dict(init_std=0.02, embedding_init_std=None, residual_init_std=None, remat="none")
    where = dict(attention=None, context=ContextConfig(), precision=Precision())
    values = to_dict(replace(model, **trained, **where))
    return {key: value for key, value in values.items() if key != "pattern"}


def _refuse_difference(path: str, ours: Any, theirs: Any, who: str, remedy: str) -> None:
    """Raises `ConfigError` at the first value that differs."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in dict.fromkeys([*ours, *theirs]):  # kind comes first
            _refuse_difference(f"{path}.{key}", ours.get(key), theirs.get(key), who, remedy)
    elif ours != theirs:
        raise ConfigError(path, ours, f"{who} can only say {theirs!r} here; {remedy}")


def _common(model: ModelConfig, context: int, family: str) -> Config:
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        FAMILIES[family].eps: model.norm_eps,
        "tie_word_embeddings": model.output_head == "tied",
        "max_position_embeddings": context,
        "initializer_range": model.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def _rope(model: ModelConfig, layers: tuple[LayerSpec, ...] | None = None) -> Config:
    """Keys of transformers 5 and of 4 for the one rotation that these layers have."""
    rotations = [encoding.rotation(layer.position) for layer in layers or model.layers]
    rope = next((found for found in rotations if found is not None), RoPE())
    try:
        keys = rope_to_hf(replace(rope, pairing="half"), model.head_dim)
    except ConfigError as error:
        index = rotations.index(rope) % len(model.pattern)
        raise error.within(f"config.model.pattern.{index}.position") from None
    parameters = keys["rope_parameters"]
    old = None if parameters["rope_type"] == "default" else parameters
    return keys | {"rope_theta": parameters["rope_theta"], "rope_scaling": old}


def _dense(model: ModelConfig) -> int | None:
    """Width of the first dense layer; None if there is none, which reading back will tell."""
    return next((layer.ffn.hidden_dim for layer in model.layers if isinstance(layer.ffn, SwiGLU)), None)


def _mixture(model: ModelConfig) -> MoE:
    """The first mixture; of a model without any, one that no layer has."""
    return next((layer.ffn for layer in model.layers if isinstance(layer.ffn, MoE)), MoE(1, _dense(model) or 1))


def _window(model: ModelConfig) -> int | None:
    return next((layer.mask.size for layer in model.layers if isinstance(layer.mask, Sliding)), None)


def _kinds(model: ModelConfig, local: str = SLIDING) -> list[str]:
    """`layer_types` of a family that has one kind of local layer."""
    kind = {SLIDING: Sliding, CHUNKED: Chunked}[local]
    return [local if isinstance(layer.mask, kind) else FULL for layer in model.layers]


def _bias(model: ModelConfig) -> Config:
    return {"attention_bias": model.attention_bias == "all"}


def _llama(model: ModelConfig) -> Config:
    return _rope(model) | {"intermediate_size": _dense(model) or 1, "attention_bias": False, "mlp_bias": False}


def _mistral(model: ModelConfig) -> Config:
    return _rope(model) | {"intermediate_size": _dense(model) or 1, "sliding_window": _window(model)}


def _windows(model: ModelConfig) -> Config:
    """Of families whose layers may slide one by one; `max_window_layers` says how many do not, from the first."""
    kinds, window = _kinds(model), _window(model)
    full = kinds.index(SLIDING) if SLIDING in kinds else len(kinds)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": full,
        "layer_types": kinds,
    }


def _qwen2(model: ModelConfig) -> Config:
    return _rope(model) | _windows(model) | {"intermediate_size": _dense(model) or 1}


def _qwen3(model: ModelConfig) -> Config:
    return _qwen2(model) | _bias(model)


def _smollm3(model: ModelConfig) -> Config:
    window = _window(model)
    turns = [int(encoding.rotation(layer.position) is not None) for layer in model.layers]
    return {
        **_rope(model),
        **_bias(model),
        "intermediate_size": _dense(model) or 1,
        "mlp_bias": False,
        "no_rope_layers": turns,
        "no_rope_layer_interval": _interval(turns),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": _kinds(model),
    }


def _interval(turns: list[int]) -> int:
    """How many layers from one that does not turn to the next."""
    return turns.index(0) + 1 if 0 in turns else len(turns) + 1


def _cohere2(model: ModelConfig) -> Config:
    return {
        **_rope(model),
        **_bias(model),
        "intermediate_size": _dense(model) or 1,
        "sliding_window": _window(model) or 4096,
        "layer_types": _kinds(model),
        "logit_scale": model.logit_scale,
    }


def _olmo2(model: ModelConfig) -> Config:
    return _rope(model) | _bias(model) | {"intermediate_size": _dense(model) or 1}


def _olmo3(model: ModelConfig) -> Config:
    """A rotation for the layers that see everything, and one for those that slide."""
    kinds, ropes = _kinds(model), {}
    for kind in (FULL, SLIDING):
        layers = tuple(layer for layer, its in zip(model.layers, kinds) if its == kind) or model.layers
        ropes[kind] = _rope(model, layers)["rope_parameters"]
    return {
        **_bias(model),
        "intermediate_size": _dense(model) or 1,
        "sliding_window": _window(model) or 4096,
        "layer_types": kinds,
        "rope_parameters": ropes,
    }


def _softmax_mixture(model: ModelConfig) -> Config:
    mixture = _mixture(model)
    return {
        "num_local_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.top_k,
        "router_aux_loss_coef": mixture.balance.loss,
        "output_router_logits": False,
    }


def _mixtral(model: ModelConfig) -> Config:
    mixture = _softmax_mixture(model)
    width = {"intermediate_size": _mixture(model).hidden_dim, "sliding_window": _window(model)}
    return _rope(model) | mixture | width | {"router_jitter_noise": 0.0}


def _qwen3_moe(model: ModelConfig) -> Config:
    router = _softmax_mixture(model)
    mixture, window = _mixture(model), _window(model)
    renormalise = mixture.router.renormalise if isinstance(mixture.router, SoftmaxRouter) else True
    return {
        **_rope(model),
        **_bias(model),
        **router,
        "num_experts": mixture.num_experts,
        "intermediate_size": _dense(model) or mixture.hidden_dim,
        "moe_intermediate_size": mixture.hidden_dim,
        "norm_topk_prob": renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, layer in enumerate(model.layers) if not isinstance(layer.ffn, MoE)],
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def _llama4(model: ModelConfig) -> Config:
    """`intermediate_size` is the width of experts, `intermediate_size_mlp` that of dense layers."""
    turns = [int(encoding.rotation(layer.position) is not None) for layer in model.layers]
    mixed = [i for i, layer in enumerate(model.layers) if isinstance(layer.ffn, MoE)]
    mixture = _mixture(model)
    chunk = next((layer.mask.size for layer in model.layers if isinstance(layer.mask, Chunked)), None)
    rises = next((layer.temperature for layer in model.layers if layer.temperature.kind == "log_floor"), None)
    step = mixed[0] + 1 if mixed else 1
    regular = mixed == list(range(step - 1, model.num_layers, step))
    return {
        **_rope(model),
        **_bias(model),
        "intermediate_size": mixture.hidden_dim,
        "intermediate_size_mlp": _dense(model) or 2 * mixture.hidden_dim,
        "num_local_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.top_k,
        "interleave_moe_layer_step": step if regular else 1,
        "moe_layers": mixed,
        "output_router_logits": False,
        "router_aux_loss_coef": mixture.balance.loss,
        "router_jitter_noise": 0.0,
        "use_qk_norm": any(layer.qk_norm == "rms" for layer in model.layers),
        "no_rope_layers": turns,
        "no_rope_layer_interval": _interval(turns),
        "layer_types": _kinds(model, CHUNKED),
        "attention_chunk_size": chunk or 8192,
        "attn_temperature_tuning": rises is not None,
        "floor_scale": rises.floor_scale if rises else 8192,
        "attn_scale": rises.attn_scale if rises else 0.1,
    }


WRITERS: dict[str, tuple[str, Callable[[ModelConfig], Config]]] = {
    "llama": ("LlamaForCausalLM", _llama),
    "mistral": ("MistralForCausalLM", _mistral),
    "qwen2": ("Qwen2ForCausalLM", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", _qwen3),
    "smollm3": ("SmolLM3ForCausalLM", _smollm3),
    "cohere2": ("Cohere2ForCausalLM", _cohere2),
    "olmo2": ("Olmo2ForCausalLM", _olmo2),
    "olmo3": ("Olmo3ForCausalLM", _olmo3),
    "mixtral": ("MixtralForCausalLM", _mixtral),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _qwen3_moe),
    "llama4_text": ("Llama4ForCausalLM", _llama4),
}
"""By `model_type`: the class that transformers makes of it, and what it has beside the keys of every family."""
