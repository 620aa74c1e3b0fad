"""GGUF files of the Llama family: hyperparameters, dequantised weights and the tokenizer, through the `gguf` library.

llama.cpp turns neighbouring entries of a head together and has the rows of q and k in that order; ours, as those of
transformers, turn halves. Undoing this is the one thing that no error would tell: without it a model speaks, badly.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from irope_jax.attention.mask import Global
from irope_jax.checkpoint.hf_names import LLAMA_GGUF
from irope_jax.checkpoint.hf_weights import Reading, open_reading
from irope_jax.checkpoint.native import CheckpointError
from irope_jax.core.config import ConfigError
from irope_jax.model.config import LayerSpec, ModelConfig
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.position.rotary import RoPE
from irope_jax.position.scaling import Linear, LongRoPE, RopeScaling, Unscaled, YaRN

log = logging.getLogger(__name__)

_READ = (
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout",
)  # fmt: skip
"""Keys below `llama.` that are read, or that change no number: a label, and the vocabulary that a tensor shows."""

_MUST_BE = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "attention.sliding_window": 0,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_beta_fast": 32,
    "rope.scaling.yarn_beta_slow": 1,
}
"""Keys that must have this value where they are given; what is in neither table is refused."""

FREQUENCY_FACTORS = "rope_freqs.weight"
"""A tensor by whose entries the frequencies are divided; Llama 3's scaling comes as numbers."""


