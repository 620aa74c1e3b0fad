"""Names of weights, as data: where each tensor of a source lies among our parameters, and how its axes are read.

One table per family and format. What a row says: the source's name, with `{i}` for the layer; the path in our tree; the
axes of the source's tensor in our letters, and ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from irope_jax.checkpoint.streams import BLOCK_BYTES
from irope_jax.model.config import ModelConfig
from irope_jax.model.moe import MoE


@dataclass(frozen=True)
class Row:
    """One tensor, or one per layer, or one per layer and expert.

    A row is of a layer only if the layer has such a parameter, of as many axes: a table may say more than a model has.

    Attributes:
      name: in the source; `{i}` stands for the number of the layer, `{e}` for that of the expert.
      path: in our parameters; below the layer where `{i}` is in the name.
      axes: of the source, letters of the shape alphabet and S for the width of a shared expert; `(NH)` are two axes in
        one, and `2` counts two of our parameters that lie in one tensor.
      ours: the order of the same letters in our parameters; of one expert where `{e}` is in the name.
      rotated: whether the axis H lies in the order in which a rotation pairs its entries.
      part: which of the two, where `2` is among the axes.
    """

    name: str
    path: tuple[str, ...]
    axes: str
    ours: str
    rotated: bool = False
    part: int | None = None

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.name

    @property
    def per_expert(self) -> bool:
        return "{e}" in self.name

    @property
    def axes_of_ours(self) -> int:
        """How many axes our parameter has in one layer."""
        return len(self.ours) + self.per_expert

    @property
    def letters(self) -> str:
        """Axes of the source, none of them joined."""
        return self.axes.replace("(", "").replace(")", "")

    @property
    def lead(self) -> str:
        """The source's outermost axis, along which blocks of it are cut."""
        return self.letters[0]

    def source_shape(self, model: ModelConfig, layer: int = 0, count: int | None = None) -> tuple[int, ...]:
        """Shape the source's tensor must have, or that of `count` steps of its outermost axis."""
        sizes, shape, inside = self._block_sizes(model, layer, count), [], None
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

    def blocks(self, model: ModelConfig, layer: int, itemsize: int) -> Iterator[range]:
        """Steps of the outermost axis of which a block of the source has about `BLOCK_BYTES`."""
        steps = _sizes(model, layer)[self.lead]
        size = self.block_steps(model, layer, itemsize)
        return (range(at, min(at + size, steps)) for at in range(0, steps, size))

    def block_steps(self, model: ModelConfig, layer: int, itemsize: int) -> int:
        """How many steps a block has."""
        steps = _sizes(model, layer)[self.lead]
        a_step = math.prod(self.source_shape(model, layer)) // steps * itemsize
        return max(1, min(BLOCK_BYTES // a_step, steps))

    def rows(self, model: ModelConfig, layer: int, steps: range) -> slice:
        """Where steps of the outermost axis lie along the first axis of the source."""
        each = self.source_shape(model, layer, count=1)[0]
        return slice(steps.start * each, steps.stop * each)

    def index(self, steps: range) -> tuple[slice, ...]:
        """Where they lie in our parameter, of one layer and one expert."""
        return tuple(slice(steps.start, steps.stop) if letter == self.lead else slice(None) for letter in self.ours)

    def our_shape(self, model: ModelConfig, layer: int = 0, count: int | None = None) -> tuple[int, ...]:
        """Shape of a block of our parameter."""
        sizes = self._block_sizes(model, layer, count)
        return tuple(sizes[letter] for letter in self.ours)

    def read(self, rows: np.ndarray, model: ModelConfig, layer: int = 0, count: int | None = None) -> np.ndarray:
        """A tensor, or a block of `count` steps, with our axes: our part of it; a view where numpy can."""
        sizes, letters = self._block_sizes(model, layer, count), self.letters
        split = rows.reshape([sizes[letter] for letter in letters])
        if self.part is not None:
            split = np.take(split, self.part, axis=letters.index("2"))
            letters = letters.replace("2", "")
        return split.transpose([letters.index(letter) for letter in self.ours])

    def write(
        self, parts: Sequence[np.ndarray], model: ModelConfig, layer: int = 0, count: int | None = None
    ) -> np.ndarray:
        """The inverse: blocks of our parameters, as many as lie in the tensor, with the source's axes."""
        letters = self.letters.replace("2", "")
        turned = [part.transpose([self.ours.index(letter) for letter in letters]) for part in parts]
        whole = turned[0] if self.part is None else np.stack(turned, axis=self.letters.index("2"))
        return whole.reshape(self.source_shape(model, layer, count))

    def _block_sizes(self, model: ModelConfig, layer: int, count: int | None) -> dict[str, int]:
        sizes = _sizes(model, layer)
        return sizes if count is None else sizes | {self.lead: count}


def _sizes(model: ModelConfig, layer: int) -> dict[str, int]:
    ffn = model.layers[layer].ffn
    sizes = {
        "V": model.vocab_size,
        "D": model.d_model,
        "N": model.num_heads,
        "K": model.num_kv_heads,
        "H": model.head_dim,
        "F": ffn.hidden_dim,
        "2": 2,
    }
    if isinstance(ffn, MoE):
        sizes |= {"E": ffn.num_experts, "S": ffn.shared.hidden_dim if ffn.shared else 0}
    return sizes


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

_LAYER = "model.layers.{i}."


def _without(rows: tuple[Row, ...], *parts: str) -> tuple[Row, ...]:
    return tuple(row for row in rows if not any(part in row.name for part in parts))


_BIASES = (
    Row(_LAYER + "self_attn.q_proj.bias", ("attention", "query_bias"), "(NH)", "NH", rotated=True),
    Row(_LAYER + "self_attn.k_proj.bias", ("attention", "key_bias"), "(KH)", "KH", rotated=True),
    Row(_LAYER + "self_attn.v_proj.bias", ("attention", "value_bias"), "(KH)", "KH"),
    Row(_LAYER + "self_attn.o_proj.bias", ("attention", "out_bias"), "D", "D"),
)
_HEAD_NORMS = (
    Row(_LAYER + "self_attn.q_norm.weight", ("attention", "query_norm"), "H", "H", rotated=True),
    Row(_LAYER + "self_attn.k_norm.weight", ("attention", "key_norm"), "H", "H", rotated=True),
)
_ALL_HEADS_NORMS = (
    Row(_LAYER + "self_attn.q_norm.weight", ("attention", "query_norm"), "(NH)", "NH", rotated=True),
    Row(_LAYER + "self_attn.k_norm.weight", ("attention", "key_norm"), "(KH)", "KH", rotated=True),
)

QWEN = LLAMA + _BIASES + _HEAD_NORMS
"""Qwen 2 (biases) and Qwen 3 (norms of heads); SmolLM 3 has neither."""

OLMO = (
    *_without(LLAMA, "layernorm"),
    *_BIASES,
    *_ALL_HEADS_NORMS,
    Row(_LAYER + "post_attention_layernorm.weight", ("attention_norm", "scale"), "D", "D"),
    Row(_LAYER + "post_feedforward_layernorm.weight", ("feed_forward_norm", "scale"), "D", "D"),
)
"""OLMo 2 and 3: the norm called `post_attention` is that of what attention gave."""

COHERE2 = LLAMA + _BIASES
"""Cohere 2; without a second norm, its parameter is not there and so neither is its row."""


def _experts_one_by_one(router: str, expert: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    return (
        Row(f"{_LAYER}{router}.weight", ("feed_forward", "router"), "ED", "DE"),
        Row(f"{_LAYER}{expert}.{gate}.weight", ("feed_forward", "gate"), "FD", "DF"),
        Row(f"{_LAYER}{expert}.{up}.weight", ("feed_forward", "up"), "FD", "DF"),
        Row(f"{_LAYER}{expert}.{down}.weight", ("feed_forward", "down"), "DF", "FD"),
    )


def _experts_fused(router: str, experts: str, gate_up: str, down: str) -> tuple[Row, ...]:
    """All experts of a layer in one tensor, gate before up; `gate_up` and `down` are their axes."""
    return (
        Row(f"{_LAYER}{router}.weight", ("feed_forward", "router"), "ED", "DE"),
        Row(f"{_LAYER}{experts}.gate_up_proj", ("feed_forward", "gate"), gate_up, "EDF", part=0),
        Row(f"{_LAYER}{experts}.gate_up_proj", ("feed_forward", "up"), gate_up, "EDF", part=1),
        Row(f"{_LAYER}{experts}.down_proj", ("feed_forward", "down"), down, "EFD"),
    )


MIXTRAL = LLAMA + _experts_one_by_one("block_sparse_moe.gate", "block_sparse_moe.experts.{e}", "w1", "w3", "w2")
MIXTRAL_FUSED = LLAMA + _experts_fused("mlp.gate", "mlp.experts", "E(2F)D", "EDF")
QWEN3_MOE = QWEN + _experts_one_by_one("mlp.gate", "mlp.experts.{e}", "gate_proj", "up_proj", "down_proj")
QWEN3_MOE_FUSED = QWEN + _experts_fused("mlp.gate", "mlp.experts", "E(2F)D", "EDF")

_LLAMA4 = (
    *_without(LLAMA, "mlp."),
    *_BIASES,
    Row(_LAYER + "feed_forward.gate_proj.weight", ("feed_forward", "gate"), "FD", "DF"),
    Row(_LAYER + "feed_forward.up_proj.weight", ("feed_forward", "up"), "FD", "DF"),
    Row(_LAYER + "feed_forward.down_proj.weight", ("feed_forward", "down"), "DF", "FD"),
    Row(_LAYER + "feed_forward.shared_expert.gate_proj.weight", ("feed_forward", "shared", "gate"), "SD", "DS"),
    Row(_LAYER + "feed_forward.shared_expert.up_proj.weight", ("feed_forward", "shared", "up"), "SD", "DS"),
    Row(_LAYER + "feed_forward.shared_expert.down_proj.weight", ("feed_forward", "shared", "down"), "DS", "SD"),
)
LLAMA4 = _LLAMA4 + _experts_fused("feed_forward.router", "feed_forward.experts", "ED(2F)", "EFD")
"""Llama 4 text; fused experts are written for `x @ w`, unlike those of other families."""

LLAMA4_ONE_BY_ONE = _LLAMA4 + _experts_one_by_one(
    "feed_forward.router", "feed_forward.experts.{e}", "gate_proj", "up_proj", "down_proj"
)
"""The same as quantisable files have it."""

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

LLAMA4_GGUF = (
    *LLAMA_GGUF,
    Row("blk.{i}.ffn_gate_inp.weight", ("feed_forward", "router"), "ED", "DE"),
    Row("blk.{i}.ffn_gate_exps.weight", ("feed_forward", "gate"), "EFD", "EDF"),
    Row("blk.{i}.ffn_up_exps.weight", ("feed_forward", "up"), "EFD", "EDF"),
    Row("blk.{i}.ffn_down_exps.weight", ("feed_forward", "down"), "EDF", "EFD"),
    Row("blk.{i}.ffn_gate_shexp.weight", ("feed_forward", "shared", "gate"), "SD", "DS"),
    Row("blk.{i}.ffn_up_shexp.weight", ("feed_forward", "shared", "up"), "SD", "DS"),
    Row("blk.{i}.ffn_down_shexp.weight", ("feed_forward", "shared", "down"), "DS", "SD"),
)
"""Llama 4 there: all experts of a layer in one tensor, gate and up apart."""
