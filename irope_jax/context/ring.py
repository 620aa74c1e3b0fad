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

from dataclasses import dataclass
from functools import partial as bind

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from irope_jax.attention.mask import MaskSpec
from irope_jax.attention.panels import Panel, Pieces, whole
from irope_jax.attention.partial import Partial, finish
from irope_jax.context.coordinates import Coordinates
from irope_jax.context.layout import ContextLayout
from irope_jax.context.strategy import Gradients
from irope_jax.core.types import Array, TokenInfo


@dataclass(frozen=True)
class Ring:
    """Who is whose neighbour, and what each piece holds.

    Attributes:
      parts: pieces of the sequence.
      layout: order of the tokens over `parts` pieces; `None` if unknown.
      axis: mesh axis.
      stride: devices between neighbours; more than 1 where groups of devices hold a piece together.
      gradients: format in which gradients of keys and values travel.
    """

    parts: int
    layout: ContextLayout | None
    axis: str = "context"
    stride: int = 1
    gradients: Gradients = "float32"

    def place(self) -> jax.Array:
        """Which piece is this device's own."""
        return lax.axis_index(self.axis) // self.stride

    def send(self, tree, hops: int = 1):
        """Every piece to the device `hops` further on."""
        pairs = [
            (piece * self.stride + i, (piece + hops) % self.parts * self.stride + i)
            for piece in range(self.parts)
            for i in range(self.stride)
        ]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), tree)

    def relations(self) -> tuple[str, ...]:
        """What the panels of this ring will be."""
        return ("any",) if self.layout is None else ("same", "past")

    def visible(self, mine, source):
        """Whether a piece of keys holds anything before some own query; `True` if that is always so or unknown."""
        return source < mine if self.layout is not None and self.layout.kind == "contiguous" else True

    def own_panels(self, length: int) -> tuple[Panel, ...]:
        """What is computed of the own keys."""
        return whole(length, length, self.relations()[0])

    def panels(self, length: int, mine, source) -> tuple[Panel, ...]:
        """What a hop computes; pieces have `length` places."""
        if self.layout is None:
            return whole(length, length, "any")
        if self.layout.runs_per_piece == 1:
            return whole(length, length, "past")
        half = length // 2
        other = jnp.where(source < mine, 0, half)
        return Panel(half, half, 0, half, "past"), Panel(other, half, other, half, "past")


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
    return _ring(q_BTNH, k_BSKH, v_BSKH, info, slopes, mask, scale, pieces, ring)


@bind(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _ring(q, k, v, info, slopes, mask, scale, pieces, ring):
    return _forward(q, k, v, info, slopes, mask, scale, pieces, ring)[0]


def _for_kernel(pieces: Pieces, x):
    return jnp.swapaxes(x, 1, 2) if pieces.head_major else x


def _forward(q, k, v, info, slopes, mask, scale, pieces, ring):
    coordinates, mine = Coordinates.of(info, ring.layout, mask), ring.place()
    saved, out_like = (q, k, v, info, slopes), q
    q, k, v = (_for_kernel(pieces, x) for x in (q, k, v))
    fold = bind(pieces.fold, mask=mask, scale=scale, slopes=slopes)
    own_panels, panels = ring.own_panels(info.shape[1]), bind(ring.panels, info.shape[1], mine)

    def hop(acc, t, moving):
        k, v, cargo = moving
        source = (mine - t) % ring.parts
        k_info = coordinates.unload(cargo, source, info)
        look = lambda acc: fold(acc, q, k, v, info, k_info, panels=panels(source))
        seen = ring.visible(mine, source)
        return look(acc) if seen is True else lax.cond(seen, look, lambda acc: acc, acc)

    def step(state, t):
        acc, moving = state
        coming = ring.send(moving)
        return (hop(acc, t, moving), coming), None

    coming = ring.send((k, v, coordinates.cargo(info))) if ring.parts > 1 else None
    acc = fold(Partial.empty(*out_like.shape), q, k, v, info, info, panels=own_panels)
    if ring.parts > 2:
        (acc, coming), _ = lax.scan(step, (acc, coming), jnp.arange(1, ring.parts - 1))
    if ring.parts > 1:
        acc = hop(acc, ring.parts - 1, coming)
    out = checkpoint_name(finish(acc, out_like.dtype), "attention_out")
    lse = checkpoint_name(acc.log_sum_exp, "attention_lse")
    return out, (*saved, out, lse)


def _backward(mask, scale, pieces, ring, saved, dout):
    q, k, v, info, slopes, out, lse = saved
    coordinates, mine = Coordinates.of(info, ring.layout, mask), ring.place()
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    like = q, k, v
    q, k, v, dout = (_for_kernel(pieces, x) for x in (q, k, v, dout))
    contribute = bind(pieces.contribute, mask=mask, scale=scale, slopes=slopes)
    own_panels, panels = ring.own_panels(info.shape[1]), bind(ring.panels, info.shape[1], mine)
    packed = k.dtype if ring.gradients == "keys" else jnp.float32

    def hop(dq, t, moving):
        k, v, cargo = moving
        source = (mine - t) % ring.parts
        k_info = coordinates.unload(cargo, source, info)
        look = lambda dq: contribute(dq, q, k, v, dout, lse, delta, info, k_info, panels=panels(source))
        blank = lambda dq: (dq, jnp.zeros(k.shape), jnp.zeros(v.shape))
        seen = ring.visible(mine, source)
        dq, *fresh = look(dq) if seen is True else lax.cond(seen, look, blank, dq)
        return dq, tuple(fresh)

    def send(homing, hops=1):
        moved = ring.send(jax.tree.map(lambda x: x.astype(packed), homing), hops)
        return jax.tree.map(lambda x: x.astype(jnp.float32), moved)

    def add(a, b):
        return jax.tree.map(jnp.add, a, b)

    def step(state, t):
        dq, homing, moving = state
        coming, homing = ring.send(moving), send(homing)
        dq, fresh = hop(dq, t, moving)
        return (dq, add(homing, fresh), coming), None

    sizes = dict(zip("BTNH", like[0].shape))
    dq, homing = jnp.zeros([sizes[axis] for axis in pieces.dq_axes]), None
    if ring.parts > 1:
        moving = ring.send((k, v, coordinates.cargo(info)))
        coming = ring.send(moving) if ring.parts > 2 else None
        dq, homing = hop(dq, 1, moving)
        if ring.parts > 3:
            state = (dq, homing, coming)
            (dq, homing, coming), _ = lax.scan(step, state, jnp.arange(2, ring.parts - 1))
        if ring.parts > 2:
            homing = send(homing)
            dq, fresh = hop(dq, ring.parts - 1, coming)
            homing = add(homing, fresh)
        homing = send(homing, 1 - ring.parts)  # home, while the own keys are dealt with
    dq, *fresh = contribute(dq, q, k, v, dout, lse, delta, info, info, panels=own_panels)
    dk, dv = fresh if homing is None else add(homing, tuple(fresh))
    dq = dq.transpose([pieces.dq_axes.index(axis) for axis in "BTNH"])
    grads = dq, _for_kernel(pieces, dk), _for_kernel(pieces, dv)
    return *(g.astype(x.dtype) for g, x in zip(grads, like)), None, None


_ring.defvjp(_forward, _backward)
