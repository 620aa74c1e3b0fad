"""What a model is: a width, a head count and a tuple of `LayerSpec`s. Pure data, no modules.

iRoPE, and every rival to it, is a tuple of layers; no code branches on the name of an architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from irope_jax.attention.mask import Chunked, Global, MaskSpec, Sliding
from irope_jax.context.strategy import ContextConfig
from irope_jax.core.config import ConfigError
from irope_jax.core.types import Precision
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.model.moe import MoE
from irope_jax.model.remat import Remat
from irope_jax.model.remat import check as check_remat
from irope_jax.position import encoding
from irope_jax.position.absolute import NoEmbedding, PositionEmbedding, Sinusoidal
from irope_jax.position.encoding import EXTENSIONS, NoPE, PositionSpec, RoPE
from irope_jax.position.temperature import Constant, LogFloor, TemperatureSpec, in_training

FfnSpec = SwiGLU | MoE
"""The union of feed-forward kinds."""

QkNorm = Literal["none", "rms", "learned", "learned_all_heads"]


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer.

    Attributes:
      position: how q and k carry position (`RoPE`, `NoPE`, `ALiBi` …).
      mask: which keys a query sees (`Global`, `Chunked`, `Sliding`); it also decides what the layer costs.
      ffn: the feed-forward part.
      temperature: factor on the queries by their position.
      qk_norm: `rms` normalises q and k per head after the rotation, without a learned weight (Llama 4 does so in its
        RoPE layers only). `learned` does so before it, with a weight per entry of a head (Qwen 3);
        `learned_all_heads` before it, over all heads together, with a weight per entry (OLMo 2). `none` leaves them.
    """

    position: PositionSpec
    mask: MaskSpec
    ffn: FfnSpec
    temperature: TemperatureSpec = Constant()
    qk_norm: QkNorm = "none"

    def __post_init__(self):
        if isinstance(self.position, EXTENSIONS) and not isinstance(self.mask, Global):
            fix = f"position {self.position.kind!r} splits what a global layer sees; use kind 'global'"
            raise ConfigError("mask", self.mask, fix)
        rotation = encoding.rotation(self.position)
        if self.qk_norm == "rms" and rotation is not None and rotation.magnifies_part:
            fix = "would cancel the attention factor, which lies on the turned prefix only; use 'none'"
            raise ConfigError("qk_norm", self.qk_norm, fix)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer with grouped-query attention.

    Attributes:
      vocab_size: V; at least what the tokenizer needs.
      d_model: D.
      num_layers: L; the pattern is repeated until there are that many.
      num_heads: N query heads.
      num_kv_heads: K key heads, a divisor of N.
      head_dim: H, even where a layer rotates.
      pattern: the layers that repeat, first layer first.
      position_embedding: added to the token embeddings, once: nothing, sinusoids, or a learned vector per position.
      output_head: `tied` uses the embedding again, `untied` has a matrix of its own.
      block: what a layer does with its two parts. `pre_norm` adds `part(norm(x))` one after the other; `post_norm` adds
        `norm(part(x))` (OLMo 2); `parallel` adds both parts of one norm of x (Cohere).
      norm: `rms`, or `layer`, which subtracts the mean too; both with a weight and without a bias.
      norm_eps: added to the mean square, or the variance, in every norm.
      attention_bias: added after the projections of attention: to none, to queries, keys and values (`qkv`, Qwen 2), or
        to the output too (`all`).
      logit_scale: factor on the logits.
      init_std: standard deviation of the initial weights.
      embedding_init_std: that of the embedding; None means `init_std`.
      residual_init_std: that of the projections back into the residual stream; None means `init_std / sqrt(2 L)`. Near
        zero, a layer starts as the identity and a deep model learns at first like a shallow one.
      remat: what the backward pass finds saved: `none` recomputes nothing, `full` keeps only each layer's input,
        `attention` also keeps what attention gave, so that no ring turns again; `dots` keeps products of weights and
        activations. `offload` is `attention` and `offload_inputs` is `full` with everything kept on the host instead.
        A `Remat` says so tensor by tensor.
      attention: implementation asked of `attention.attend`; None lets it choose.
      context: how attention spans devices where the mesh cuts the sequence.
      precision: number formats.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    pattern: tuple[LayerSpec, ...]
    position_embedding: PositionEmbedding = NoEmbedding()
    output_head: Literal["tied", "untied"] = "tied"
    block: Literal["pre_norm", "post_norm", "parallel"] = "pre_norm"
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    attention_bias: Literal["none", "qkv", "all"] = "none"
    logit_scale: float = 1.0
    init_std: float = 0.02
    embedding_init_std: float | None = None
    residual_init_std: float | None = None
    remat: Remat | str = "none"
    attention: str | None = None
    context: ContextConfig = ContextConfig()
    precision: Precision = Precision()

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        check_remat(self.remat)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "num_kv_heads",
                self.num_kv_heads,
                f"must divide num_heads={self.num_heads}, so that key heads are shared evenly",
            )
        if not self.logit_scale > 0:
            raise ConfigError("logit_scale", self.logit_scale, "must be positive; 1 leaves the logits")
        if not self.pattern:
            raise ConfigError("pattern", self.pattern, "needs at least one layer")
        for i, layer in enumerate(self.pattern):
            if encoding.rotation(layer.position) is not None and self.head_dim % 2:
                raise ConfigError(
                    "head_dim", self.head_dim, f"layer {i} of the pattern rotates pairs: use an even width"
                )
            try:
                encoding.check(layer.position, self.head_dim)
            except ConfigError as error:
                raise error.within(f"pattern.{i}.position") from None
        if isinstance(self.position_embedding, Sinusoidal) and self.d_model % 2:
            raise ConfigError("d_model", self.d_model, "sines and cosines come in pairs; use an even width")

    def in_training(self) -> ModelConfig:
        """The model while it is trained: temperatures that are meant for evaluation only are left out."""
        pattern = tuple(replace(layer, temperature=in_training(layer.temperature)) for layer in self.pattern)
        return self if pattern == self.pattern else replace(self, pattern=pattern)

    @property
    def residual_std(self) -> float:
        """Standard deviation of the initial projections back into the residual stream."""
        given = self.residual_init_std
        return self.init_std / (2 * self.num_layers) ** 0.5 if given is None else given

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """All L layers, first to last."""
        repeats = -(-self.num_layers // len(self.pattern))
        return (self.pattern * repeats)[: self.num_layers]

    @property
    def period(self) -> tuple[LayerSpec, ...]:
        """The shortest tuple of layers whose repetition is the model; the decoder scans over it."""
        return shortest_period(self.layers)


def shortest_period(layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """The fewest of these layers whose repetition gives all of them."""
    sizes = (size for size in range(1, len(layers) + 1) if len(layers) % size == 0)
    return next(layers[:size] for size in sizes if layers[:size] * (len(layers) // size) == layers)


def irope_layers(
    chunk: int,
    ffn: FfnSpec,
    *,
    theta: float = 500_000.0,
    interval: int = 4,
    temperature: TemperatureSpec | None = None,
    qk_norm: QkNorm = "none",
) -> tuple[LayerSpec, ...]:
    """The period of Llama 4: `interval - 1` chunk-local RoPE layers, then one global NoPE layer with temperature.

    Args:
      chunk: width of the local chunks, in tokens.
      ffn: feed-forward of every layer.
      theta: RoPE base.
      interval: length of the period.
      temperature: of the global layer; Llama 4's `LogFloor()` by default.
      qk_norm: of the local layers; the global one is never normed.
    """
    local = LayerSpec(RoPE(theta=theta), Chunked(chunk), ffn, qk_norm=qk_norm)
    return (local,) * (interval - 1) + (LayerSpec(NoPE(), Global(), ffn, temperature=temperature or LogFloor()),)


def describe_position(spec: PositionSpec) -> str:
    """A position spec in a few words."""
    if not isinstance(spec, RoPE):
        inner = encoding.rotation(spec)
        names = {"nope": "NoPE", "alibi": "ALiBi", "xpos": "xPos", "rerope": "ReRoPE"}
        name = names.get(spec.kind, spec.kind.replace("_", "-"))
        own = [f"{f.name}={getattr(spec, f.name):g}" for f in fields(spec) if f.name != "rope"]
        return " ".join([name, *own, *([f"of {describe_position(inner)}"] if inner else [])])
    words = [f"RoPE theta={spec.theta:g}"]
    if spec.scaling.kind != "unscaled":
        words.append(f"{spec.scaling.kind} x{spec.scaling.factor:g}")
    if spec.fraction < 1:
        words.append(f"{spec.part} {spec.fraction:g}")
    return " ".join(words)


def draw_layers(config: ModelConfig) -> str:
    """The layer pattern as text, a line per layer of the period, with how many times it repeats."""
    period = config.period
    lines = [f"{len(config.layers)} layers = {len(config.layers) // len(period)} x a period of {len(period)}"]
    kinds = {"pre_norm": "", "post_norm": "norms after each part", "parallel": "attention and feed-forward in parallel"}
    words = [kinds[config.block], "layer norm" if config.norm == "layer" else ""]
    words += [f"biases on {config.attention_bias}"] if config.attention_bias != "none" else []
    words += [f"logits times {config.logit_scale:g}"] if config.logit_scale != 1 else []
    if any(words):
        lines.append(f"       {', '.join(filter(None, words))}")
    if not isinstance(config.position_embedding, NoEmbedding):
        lines.append(f"       position embedding: {config.position_embedding}")
    positions = [describe_position(layer.position) for layer in period]
    width = max(18, *map(len, positions))
    for i, (layer, position) in enumerate(zip(period, positions)):
        match layer.mask:
            case Chunked(size=size, by=by, shift=shift):
                mask, bar = f"chunks of {size} by {by}" + (f" shifted {shift}" if shift else ""), "[████][████][████]"
            case Sliding(size=size):
                mask, bar = f"sliding window {size}", "     ▁▂▃▄▅▆▇█     "
            case _:
                mask, bar = "global", "██████████████████"
        extras = [str(layer.temperature)] if not isinstance(layer.temperature, Constant) else []
        extras += [f"qk-norm {layer.qk_norm}"] if layer.qk_norm != "none" else []
        lines.append(f"  {i:>3}  {bar}  {position:<{width}} {mask:<28} {layer.ffn}  {'  '.join(extras)}".rstrip())
    return "\n".join(lines)
