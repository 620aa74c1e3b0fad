"""Small pieces that layers are made of: products with a weight, norms, and RMS norm without a weight."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from irope_jax.core.types import Precision


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: jax.Array, w: jax.Array, axes: int = 1) -> jax.Array:
    """`x` times `w` over the last axes of one and the first of the other, as `jnp.tensordot(x, w, axes)`; reverse mode.

    Its gradient of the weight is a product whose narrower factor is the one that a CPU has to turn round.
    Differentiation by rule would turn the cotangent, and with it all that makes it, element by element.
    """
    return jnp.tensordot(x, w, axes)


def _project_forward(x, w, axes):
    return project(x, w, axes), (x, w)


def _project_backward(axes, saved, dout):
    x, w = saved
    many, outs = x.ndim - axes, w.ndim - axes
    tokens = (tuple(range(many)),) * 2
    dx = lax.dot_general(dout, w, ((tuple(range(many, dout.ndim)), tuple(range(axes, w.ndim))), ((), ())))
    if math.prod(w.shape[:axes]) <= math.prod(w.shape[axes:]):
        return dx, lax.dot_general(x, dout, (tokens, ((), ())))
    dw = lax.dot_general(dout, x, (tokens, ((), ())))
    return dx, dw.transpose(*range(outs, w.ndim), *range(outs))


project.defvjp(_project_forward, _project_backward)


def rms_normalise(x: jax.Array, eps: float, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps)` over the last axis or axes, in float32, in the type of `x`."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axis, keepdims=True) + eps)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """`rms_normalise` in the type of `scale_D`, times `scale_D`; reverse mode, first order.

    Keeps x and one number a token for its backward pass. Sums over tokens and over features are written as products
    with a vector there: a CPU adds up columns many times faster so.
    """
    return _rms_norm(x_BTD, scale_D, eps)[0]


def _rms_norm(x_BTD, scale_D, eps):
    x32 = x_BTD.astype(jnp.float32)
    inverse_BT = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1) + eps)
    return (x32 * inverse_BT[..., None]).astype(scale_D.dtype) * scale_D, inverse_BT


def _rms_norm_forward(x_BTD, scale_D, eps):
    out_BTD, inverse_BT = _rms_norm(x_BTD, scale_D, eps)
    return out_BTD, (x_BTD, scale_D, inverse_BT)


def _rms_norm_backward(eps, saved, dout_BTD):
    x_BTD, scale_D, inverse_BT = saved
    x32, dout32, scale32 = (v.astype(jnp.float32) for v in (x_BTD, dout_BTD, scale_D))
    times_BTD = dout32 * x32
    product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    slope_BT = product("btd,d->bt", times_BTD, scale32) * inverse_BT**2 / x32.shape[-1]
    dx_BTD = inverse_BT[..., None] * (dout32 * scale32 - x32 * slope_BT[..., None])
    return dx_BTD.astype(x_BTD.dtype), product("bt,btd->d", inverse_BT, times_BTD).astype(scale_D.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


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
        scale_D, centred_BTD = scale_D.astype(x_BTD.dtype), x_BTD
        if self.kind == "layer":
            centred_BTD = x_BTD.astype(jnp.float32)
            centred_BTD = centred_BTD - jnp.mean(centred_BTD, axis=-1, keepdims=True)
        return rms_norm(centred_BTD, scale_D, self.eps)