class GgufFile:
    """One file, opened and its header read.

    Raises:
      CheckpointError: the library is missing, or it is not a whole GGUF file of a Llama.
    """

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise CheckpointError("reading GGUF needs the library gguf: `pip install 'irope-jax[hf]'`") from None
        self._gguf, self.path = gguf, path
        try:
            self._reader = gguf.GGUFReader(path)
            self._tensors = {str(tensor.name): tensor for tensor in self._reader.tensors}
        except Exception as error:  # the library raises many kinds for damaged files
            raise CheckpointError(f"{path}: not a whole GGUF file ({error or type(error).__name__})") from None
        if (family := self.field("general.architecture")) != "llama":
            raise CheckpointError(f"{path}: a model of architecture {family!r}; only 'llama' is read")
        for name in self._reader.fields:
            key = name.removeprefix("llama.")
            if key == name or key in _READ:
                continue
            if key not in _MUST_BE:
                raise CheckpointError(f"{path}: {name} is {self.field(name)!r}, a key whose meaning is not known here")
            if self.field(name) != _MUST_BE[key]:
                raise CheckpointError(f"{path}: {name} is {self.field(name)!r}; only {_MUST_BE[key]!r} is supported")

    def field(self, name: str, default: Any = None) -> Any:
        """A value of the header."""
        found = self._reader.fields.get(name)
        return default if found is None else found.contents()

    def number(self, name: str, default: float | None = None) -> float:
        value = self.field(f"llama.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{self.path}: llama.{name} is {value!r}, expected a finite number")
        return value

    def _whole(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if value != int(value) or value < 1:
            raise CheckpointError(f"{self.path}: llama.{name} is {value!r}, expected a whole number, 1 or more")
        return int(value)

    @property
    def context_length(self) -> int:
        return self._whole("context_length")

    def model(self) -> ModelConfig:
        """The model it describes.

        Raises:
          CheckpointError: numbers that make no model, or a rotation that is not known.
        """
        heads, width = self._whole("attention.head_count"), self._whole("embedding_length")
        head_dim = self._whole("attention.key_length", width // heads)
        if self._whole("attention.value_length", head_dim) != head_dim:
            raise CheckpointError(f"{self.path}: keys and values of different width are not supported")
        turned = self._whole("rope.dimension_count", head_dim)
        if turned != head_dim:
            raise CheckpointError(f"{self.path}: turns {turned} of {head_dim} entries; only whole heads are read")
        if "blk.0.ffn_gate_inp.weight" in self._tensors:
            raise CheckpointError(f"{self.path}: a mixture of experts; only dense models are read")
        vocab = self._tensors.get("token_embd.weight")
        if vocab is None or len(vocab.shape) != 2:
            raise CheckpointError(f"{self.path}: has no matrix token_embd.weight")
        try:
            rope = RoPE(float(self.number("rope.freq_base", 10000.0)), self._scaling(head_dim))
            return ModelConfig(
                vocab_size=int(vocab.shape[1]),
                d_model=width,
                num_layers=self._whole("block_count"),
                num_heads=heads,
                num_kv_heads=self._whole("attention.head_count_kv", heads),
                head_dim=head_dim,
                pattern=(LayerSpec(rope, Global(), SwiGLU(self._whole("feed_forward_length"))),),
                output_head="untied" if "output.weight" in self._tensors else "tied",
                # stored as float32: the shortest number that is the same there
                norm_eps=float(str(np.float32(self.number("attention.layer_norm_rms_epsilon")))),
            )
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    def _scaling(self, head_dim: int) -> RopeScaling:
        # llama.cpp: a factor without a type (old files have only rope.scale_linear) is linear, and 0 says nothing
        kind = self.field("llama.rope.scaling.type", "linear")
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 0)) or 1.0
        if kind not in ("none", "linear", "yarn"):
            raise CheckpointError(f"{self.path}: rope scaling {kind!r} is not known; none, linear and yarn are")
        if FREQUENCY_FACTORS in self._tensors:
            if kind != "none" and factor != 1:
                raise CheckpointError(f"{self.path}: both {FREQUENCY_FACTORS} and {kind} scaling; only one is read")
            factors = tuple(float(f) for f in self.tensor(FREQUENCY_FACTORS).reshape(-1))
            length = self.context_length
            return LongRoPE(length, 1.0, factors, factors, attention_policy="none")
        if kind == "none" or factor == 1:
            return Unscaled()
        if kind == "linear":
            return Linear(factor)
        return YaRN(factor, self._whole("rope.scaling.original_context_length"))

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    @property
    def where(self) -> str:
        return str(self.path)

    def shape(self, name: str) -> tuple[int, ...]:
        """Axes as llama.cpp's source format (transformers') has them."""
        return tuple(int(size) for size in self._tensors[name].shape[::-1])

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows of a tensor, dequantised to float32."""
        found, shape = self._tensors[name], self.shape(name)
        data = np.asarray(found.data)
        if len(shape) > 1 and data.ndim > 1 and data.shape[0] == shape[0]:
            data, shape = data[rows], (len(range(*rows.indices(shape[0]))), *shape[1:])
            rows = slice(None)
        try:
            values = self._gguf.quants.dequantize(data, found.tensor_type)
            return np.asarray(values, np.float32).reshape(shape)[rows]
        except Exception as error:
            raise CheckpointError(f"{self.path}: cannot read {name!r} ({error or type(error).__name__})") from None

    def tensor(self, name: str) -> np.ndarray:
        """All of a tensor."""
        return self.rows(name, slice(None))

    def reading(self, model: ModelConfig) -> Reading:
        """What is to be read; raises `CheckpointError` as `hf_weights.open_reading`.

        llama.cpp turns neighbours, so rows of q and k lie in that order, which no key of the file says.
        """
        turned = lambda layer: replace(layer, position=replace(layer.position, pairing="interleaved"))
        there = replace(model, pattern=tuple(map(turned, model.pattern)))
        return open_reading(LLAMA_GGUF, there, self, self.names, idle=(r"rope_freqs\.weight",))

    def tokenizer_json(self) -> str | None:
        """The tokenizer as a Hugging Face `tokenizer.json`; None, with a logged reason, if it is of no known kind.

        Raises:
          CheckpointError: of a known kind, but damaged.
        """
        kind, pre = self.field("tokenizer.ggml.model"), self.field("tokenizer.ggml.pre")
        if kind != "gpt2" or pre not in _SPLITS:
            log.warning("%s: its tokenizer (%s, %s) is not read; give the model one of its own", self.path, kind, pre)
            return None
        try:
            return self._byte_level_bpe(digits_alone=_SPLITS[pre])
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{self.path}: its tokenizer cannot be built ({error})") from None

    def _byte_level_bpe(self, digits_alone: bool) -> str:
        import tokenizers
        from tokenizers import AddedToken, decoders, models, pre_tokenizers

        lists = {name: self.field(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")}
        if absent := [name for name, found in lists.items() if not isinstance(found, list)]:
            raise ValueError(f"no {absent[0]}")
        tokens, types, merges = lists.values()
        if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
            raise ValueError("tokens are there twice, or not each has a type")
        merges = [tuple(merge.split(" ", 1)) for merge in merges]
        built = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
        split = [pre_tokenizers.Digits(individual_digits=True)] if digits_alone else []
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        built.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
        built.decoder = decoders.ByteLevel()
        control = int(self._gguf.TokenType.CONTROL)
        special = [AddedToken(t, special=True, normalized=False) for t, of in zip(tokens, types) if of == control]
        built.add_special_tokens(special)
        return built.to_str()

    def special_tokens(self) -> dict[str, str]:
        """Texts of `bos`, `eos` and `pad`, as far as the header names them."""
        tokens, found = self.field("tokenizer.ggml.tokens", []), {}
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            number = self.field(f"tokenizer.ggml.{theirs}_token_id")
            if isinstance(number, int) and 0 <= number < len(tokens):
                found[ours] = tokens[number]
        return found


_SPLITS = {"smollm": True, "gpt-2": False}
"""How text is cut before pairs merge, by `tokenizer.ggml.pre`: whether digits stand alone first. Files without it, or
with `default`, may be of any tokenizer: their ids would be a guess."""
