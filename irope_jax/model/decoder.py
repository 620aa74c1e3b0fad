"""The decoder: embed, scan over the layer period, final norm. Losses and sampling start from its hidden states."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from irope_jax.attention.statistics import Observer
from irope_jax.attention.stored import KeysValues
from irope_jax.core.config import ConfigError
from irope_jax.core.types import TokenInfo
from irope_jax.model import remat
from irope_jax.model.cache import KVCache, LayerCache, Reading, begin, layer_cache
from irope_jax.model.config import LayerSpec, ModelConfig
from irope_jax.model.feed_forward import FeedForward
from irope_jax.model.layers import Norm
from irope_jax.model.moe import MixtureOfExperts, MoE
from irope_jax.model.remat import named
from irope_jax.model.routing import RouterSums
from irope_jax.model.self_attention import SelfAttention
from irope_jax.position.absolute import Learned, Sinusoidal, sinusoids
from irope_jax.position.rope import Turns
from irope_jax.position.temperature import is_learned
from irope_jax.sharding.lookup import look_up
from irope_jax.sharding.rules import constrain, embed_axis, gathered

PeriodTurns = tuple[Turns | None, ...] | None


class DecoderLayer(nn.Module):
    """One layer: attention and the feed-forward part added to the residual stream, as `ModelConfig.block` says."""

    config: ModelConfig
    layer: LayerSpec
    observe: Observer | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, info: TokenInfo, turns: Turns | None = None, cache: LayerCache | None = None
    ) -> jax.Array | tuple[jax.Array, KeysValues]:
        """Hidden states; with a cache, also its keys and values with those of these tokens."""
        kept = []

        def attention(x_BTD):
            out_BTD, mine = self_attention(x_BTD, info, turns, cache)
            kept.append(mine)
            return out_BTD

        cfg, ffn = self.config, self.layer.ffn
        norm = lambda name: Norm(cfg.norm, cfg.norm_eps, cfg.precision, name=name)
        self_attention = SelfAttention(cfg, self.layer, self.observe, name="attention")
        options = dict(precision=cfg.precision, init_std=cfg.init_std, out_std=cfg.residual_std, name="feed_forward")
        if isinstance(ffn, MoE):
            mixture = MixtureOfExperts(ffn, **options)
            feed_forward = lambda x_BTD: mixture(x_BTD, info, cut=embed_axis(cache is not None))
        else:
            feed_forward = FeedForward(ffn, **options)
        # Named inside what is checkpointed: the layer then starts from the named one, which may lie on the host.
        x_BTD = named(constrain(x_BTD, "batch", "length", "features"), "layer_input")
        match cfg.block:
            case "pre_norm":
                normed_BTD = named(norm("attention_norm")(x_BTD), "attention_input")
                x_BTD = named(x_BTD + attention(normed_BTD), "after_attention")
                x_BTD = x_BTD + feed_forward(named(norm("feed_forward_norm")(x_BTD), "feed_forward_input"))
            case "post_norm":
                x_BTD = named(x_BTD + norm("attention_norm")(attention(x_BTD)), "after_attention")
                x_BTD = x_BTD + norm("feed_forward_norm")(feed_forward(x_BTD))
            case "parallel":
                normed_BTD = named(norm("attention_norm")(x_BTD), "attention_input")
                x_BTD = x_BTD + attention(normed_BTD) + feed_forward(normed_BTD)
        return x_BTD if cache is None else (x_BTD, kept[0])


def checkpointed_layer(config: ModelConfig) -> type[DecoderLayer]:
    """`DecoderLayer` that keeps for its backward pass what `config.remat` says."""
    policy = remat.policy(config.remat)
    return DecoderLayer if policy is None else nn.remat(DecoderLayer, policy=policy, prevent_cse=False)


class Period(nn.Module):
    """The layers that repeat, in order; the body of the scan."""

    config: ModelConfig
    observe: Observer | None = None

    @nn.compact
    def __call__(
        self, carry: Any, info: TokenInfo, turns: PeriodTurns = None, reading: Reading | None = None
    ) -> tuple[Any, None]:
        """`carry` is `x_BTD`; with a cache `(x_BTD, its layers, number of the repeat)`.

        The cache is carried and not scanned over: each repeat writes its tokens where they belong and copies nothing.
        """
        cfg, turns = self.config, turns or [None] * len(self.config.period)
        if reading is None:
            cls = checkpointed_layer(self.config)
            for i, layer in enumerate(cfg.period):
                carry = cls(cfg, layer, self.observe, name=f"layer_{i}")(carry, info, turns[i])
            return carry, None
        x_BTD, kept, repeat = carry
        kept = list(kept)
        for i, layer in enumerate(cfg.period):
            cache = layer_cache(cfg, kept[i], repeat, reading, i)
            x_BTD, kept[i] = DecoderLayer(cfg, layer, name=f"layer_{i}")(x_BTD, info, turns[i], cache)
        return (x_BTD, tuple(kept), repeat + 1), None


class Decoder(nn.Module):
    """Tokens and their coordinates to hidden states.

    Parameters of the layers are stacked over the repeats of the period (leading axis R), whatever the depth, so compile
    time does not grow with it. But for what is learned of positions (`SSMax`, a learned position embedding) they do not
    depend on positions, masks or temperatures: a model with another `pattern` of the same shapes uses the same
    parameters, after `restack` if its period is another.

    Attributes:
      observe: asked about the attention of every layer (`observed_attention`); None costs nothing.
    """

    config: ModelConfig
    observe: Observer | None = None

    def setup(self):
        cfg = self.config
        params = jnp.dtype(cfg.precision.params)
        init = nn.initializers.normal(cfg.init_std)
        init_embedding = init if cfg.embedding_init_std is None else nn.initializers.normal(cfg.embedding_init_std)
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(init_embedding, ("vocab", "embed")),
            (cfg.vocab_size, cfg.d_model),
            params,
        )
        if isinstance(cfg.position_embedding, Learned):
            self.position_table = self.param(
                "position_table",
                nn.with_logical_partitioning(init_embedding, ("positions", "embed")),
                (cfg.position_embedding.size, cfg.d_model),
                params,
            )
        if cfg.output_head == "untied":
            self.head = self.param(
                "head", nn.with_logical_partitioning(init, ("embed", "vocab")), (cfg.d_model, cfg.vocab_size), params
            )
        scanned = nn.scan(
            Period,
            variable_axes={"params": 0, "router": 0, "observed": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.num_layers // len(cfg.period),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.periods = scanned(cfg, self.observe)
        self.final_norm = Norm(cfg.norm, cfg.norm_eps, cfg.precision)

    def __call__(
        self,
        tokens_BT: jax.Array,
        info: TokenInfo,
        turns: PeriodTurns = None,
        cache: KVCache | None = None,
        asked_BT: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Hidden states `[B, T, D]` after the final norm, times `logit_scale`, in the compute type.

        Args:
          tokens_BT, info: tokens and where they are.
          turns: per layer of the period, frequencies to turn by instead of the layer's own, or None.
          cache: of the tokens before (`KVCache.next_info` gives coordinates that go on); then the cache with these
            comes back too. A row that has no room for them gets NaN.
          asked_BT: bool, with a cache: the tokens whose hidden states are wanted, others may be wrong. The last layer
            then attends for them only, which for long prompts is most of what it does.
        """
        compute = jnp.dtype(self.config.precision.compute)
        cut = embed_axis(cache is not None)
        x_BTD = look_up(self.embedding, tokens_BT, compute, cut)
        match self.config.position_embedding:
            case Sinusoidal() as spec:
                x_BTD = x_BTD + sinusoids(spec, info.positions, self.config.d_model).astype(compute)
            case Learned(size):
                if tokens_BT.shape[1] > size:
                    fix = f"a row has {tokens_BT.shape[1]} positions, for which nothing was learned; use shorter rows"
                    raise ConfigError("model.position_embedding.size", size, fix)
                x_BTD = x_BTD + look_up(self.position_table, info.positions, compute, cut)
        if cache is None:
            x_BTD, _ = self.periods(x_BTD, info, turns)
            return self._finish(x_BTD)
        cache, reading = begin(cache, info, asked_BT)
        start = (x_BTD, cache.layers, jnp.zeros((), jnp.int32))
        (x_BTD, layers, _), _ = self.periods(start, info, turns, reading)
        x_BTD = jnp.where(reading.full[:, None, None], jnp.nan, self._finish(x_BTD))
        return x_BTD, cache.replace(layers=layers)

    def _finish(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = self.final_norm(x_BTD)
        return x_BTD if self.config.logit_scale == 1 else x_BTD * self.config.logit_scale

    def head_matrix(self) -> jax.Array:
        """`w_DV`, in the compute type: logits are `hidden @ w_DV`."""
        w_DV = self.embedding.T if self.config.output_head == "tied" else self.head
        return gathered(w_DV.astype(jnp.dtype(self.config.precision.compute)), ("embed", "vocab"))


def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Fresh parameters, boxed with their logical axes (`sharding.tree_shardings` reads them)."""
    # Shapes do not depend on how attention is computed; the plain definition on one token is the least to compile.
    config = dataclasses.replace(config, attention="reference", remat="none")
    # It runs on one token, which no mesh divides; so none is in force.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32), TokenInfo.single(1, 1))["params"]


def restack(params: Any, source: ModelConfig, target: ModelConfig, *, fresh_temperatures: bool = False) -> Any:
    """Parameters of `source` stacked as `target` scans over them: layer i stays layer i, whatever the periods.

    Args:
      fresh_temperatures: of parameters, not of what mirrors them: a learned temperature that a layer of `target` has
        and that of `source` has not begins as in a fresh model (its mean over the training length is 1), and one that
        `target` has not is left out. Otherwise both must have the same.

    Raises:
      ConfigError: the two have different numbers of layers.
    """
    if source.num_layers != target.num_layers:
        raise ConfigError(
            "num_layers", target.num_layers, f"the parameters are of a model with {source.num_layers} layers"
        )
    old, new = len(source.period), len(target.period)
    if old == new and not fresh_temperatures:
        return params
    stacks = params["periods"]
    layers = [
        jax.tree.map(lambda w, repeat=i // old: w[repeat], stacks[f"layer_{i % old}"]) for i in range(source.num_layers)
    ]
    if fresh_temperatures:
        layers = [_tempered(layer, target, target.period[i % new]) for i, layer in enumerate(layers)]
    restacked = {f"layer_{i}": jax.tree.map(lambda *w: jnp.stack(w), *layers[i::new]) for i in range(new)}
    return {**params, "periods": restacked}


def _tempered(params: Any, target: ModelConfig, layer: LayerSpec) -> Any:
    """Parameters of one layer with the learned temperature that `layer` of `target` has, or without."""
    attention = {name: value for name, value in params["attention"].items() if name != "temperature"}
    if is_learned(layer.temperature):
        fresh = jnp.full((target.num_heads,), layer.temperature.initial, jnp.dtype(target.precision.params))
        attention["temperature"] = params["attention"].get("temperature", fresh)
    return {**params, "attention": attention}


def hidden_states(
    config: ModelConfig, params: Any, tokens_BT: jax.Array, info: TokenInfo, turns: PeriodTurns = None
) -> tuple[jax.Array, jax.Array]:
    """`(hidden_BTD, w_DV)`: what a loss or a sampler needs."""
    decoder = Decoder(config)
    variables = {"params": params}
    return decoder.apply(variables, tokens_BT, info, turns), decoder.apply(variables, method="head_matrix")


def cached_hidden_states(
    config: ModelConfig,
    params: Any,
    tokens_BT: jax.Array,
    info: TokenInfo,
    cache: KVCache,
    asked_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """`(hidden_BTD, w_DV, cache)`: tokens that follow those of the cache; hidden states right where they are asked."""
    decoder = Decoder(config)
    variables = {"params": params}
    hidden_BTD, cache = decoder.apply(variables, tokens_BT, info, cache=cache, asked_BT=asked_BT)
    return hidden_BTD, decoder.apply(variables, method="head_matrix"), cache


def routed_hidden_states(
    config: ModelConfig, params: Any, tokens_BT: jax.Array, info: TokenInfo
) -> tuple[jax.Array, jax.Array, dict[str, RouterSums]]:
    """`hidden_states`, and what the routers of mixtures did, by layer of the period, stacked over its repeats."""
    decoder = Decoder(config)
    variables = {"params": params}
    hidden_BTD, sown = decoder.apply(variables, tokens_BT, info, mutable=["router"])
    layers = sown.get("router", {}).get("periods", {})
    sums = {name: layer["feed_forward"]["sums"] for name, layer in layers.items()}
    return hidden_BTD, decoder.apply(variables, method="head_matrix"), sums


def observed_attention(
    config: ModelConfig, params: Any, tokens_BT: jax.Array, info: TokenInfo, observe: Observer
) -> tuple[Any, ...]:
    """What `observe` makes of the attention of each layer of the period, in order, stacked over its repeats (R)."""
    decoder = Decoder(config, observe)
    _, sown = decoder.apply({"params": params}, tokens_BT, info, mutable=["observed"])
    layers = sown["observed"]["periods"]
    return tuple(layers[f"layer_{i}"]["attention"]["found"] for i in range(len(config.period)))


def logits(config: ModelConfig, params: Any, tokens_BT: jax.Array, info: TokenInfo) -> jax.Array:
    """Float32 `[B, T, V]`; for tests and short sequences, since the whole array is made."""
    hidden_BTD, w_DV = hidden_states(config, params, tokens_BT, info)
    return jnp.einsum("BTD,DV->BTV", hidden_BTD, w_DV, preferred_element_type=jnp.float32)
