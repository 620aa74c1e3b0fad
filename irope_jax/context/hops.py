"""What a device computes with the keys of another one, however they came: shared by the ways that bring them.

Everything here runs inside `shard_map`; shapes are per device.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from irope_jax.attention.mask import MaskSpec
from irope_jax.attention.panels import Panel, Pieces, whole
from irope_jax.attention.partial import Partial
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
      direct: pieces go straight to the devices that see something of them (`direct`), not from neighbour to neighbour.
    """

    parts: int
    layout: ContextLayout | None
    axis: str = "context"
    stride: int = 1
    gradients: Gradients = "float32"
    direct: bool = False

    def place(self) -> jax.Array:
        """Which piece is this device's own."""
        return lax.axis_index(self.axis) // self.stride

    def send(self, tree, hops: int = 1, senders=None):
        """Pieces to the devices `hops` further on: those in `senders`, or all. Who gets none has zeros."""
        pairs = [
            (piece * self.stride + i, (piece + hops) % self.parts * self.stride + i)
            for piece in (range(self.parts) if senders is None else senders)
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


def for_kernel(pieces: Pieces, x: Array) -> Array:
    """`[B, T, heads, H]` to the order of axes that a kernel reads, or back."""
    return jnp.swapaxes(x, 1, 2) if pieces.head_major else x


class Hops:
    """The queries of this device, and what becomes of the keys that pass.

    `cargo` is what travels: keys, values, and the coordinates that cannot be computed.
    """

    def __init__(self, q, k, v, info: TokenInfo, slopes, mask: MaskSpec, scale: float, pieces: Pieces, ring: Ring):
        self.ring, self.pieces, self.info, self.out_shape = ring, pieces, info, q.shape
        self.coordinates, self.mine = Coordinates.of(info, ring.layout, mask), ring.place()
        self.q, self.k, self.v = (for_kernel(pieces, x) for x in (q, k, v))
        self.options = {"mask": mask, "scale": scale, "slopes": slopes}
        self.own_panels = ring.own_panels(info.shape[1])
        self.cargo = (self.k, self.v, self.coordinates.cargo(info))

    def fold_own(self) -> Partial:
        acc = Partial.empty(*self.out_shape)
        infos = (self.info, self.info)
        return self.pieces.fold(acc, self.q, self.k, self.v, *infos, panels=self.own_panels, **self.options)

    def fold(self, acc: Partial, t, cargo) -> Partial:
        """`acc` with the keys of the device `t` before this one."""
        k, v, k_info, panels, seen = self._arrived(t, cargo)
        look = lambda acc: self.pieces.fold(acc, self.q, k, v, self.info, k_info, panels=panels, **self.options)
        return look(acc) if seen is True else lax.cond(seen, look, lambda acc: acc, acc)

    def blank_dq(self) -> Array:
        sizes = dict(zip("BTNH", self.out_shape))
        return jnp.zeros([sizes[axis] for axis in self.pieces.dq_axes])

    def contribute_own(self, dq, dout, lse, delta):
        given = (dq, self.q, self.k, self.v, dout, lse, delta, self.info, self.info)
        dq, *fresh = self.pieces.contribute(*given, panels=self.own_panels, **self.options)
        return dq, tuple(fresh)

    def contribute(self, dq, dout, lse, delta, t, cargo):
        """`dq` with what the keys of the device `t` before this one add, and the gradients of those keys and values."""
        k, v, k_info, panels, seen = self._arrived(t, cargo)
        given = (self.q, k, v, dout, lse, delta, self.info, k_info)
        look = lambda dq: self.pieces.contribute(dq, *given, panels=panels, **self.options)
        blank = lambda dq: (dq, jnp.zeros(k.shape), jnp.zeros(v.shape))
        dq, *fresh = look(dq) if seen is True else lax.cond(seen, look, blank, dq)
        return dq, tuple(fresh)

    def _arrived(self, t, cargo):
        k, v, coordinates = cargo
        source = (self.mine - t) % self.ring.parts
        k_info = self.coordinates.unload(coordinates, source, self.info)
        panels = self.ring.panels(self.info.shape[1], self.mine, source)
        return k, v, k_info, panels, self.ring.visible(self.mine, source)
