"""What families of Hugging Face say in their `config.json`, one entry each: keys, defaults, layers, names of tensors.

Facts are of transformers 5.23 (its `configuration_*.py` and `modeling_*.py`); keys of 4.x are read too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from irope_jax.attention.mask import Chunked, Global, MaskSpec, Sliding
from irope_jax.checkpoint import hf_names
from irope_jax.checkpoint.hf_names import Row
from irope_jax.checkpoint.hf_rope import rope_from_hf
from irope_jax.core.config import ConfigError
from irope_jax.model.config import LayerSpec
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.model.moe import MoE
from irope_jax.model.routing import Balance, SigmoidRouter, SoftmaxRouter
from irope_jax.position.encoding import NoPE, RoPE
from irope_jax.position.scaling import LongRoPE, YaRN
from irope_jax.position.temperature import Constant, LogFloor


class Values:
    """The keys of a config with the defaults of its family; each reader names the key it cannot use."""

    def __init__(self, given: Mapping[str, Any], absent: Mapping[str, Any]):
        self.given, self.all = given, {**absent, **given}

    def get(self, key: str) -> Any:
        return self.all.get(key)

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.all.get(key)
        value = default if value is None else value
        if type(value) is not int or not least <= value < 2**31:
            raise ConfigError(key, value, f"expected a whole number, {least} or more")
        return value

    def number(self, key: str, low: float = 0.0, high: float = float("inf")) -> float:
        """A number strictly between `low` and `high`."""
        value = self.all.get(key)
        if type(value) not in (int, float) or not low < value < high:
            raise ConfigError(key, value, f"expected a number above {low:g}" + (f" and below {high:g}" * (high < 1e9)))
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.all.get(key)
        if not isinstance(value, bool):
            raise ConfigError(key, value, "expected true or false")
        return value

    def per_layer(self, key: str, default: Callable[[int], Any], allowed: tuple) -> list:
        """A list with an entry for each layer; None is the default."""
        layers, found = self.whole("num_hidden_layers"), self.all.get(key)
        if found is None:
            return [default(i) for i in range(layers)]
        if not isinstance(found, list) or len(found) != layers or any(entry not in allowed for entry in found):
            raise ConfigError(
                key, found, f"expected {layers} entries, one a layer, each of {', '.join(map(str, allowed))}"
            )
        return found

    def rope(self) -> RoPE:
        return _whole_heads(rope_from_hf(self.all))


def _whole_heads(rope: RoPE) -> RoPE:
    if rope.fraction != 1:
        fix = "transformers has no partial rotation here: it ignores the key or fails on it; only 1"
        raise ConfigError("partial_rotary_factor", rope.fraction, fix)
    return rope


@dataclass(frozen=True)
class Family:
    """How one `model_type` is read.

    Attributes:
      layers: all layers of a model, from its values.
      tables: names of its tensors, in every layout that files have; the first is the usual one.
      absent: what transformers takes for a key that is not there.
      read: keys that are read beside those of every family.
      must_be: keys that must have one of these values where they are given.
      options: fields of `ModelConfig` that differ from a Llama's.
      eps: the key of the norms' epsilon.
    """

    layers: Callable[[Values], tuple[LayerSpec, ...]]
    tables: tuple[tuple[Row, ...], ...]
    absent: Mapping[str, Any] = field(default_factory=dict)
    read: tuple[str, ...] = ()
    must_be: Mapping[str, tuple] = field(default_factory=dict)
    options: Callable[[Values], dict[str, Any]] = lambda values: {}
    eps: str = "rms_norm_eps"


FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def _mask(values: Values, kind: str) -> MaskSpec:
    """Windows of transformers count the query, as ours do."""
    match kind:
        case "sliding_attention":
            return Sliding(values.whole("sliding_window"))
        case "chunked_attention":
            return Chunked(values.whole("attention_chunk_size"))
    return Global()


def _alike(values: Values) -> tuple[LayerSpec, ...]:
    """One kind of layer, whose window, where it has one, is of all."""
    mask = Global() if values.get("sliding_window") is None else _mask(values, SLIDING)
    layer = LayerSpec(values.rope(), mask, SwiGLU(values.whole("intermediate_size")))
    return (layer,) * values.whole("num_hidden_layers")


def _qwen(qk_norm: str) -> Callable[[Values], tuple[LayerSpec, ...]]:
    def layers(values: Values) -> tuple[LayerSpec, ...]:
        slides = values.flag("use_sliding_window") and values.get("sliding_window") is not None
        first = values.whole("max_window_layers", least=0)
        kinds = values.per_layer("layer_types", lambda i: SLIDING if slides and i >= first else FULL, (FULL, SLIDING))
        if SLIDING in kinds and not slides:
            raise ConfigError("use_sliding_window", False, "layer_types has sliding layers; transformers cannot run it")
        rope, ffn = values.rope(), SwiGLU(values.whole("intermediate_size"))
        return tuple(LayerSpec(rope, _mask(values, kind), ffn, qk_norm=qk_norm) for kind in kinds)

    return layers


def _smollm3(values: Values) -> tuple[LayerSpec, ...]:
    interval = values.whole("no_rope_layer_interval")
    turns = values.per_layer("no_rope_layers", lambda i: int((i + 1) % interval != 0), (0, 1))
    slides = values.flag("use_sliding_window") and values.get("sliding_window") is not None
    kinds = values.per_layer("layer_types", lambda i: SLIDING if slides and not turns[i] else FULL, (FULL, SLIDING))
    rope, ffn = values.rope(), SwiGLU(values.whole("intermediate_size"))
    return tuple(LayerSpec(rope if turn else NoPE(), _mask(values, kind), ffn) for turn, kind in zip(turns, kinds))


def _cohere2(values: Values) -> tuple[LayerSpec, ...]:
    interval = values.whole("sliding_window_pattern", 4)
    kinds = values.per_layer("layer_types", lambda i: SLIDING if (i + 1) % interval else FULL, (FULL, SLIDING))
    rope, ffn = replace(values.rope(), pairing="interleaved"), SwiGLU(values.whole("intermediate_size"))
    return tuple(LayerSpec(rope if kind == SLIDING else NoPE(), _mask(values, kind), ffn) for kind in kinds)


def _olmo2(values: Values) -> tuple[LayerSpec, ...]:
    layer = LayerSpec(values.rope(), Global(), SwiGLU(values.whole("intermediate_size")), qk_norm="learned_all_heads")
    return (layer,) * values.whole("num_hidden_layers")


def _olmo3(values: Values) -> tuple[LayerSpec, ...]:
    kinds = values.per_layer("layer_types", lambda i: SLIDING if (i + 1) % 4 else FULL, (FULL, SLIDING))
    given, ropes = values.get("rope_parameters"), {}
    for kind in (FULL, SLIDING):
        here = dict(values.all)
        if given is not None:
            if not isinstance(given, Mapping) or set(given) != {FULL, SLIDING}:
                fix = f"expected parameters for {FULL} and for {SLIDING}; transformers ignores any other form"
                raise ConfigError("rope_parameters", given, fix)
            here["rope_parameters"] = given[kind]
        elif kind == SLIDING:
            here.pop("rope_scaling", None)  # scalings are of the layers that see everything
        ropes[kind] = _whole_heads(rope_from_hf(here))
    ffn = SwiGLU(values.whole("intermediate_size"))
    return tuple(LayerSpec(ropes[k], _mask(values, k), ffn, qk_norm="learned_all_heads") for k in kinds)


def _softmax_mixture(values: Values, experts: str, width: str, renormalise: bool) -> MoE:
    return MoE(
        values.whole(experts),
        values.whole(width),
        values.whole("num_experts_per_tok"),
        SoftmaxRouter(renormalise),
        balance=Balance(loss=values.number("router_aux_loss_coef", low=-1e-30), z_loss=0.0),
    )


def _mixtral(values: Values) -> tuple[LayerSpec, ...]:
    mask = Global() if values.get("sliding_window") is None else _mask(values, SLIDING)
    ffn = _softmax_mixture(values, "num_local_experts", "intermediate_size", renormalise=True)
    return (LayerSpec(values.rope(), mask, ffn),) * values.whole("num_hidden_layers")


def _qwen3_moe(values: Values) -> tuple[LayerSpec, ...]:
    slides = values.flag("use_sliding_window") and values.get("sliding_window") is not None
    mask, rope = _mask(values, SLIDING if slides else FULL), values.rope()
    count = "num_local_experts" if values.get("num_local_experts") is not None else "num_experts"
    mixture = _softmax_mixture(values, count, "moe_intermediate_size", values.flag("norm_topk_prob"))
    dense, step = values.get("mlp_only_layers") or [], values.whole("decoder_sparse_step")
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise ConfigError("mlp_only_layers", dense, "expected a list of numbers of layers")
    ffns = [
        mixture if i not in dense and (i + 1) % step == 0 else SwiGLU(values.whole("intermediate_size"))
        for i in range(values.whole("num_hidden_layers"))
    ]
    return tuple(LayerSpec(rope, mask, ffn, qk_norm="learned") for ffn in ffns)


def _llama4(values: Values) -> tuple[LayerSpec, ...]:
    """`no_rope_layers` says 1 where a layer turns; `[]` is the usual pattern, and so is None."""
    count, interval = values.whole("num_hidden_layers"), values.whole("no_rope_layer_interval")
    if values.get("no_rope_layers") == []:
        values.all["no_rope_layers"] = None
    turns = values.per_layer("no_rope_layers", lambda i: int((i + 1) % interval != 0), (0, 1))
    kinds = values.per_layer("layer_types", lambda i: CHUNKED if turns[i] else FULL, (FULL, CHUNKED))
    mixed = values.get("moe_layers")
    if mixed is None:
        step = values.whole("interleave_moe_layer_step")
        mixed = list(range(step - 1, count, step))
    if not isinstance(mixed, list) or any(type(i) is not int or not 0 <= i < count for i in mixed):
        raise ConfigError("moe_layers", mixed, f"expected a list of layers, 0 to {count - 1}")
    qk_norm, rope = "rms" if values.flag("use_qk_norm") else "none", replace(values.rope(), pairing="interleaved")
    if qk_norm == "rms" and isinstance(rope.scaling, YaRN | LongRoPE):
        # transformers multiplies cos and sin by it and then norms, so nothing of it is left
        rope = replace(rope, scaling=replace(rope.scaling, attention_factor=1.0))
    temperature = Constant()
    if bool(values.get("attn_temperature_tuning")):  # early files say 4
        floor = values.number("floor_scale", 0, 2**31)
        if floor != int(floor):
            raise ConfigError("floor_scale", floor, "expected a whole number of tokens")
        temperature = LogFloor(floor_scale=int(floor), attn_scale=values.number("attn_scale", -1e9, 1e9))
    layers = []
    for i in range(count):
        ffn: SwiGLU | MoE = SwiGLU(values.whole("intermediate_size_mlp"))
        if i in mixed:
            width = values.whole("intermediate_size")
            balance = Balance(loss=values.number("router_aux_loss_coef", low=-1e-30), z_loss=0.0)
            experts, top_k = values.whole("num_local_experts"), values.whole("num_experts_per_tok")
            ffn = MoE(experts, width, top_k, SigmoidRouter(), shared=SwiGLU(width), balance=balance)
        mask = _mask(values, kinds[i])
        if turns[i]:
            layers.append(LayerSpec(rope, mask, ffn, qk_norm=qk_norm))
        else:
            layers.append(LayerSpec(NoPE(), mask, ffn, temperature=temperature))
    return tuple(layers)


def _bias(values: Values) -> dict[str, Any]:
    return {"attention_bias": "all"} if values.flag("attention_bias") else {}


_NO_BIAS = {"attention_bias": (False,), "mlp_bias": (False,)}
_ONLY_FULL = {"sliding_window": (None,), "use_sliding_window": (False,)}
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_MIXTURE = ("num_experts_per_tok", "num_local_experts", "num_experts", "router_aux_loss_coef")
_QWEN_ABSENT = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32_768,
    "attention_bias": False,
}
_OLMO_ABSENT = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "attention_bias": False}

# fmt: off
FAMILIES: dict[str, Family] = {
    "llama": Family(
        _alike,
        (hf_names.LLAMA,),
        {"max_position_embeddings": 2048},
        must_be=_NO_BIAS | _ONLY_FULL | {"pretraining_tp": (1, None, 0)},
    ),
    "mistral": Family(
        _alike,
        (hf_names.LLAMA,),
        {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
        read=("sliding_window",),
        must_be=_NO_BIAS | {"use_sliding_window": (False,)},
    ),
    "qwen2": Family(
        _qwen("none"),
        (hf_names.QWEN,),
        _QWEN_ABSENT | {"num_key_value_heads": 32},
        read=_WINDOWS,
        options=lambda values: {"attention_bias": "qkv"},
    ),
    "qwen3": Family(
        _qwen("learned"),
        (hf_names.QWEN,),
        _QWEN_ABSENT | {"num_key_value_heads": 32, "head_dim": 128},
        read=(*_WINDOWS, "attention_bias"),
        options=_bias,
    ),
    "qwen3_moe": Family(
        _qwen3_moe,
        (hf_names.QWEN3_MOE, hf_names.QWEN3_MOE_FUSED),
        _QWEN_ABSENT
        | {
            "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
            "norm_topk_prob": False, "decoder_sparse_step": 1, "router_aux_loss_coef": 0.001, "intermediate_size": 6144,
        },
        read=(
            *_WINDOWS, *_MIXTURE, "attention_bias", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
            "mlp_only_layers",
        ),
        options=_bias,
    ),
    "mixtral": Family(
        _mixtral,
        (hf_names.MIXTRAL, hf_names.MIXTRAL_FUSED),
        {
            "max_position_embeddings": 131_072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
            "sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8, "router_aux_loss_coef": 0.001,
        },
        read=("sliding_window", *_MIXTURE),
        must_be=_NO_BIAS | {"router_jitter_noise": (0, 0.0)},
    ),
    "smollm3": Family(
        _smollm3,
        (hf_names.QWEN,),
        {
            "max_position_embeddings": 32_768, "num_key_value_heads": 4, "rope_theta": 2e6, "use_sliding_window": False,
            "no_rope_layer_interval": 4, "attention_bias": False, "tie_word_embeddings": True,
        },
        read=(*_WINDOWS, "no_rope_layers", "no_rope_layer_interval", "attention_bias"),
        must_be={"mlp_bias": (False,)},
        options=_bias,
    ),
    "cohere2": Family(
        _cohere2,
        (hf_names.COHERE2,),
        {
            "max_position_embeddings": 8192, "sliding_window": 4096, "logit_scale": 0.0625, "layer_norm_eps": 1e-5,
            "attention_bias": False, "tie_word_embeddings": True,
        },
        read=(
            "sliding_window", "layer_types", "sliding_window_pattern", "logit_scale", "layer_norm_eps",
            "attention_bias",
        ),
        options=lambda values: {
            "block": "parallel", "norm": "layer", "logit_scale": values.number("logit_scale"), **_bias(values)
        },
        eps="layer_norm_eps",
    ),
    "olmo2": Family(
        _olmo2,
        (hf_names.OLMO,),
        _OLMO_ABSENT,
        read=("attention_bias",),
        must_be=_ONLY_FULL | {"layer_types": (None,)},
        options=lambda values: {"block": "post_norm", **_bias(values)},
    ),
    "olmo3": Family(
        _olmo3,
        (hf_names.OLMO,),
        _OLMO_ABSENT | {"sliding_window": 4096, "rope_theta": 5e5},
        read=("attention_bias", "sliding_window", "layer_types"),
        options=lambda values: {"block": "post_norm", **_bias(values)},
    ),
    "llama4_text": Family(
        _llama4,
        (hf_names.LLAMA4, hf_names.LLAMA4_ONE_BY_ONE),
        {
            "max_position_embeddings": 131_072, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
            "rope_theta": 5e5, "intermediate_size": 8192, "intermediate_size_mlp": 16_384, "num_experts_per_tok": 1,
            "num_local_experts": 16, "interleave_moe_layer_step": 1, "use_qk_norm": True, "router_aux_loss_coef": 0.001,
            "no_rope_layer_interval": 4, "attention_chunk_size": 8192, "attn_temperature_tuning": True,
            "floor_scale": 8192, "attn_scale": 0.1, "attention_bias": False,
        },
        read=(
            *_MIXTURE, "intermediate_size_mlp", "moe_layers", "interleave_moe_layer_step", "use_qk_norm",
            "no_rope_layers", "no_rope_layer_interval", "layer_types", "attention_chunk_size",
            "attn_temperature_tuning", "floor_scale", "attn_scale", "attention_bias",
        ),
        must_be={"router_jitter_noise": (0, 0.0)},
        options=_bias,
    ),
}
"""By `model_type`."""
# fmt: on
