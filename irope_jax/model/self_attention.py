"""Self-attention of one layer: project, rotate, norm, scale by temperature, attend, project back.

What is specific to a position encoding, a mask or a temperature is asked of their rooms; no case is told apart here.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from irope_jax.attention.mask import Chunked, Global, Sliding, phase_positions, visible_keys
from irope_jax.attention.parts import KeySet, attend_parts
from irope_jax.attention.statistics import Attending, Observer
from irope_jax.attention.stored import KeysValues
from irope_jax.context.api import attend_sharded
from irope_jax.context.cached import attend_cached
from irope_jax.core.config import ConfigError
from irope_jax.core.types import TokenInfo
from irope_jax.model.cache import LayerCache
from irope_jax.model.config import LayerSpec, ModelConfig
from irope_jax.model.layers import project, rms_normalise
from irope_jax.model.remat import named
from irope_jax.position import encoding, temperature
from irope_jax.position.extension import Part
from irope_jax.position.rope import Turns
from irope_jax.sharding.rules import gathered


class SelfAttention(nn.Module):
    """Grouped-query self-attention as its `LayerSpec` says.

    Order of operations: bias, learned qk-norm, rotation, weightless qk-norm (Llama 4), temperature on the queries,
    softmax of `q·k / sqrt(H)`.
    Temperature comes last and touches queries only, so cached keys never depend on it.

    Attributes:
      observe: what it makes of each layer's attention is sown as `observed/found`; None computes nothing. Not asked
        where there is a cache.
    """

    config: ModelConfig
    layer: LayerSpec
    observe: Observer | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, info: TokenInfo, turns: Turns | None = None, cache: LayerCache | None = None
    ) -> tuple[jax.Array, KeysValues | None]:
        """Hidden states `[B, T, D]` to the layer's contribution to the residual stream `[B, T, D]`.

        `turns` are frequencies instead of those that the spec of the layer computes. With a cache, attention goes to
        the tokens before too; its keys and values come back with those of these tokens.
        """
        cfg, layer = self.config, self.layer
        params, compute = jnp.dtype(cfg.precision.params), jnp.dtype(cfg.precision.compute)
        shape = lambda heads: (cfg.d_model, heads, cfg.head_dim)

        def weight(name, axes, dims, std):
            init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
            return gathered(self.param(name, init, dims, params).astype(compute), axes)

        w_q_DNH = weight("query", ("embed", "heads", "head_dim"), shape(cfg.num_heads), cfg.init_std)
        w_k_DKH = weight("key", ("embed", "kv_heads", "head_dim"), shape(cfg.num_kv_heads), cfg.init_std)
        w_v_DKH = weight("value", ("embed", "kv_heads", "head_dim"), shape(cfg.num_kv_heads), cfg.init_std)
        w_o_NHD = weight(
            "out",
            ("heads", "head_dim", "embed"),
            (cfg.num_heads, cfg.head_dim, cfg.d_model),
            cfg.residual_std,
        )
        q_BTNH, k_BTKH, v_BTKH = project(x_BTD, w_q_DNH), project(x_BTD, w_k_DKH), project(x_BTD, w_v_DKH)

        def bias(name: str, axes: tuple[str, ...], dims: tuple[int, ...]) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)
            return self.param(name, init, dims, params).astype(compute)

        if cfg.attention_bias != "none":
            q_BTNH = q_BTNH + bias("query_bias", ("heads", "head_dim"), (cfg.num_heads, cfg.head_dim))
            k_BTKH = k_BTKH + bias("key_bias", ("kv_heads", "head_dim"), (cfg.num_kv_heads, cfg.head_dim))
            v_BTKH = v_BTKH + bias("value_bias", ("kv_heads", "head_dim"), (cfg.num_kv_heads, cfg.head_dim))

        def learned_norm(name: str, x: jax.Array, heads: str) -> jax.Array:
            """RMS norm of each head, or of all heads as one, with a weight."""
            together = layer.qk_norm == "learned_all_heads"
            axes, dims = ((heads, "head_dim"), x.shape[2:]) if together else (("head_dim",), x.shape[3:])
            init = nn.with_logical_partitioning(nn.initializers.ones_init(), axes)
            normed = rms_normalise(x, cfg.norm_eps, axis=(-2, -1) if together else -1)
            return normed * self.param(name, init, dims, params).astype(compute)

        q_BTNH, k_BTKH, v_BTKH = named(q_BTNH, "query"), named(k_BTKH, "key"), named(v_BTKH, "value")
        if layer.qk_norm in ("learned", "learned_all_heads"):
            q_BTNH = learned_norm("query_norm", q_BTNH, "heads")
            k_BTKH = learned_norm("key_norm", k_BTKH, "kv_heads")

        learned_N = None
        if temperature.is_learned(layer.temperature):
            init = nn.with_logical_partitioning(nn.initializers.constant(layer.temperature.initial), ("heads",))
            learned_N = self.param("temperature", init, (cfg.num_heads,), params)
        factor_BTN = temperature.scale(layer.temperature, info, visible_keys(layer.mask, info), learned_N)

        def finish(q_BTNH: jax.Array, k_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
            """What follows the rotation."""
            if layer.qk_norm == "rms":
                q_BTNH, k_BTKH = rms_normalise(q_BTNH, cfg.norm_eps), rms_normalise(k_BTKH, cfg.norm_eps)
            if factor_BTN is not None:
                q_BTNH = (q_BTNH * factor_BTN[..., None]).astype(compute)
            return q_BTNH, k_BTKH

        # A magnitude that a RoPE scaling asks for goes into the scale: in cos and sin, qk-norm would cancel it.
        scale = cfg.head_dim**-0.5 * encoding.logit_factor(layer.position, cfg.head_dim)
        plain = info.replace(offsets=None, spreads=None)  # who sees whom does not depend on them
        parts, kept = encoding.encode_parts(layer.position, q_BTNH, k_BTKH, info, turns=turns), None
        if parts is not None:
            sets = [_key_set(*finish(q, k), part) for q, k, part in parts]
            self._observed(info, sets, scale)
            out_BTNH = _in_parts(sets, v_BTKH, scale, cfg.attention)
        else:
            relative = encoding.is_relative(layer.position)
            at_BT = phase_positions(layer.mask, info) if relative else info.positions
            reach = layer.mask.size if isinstance(layer.mask, Chunked) else None
            reach = cache.longest if reach is None and cache is not None else reach
            encoded = encoding.encode(layer.position, q_BTNH, k_BTKH, info, at_BT, turns=turns, longest=reach)
            q_BTNH, k_BTKH = finish(*encoded)
            slopes_N = encoding.slopes(layer.position, cfg.num_heads)
            if cache is None:
                self._observed(info, [KeySet(q_BTNH, k_BTKH, plain, plain, layer.mask)], scale, slopes_N)
            with jax.named_scope("attend"):
                if cache is None:
                    out_BTNH = attend_sharded(
                        q_BTNH, k_BTKH, v_BTKH, plain, plain, layer.mask,
                        scale=scale, slopes=slopes_N, impl=cfg.attention, context=cfg.context,
                    )  # fmt: skip
                else:
                    out_BTNH, kept = attend_cached(
                        q_BTNH, k_BTKH, v_BTKH, plain, cache.kept, cache.places, layer.mask,
                        scale=scale, slopes=slopes_N, impl=cfg.attention, repeat=cache.repeat,
                        earlier=cache.earlier, asked=cache.asked,
                    )  # fmt: skip
        out_BTD = project(out_BTNH, w_o_NHD, 2)
        if cfg.attention_bias == "all":
            out_BTD = out_BTD + bias("out_bias", ("features",), (cfg.d_model,))
        return out_BTD, kept

    def _observed(self, info: TokenInfo, sets: list[KeySet], scale: float, slopes_N: jax.Array | None = None) -> None:
        if self.observe is not None:
            found = self.observe(Attending(info, self.layer.mask, tuple(sets), scale, slopes_N))
            self.sow("observed", "found", found, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def _key_set(q_BTNH: jax.Array, k_BTKH: jax.Array, part: Part) -> KeySet:
    mask = Sliding(part.window) if part.window else Chunked(part.chunk) if part.chunk else Global()
    q_info, k_info = (info.replace(offsets=None, spreads=None) for info in (part.q_info, part.k_info))
    return KeySet(q_BTNH, k_BTKH, q_info, k_info, mask)


def _in_parts(sets: list[KeySet], v_BTKH: jax.Array, scale: float, impl: str | None) -> jax.Array:
    """Attention in several parts; every device needs the whole sequence of its rows for it.

    Raises:
      ConfigError: a mesh that cuts the sequence.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["context"] > 1:
        fix = "attention in several parts (SelfExtend, ReRoPE, dual chunk) needs whole sequences; use mesh.context=1"
        raise ConfigError("mesh.context", mesh.shape["context"], fix)
    return attend_parts(sets, v_BTKH, scale=scale, impl=impl)
