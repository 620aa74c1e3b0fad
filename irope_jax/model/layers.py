"""Small pieces that layers are made of: norms, and RMS norm without a weight."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from irope_jax.core.types import Precision


def rms_normalise(x: jax.Array, eps: float, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps)` over the last axis or axes, in float32, in the type of `x`."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axis, keepdims=True) + eps)).astype(x.dtype)


class Norm(nn.Module):
    """RMS norm (Zhang & Sennrich 2019) or layer norm (Ba et al. 2016), with a learned weight per feature and no bias.

    float32 inside; the normalised value is rounded to the compute type before the weight multiplies it, as Llama does.

    Attributes:
      kind: `rms`, or `layer`, which subtracts the mean first.
    """

    kind: Literal["rms", "layer"]
    eps: float
    precision: Precision

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        scale_D = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones_init(), ("features",)),
            (x_BTD.shape[-1],),
            jnp.dtype(self.precision.params),
        )
        centred = x_BTD.astype(jnp.float32)
        if self.kind == "layer":
            centred = centred - jnp.mean(centred, axis=-1, keepdims=True)
        return rms_normalise(centred, self.eps).astype(x_BTD.dtype) * scale_D.astype(x_BTD.dtype)
