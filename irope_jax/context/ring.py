"""Ring attention: keys travel from device to device, every device folds what passes (Liu et al. 2023).

At hop t device r holds the keys of device r - t. While it computes with them they are already on their way to the next
one. Running sums stay float32 until the last hop; grouped keys travel once, never repeated. In zigzag order each hop
needs the same two half-by-half panels on every device, neither of which causality touches (d: own halves, s: the
source's):

    always (high d, low s);    and (low d, low s) if s is an earlier device, else (high d, high s)

so what no query can see is not computed, and no device waits for another. In contiguous order a hop from a later device
is left out, but others wait. The backward pass turns the ring a second time; gradients of keys and values are
collected on the way, first by the device after their owner's, and need as many sends as the keys did.

Everything here runs inside `shard_map`; shapes are per device.
"""

from __future__ import annotations

from functools import partial as bind

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from irope_jax.attention.mask import MaskSpec
from irope_jax.attention.panels import Pieces
from irope_jax.attention.partial import finish
from irope_jax.context import direct
from irope_jax.context.hops import Hops, Ring, for_kernel
from irope_jax.core.types import Array, TokenInfo


def ring_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    info: TokenInfo,
    mask: MaskSpec,
    *,
    scale: float,
    slopes: Array | None,
    pieces: Pieces,
    ring: Ring,
) -> Array:
    """Attention output `[B, T, N, H]` of this device's queries to the keys of all devices of the ring.

    Args:
      info: coordinates of this device's tokens, which are queries and keys.
      pieces: the kernel.
      others: as for `attention.attend`.
    """
    return _attend(q_BTNH, k_BSKH, v_BSKH, info, slopes, mask, scale, pieces, ring)


@bind(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _attend(q, k, v, info, slopes, mask, scale, pieces, ring):
    return _attend_forward(q, k, v, info, slopes, mask, scale, pieces, ring)[0]


def _attend_forward(q, k, v, info, slopes, mask, scale, pieces, ring):
    info = info.tied_to(q)
    hops = Hops(q, k, v, info, slopes, mask, scale, pieces, ring)
    acc = (direct.forward if ring.direct else _forward)(hops)
    out = checkpoint_name(finish(acc, q.dtype), "attention_out")
    lse = checkpoint_name(acc.log_sum_exp, "attention_lse")
    return out, (q, k, v, info, slopes, out, lse)


def _attend_backward(mask, scale, pieces, ring, saved, dout):
    q, k, v, info, slopes, out, lse = saved
    hops = Hops(q, k, v, info, slopes, mask, scale, pieces, ring)
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    dq, dk, dv = (direct.backward if ring.direct else _backward)(hops, for_kernel(pieces, dout), lse, delta)
    dq = dq.transpose([pieces.dq_axes.index(axis) for axis in "BTNH"])
    grads = dq, for_kernel(pieces, dk), for_kernel(pieces, dv)
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v))), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(hops: Hops):
    ring = hops.ring

    def step(state, t):
        acc, cargo = state
        coming = ring.send(cargo)
        return (hops.fold(acc, t, cargo), coming), None

    coming = ring.send(hops.cargo) if ring.parts > 1 else None
    acc = hops.fold_own()
    if ring.parts > 2:
        (acc, coming), _ = lax.scan(step, (acc, coming), jnp.arange(1, ring.parts - 1))
    return hops.fold(acc, ring.parts - 1, coming) if ring.parts > 1 else acc


def _backward(hops: Hops, dout, lse, delta):
    ring = hops.ring
    packed = hops.k.dtype if ring.gradients == "keys" else jnp.float32

    def send(homing, distance=1):
        moved = ring.send(jax.tree.map(lambda x: x.astype(packed), homing), distance)
        return jax.tree.map(lambda x: x.astype(jnp.float32), moved)

    def add(a, b):
        return jax.tree.map(jnp.add, a, b)

    def step(state, t):
        dq, homing, cargo = state
        coming, homing = ring.send(cargo), send(homing)
        dq, fresh = hops.contribute(dq, dout, lse, delta, t, cargo)
        return (dq, add(homing, fresh), coming), None

    dq = hops.blank_dq()
    if ring.parts == 1:
        dq, (dk, dv) = hops.contribute_own(dq, dout, lse, delta)
        return dq, dk, dv
    first = ring.send(hops.cargo)
    coming = ring.send(first) if ring.parts > 2 else None
    dq, homing = hops.contribute(dq, dout, lse, delta, 1, first)
    if ring.parts > 3:
        state = (dq, homing, coming)
        (dq, homing, coming), _ = lax.scan(step, state, jnp.arange(2, ring.parts - 1))
    if ring.parts > 2:
        homing = send(homing)
        dq, fresh = hops.contribute(dq, dout, lse, delta, ring.parts - 1, coming)
        homing = add(homing, fresh)
    homing = send(homing, 1 - ring.parts)  # home, while the own keys are dealt with
    dq, fresh = hops.contribute_own(dq, dout, lse, delta)
    return dq, *add(homing, fresh)
