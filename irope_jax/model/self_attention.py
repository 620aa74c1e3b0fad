"""Self-attention of one layer: project, rotate, norm, scale by temperature, attend, project back.

What is specific to a position encoding, a mask or a temperature is asked of their rooms; no case is told apart here.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from irope_jax.attention.mask import phase_positions
from irope_jax.context.api import attend_sharded
from irope_jax.core.types import TokenInfo
from irope_jax.model.config import LayerSpec, ModelConfig
from irope_jax.model.layers import rms_normalise
from irope_jax.position import temperature
from irope_jax.position.encoding import encode, logit_factor


class SelfAttention(nn.Module):
    """Grouped-query self-attention as its `LayerSpec` says.

    Order of operations (Llama 4): rotation, weightless qk-norm, temperature on the queries, softmax of `q·k / sqrt(H)`.
    Temperature comes last and touches queries only, so cached keys never depend on it.
    """

    config: ModelConfig
    layer: LayerSpec

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo) -> jax.Array:
        """Hidden states `[B, T, D]` to the layer's contribution to the residual stream `[B, T, D]`."""
        cfg, layer = self.config, self.layer
        params, compute = jnp.dtype(cfg.precision.params), jnp.dtype(cfg.precision.compute)
        shape = lambda heads: (cfg.d_model, heads, cfg.head_dim)

        def weight(name, axes, dims, std):
            init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
            return self.param(name, init, dims, params).astype(compute)

        w_q_DNH = weight("query", ("embed", "heads", "head_dim"), shape(cfg.num_heads), cfg.init_std)
        w_k_DKH = weight("key", ("embed", "kv_heads", "head_dim"), shape(cfg.num_kv_heads), cfg.init_std)
        w_v_DKH = weight("value", ("embed", "kv_heads", "head_dim"), shape(cfg.num_kv_heads), cfg.init_std)
        w_o_NHD = weight(
            "out",
            ("heads", "head_dim", "embed"),
            (cfg.num_heads, cfg.head_dim, cfg.d_model),
            cfg.residual_std,
        )
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, w_q_DNH)
        k_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, w_k_DKH)
        v_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, w_v_DKH)

        phases_BT = phase_positions(layer.mask, info)
        q_BTNH, k_BTKH = encode(layer.position, q_BTNH, k_BTKH, phases_BT, phases_BT)
        if layer.qk_norm == "rms":
            q_BTNH, k_BTKH = rms_normalise(q_BTNH, cfg.norm_eps), rms_normalise(k_BTKH, cfg.norm_eps)
        factor_BT = temperature.scale(layer.temperature, info.positions)
        if factor_BT is not None:
            q_BTNH = (q_BTNH * factor_BT[..., None, None]).astype(compute)

        # A magnitude that a RoPE scaling asks for goes into the scale: in cos and sin, qk-norm would cancel it.
        scale = cfg.head_dim**-0.5 * logit_factor(layer.position, cfg.head_dim)
        out_BTNH = attend_sharded(
            q_BTNH, k_BTKH, v_BTKH, info, info, layer.mask, scale=scale, impl=cfg.attention, context=cfg.context
        )
        return jnp.einsum("BTNH,NHD->BTD", out_BTNH, w_o_NHD)
