"""Names of weights, as data: where each tensor of a source lies among our parameters, and how its axes are read.

One table per family and format. What a row says: the source's name, with `{i}` for the layer; the path in our tree; the
axes of the source's tensor in our letters, and ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.model.config import ModelConfig


@dataclass(frozen=True)
class Row:
    """One tensor, or one per layer.

    Attributes:
      name: in the source; `{i}` stands for the number of the layer.
      path: in our parameters; below the layer where `{i}` is in the name.
      axes: of the source, letters of the shape alphabet; `(NH)` are two axes in one.
      ours: the order of the same letters in our parameters.
      rotated: whether rows come in the order of rotated pairs, which GGUF files interleave.
    """

    name: str
    path: tuple[str, ...]
    axes: str
    ours: str
    rotated: bool = False

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.name

    def source_shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape the source's tensor must have."""
        sizes, shape, inside = _sizes(model), [], None
        for letter in self.axes:
            if letter == "(":
                inside = 1
            elif letter == ")":
                shape.append(inside)
                inside = None
            elif inside is None:
                shape.append(sizes[letter])
            else:
                inside *= sizes[letter]
        return tuple(shape)

    def read(self, tensor: np.ndarray, model: ModelConfig) -> np.ndarray:
        """The tensor with our axes, a view where numpy can."""
        sizes, letters = _sizes(model), self.axes.replace("(", "").replace(")", "")
        split = tensor.reshape([sizes[letter] for letter in letters])
        return split.transpose([letters.index(letter) for letter in self.ours])

    def write(self, array: np.ndarray, model: ModelConfig) -> np.ndarray:
        """Our array with the source's axes: the inverse of `read`."""
        letters = self.axes.replace("(", "").replace(")", "")
        turned = array.transpose([self.ours.index(letter) for letter in letters])
        return turned.reshape(self.source_shape(model))


def _sizes(model: ModelConfig) -> dict[str, int]:
    widths = {layer.ffn.hidden_dim for layer in model.layers}
    if len(widths) > 1:
        raise ConfigError("model.pattern", ConfigError.ABSENT, "layers differ in width; the format has one")
    return {
        "V": model.vocab_size,
        "D": model.d_model,
        "N": model.num_heads,
        "K": model.num_kv_heads,
        "H": model.head_dim,
        "F": widths.pop(),
    }


LLAMA = (
    Row("model.embed_tokens.weight", ("embedding",), "VD", "VD"),
    Row("model.layers.{i}.input_layernorm.weight", ("attention_norm", "scale"), "D", "D"),
    Row("model.layers.{i}.self_attn.q_proj.weight", ("attention", "query"), "(NH)D", "DNH", rotated=True),
    Row("model.layers.{i}.self_attn.k_proj.weight", ("attention", "key"), "(KH)D", "DKH", rotated=True),
    Row("model.layers.{i}.self_attn.v_proj.weight", ("attention", "value"), "(KH)D", "DKH"),
    Row("model.layers.{i}.self_attn.o_proj.weight", ("attention", "out"), "D(NH)", "NHD"),
    Row("model.layers.{i}.post_attention_layernorm.weight", ("feed_forward_norm", "scale"), "D", "D"),
    Row("model.layers.{i}.mlp.gate_proj.weight", ("feed_forward", "gate"), "FD", "DF"),
    Row("model.layers.{i}.mlp.up_proj.weight", ("feed_forward", "up"), "FD", "DF"),
    Row("model.layers.{i}.mlp.down_proj.weight", ("feed_forward", "down"), "DF", "FD"),
    Row("model.norm.weight", ("final_norm", "scale"), "D", "D"),
    Row("lm_head.weight", ("head",), "VD", "DV"),
)
"""Llama and Mistral in safetensors."""

LLAMA_IDLE = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")
"""Tensors that old files hold and nothing reads: frequencies come from the config."""

_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _in_gguf(name: str) -> str:
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    part = name.removeprefix("model.layers.{i}.").removesuffix(".weight")
    return f"blk.{{i}}.{_GGUF_NAMES[part]}.weight"


LLAMA_GGUF = tuple(Row(_in_gguf(r.name), r.path, r.axes, r.ours, r.rotated) for r in LLAMA)
"""The same tensors in llama.cpp's files."""
