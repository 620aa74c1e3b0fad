"""Keys straight to the devices that see something of them: three quarters of a ring's bytes in zigzag order, half in
contiguous order.

At hop t the piece of device s goes to device s + t at once. In zigzag order that device looks at the high half only if
s is the later one, and else gets the low half alone; in contiguous order a later device's piece is not sent. Gradients
go home the same way and are summed there, so each is rounded once. The loop is unrolled, since every hop has other
routes: a program grows with the ring, and on a torus such a message takes several links, where neighbours take one.
That is why nobody takes this way unasked.

Everything here runs inside `shard_map`; shapes are per device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from irope_jax.attention.partial import Partial
from irope_jax.context.hops import Hops
from irope_jax.core.types import Array


def forward(hops: Hops) -> Partial:
    """Unfinished attention to the keys of all pieces."""
    acc = hops.fold_own()
    before = acc
    for t in range(1, hops.ring.parts):
        cargo, before = _after(before, hops.cargo), acc  # a hop's keys come during the hop before it, not sooner
        acc = hops.fold(acc, t, _deliver(hops, cargo, t))
    return acc


def backward(hops: Hops, dout: Array, lse: Array, delta: Array) -> tuple[Array, Array, Array]:
    """`dq` and the whole gradients of the own keys and values."""
    ring = hops.ring
    packed = hops.k.dtype if ring.gradients == "keys" else jnp.float32
    dq, home = hops.contribute_own(hops.blank_dq(), dout, lse, delta)
    before = dq
    for t in range(1, ring.parts):
        cargo, before = _after(before, hops.cargo), dq
        dq, fresh = hops.contribute(dq, dout, lse, delta, t, _deliver(hops, cargo, t))
        fresh = tuple(x.astype(packed) for x in fresh)
        back = _deliver(hops, (*fresh, {}), t, home=True)[:2]
        home = jax.tree.map(lambda sum_, x: sum_ + x.astype(jnp.float32), home, back)
    return dq, *home


def _after(event, tree):
    """The same values, had only after `event`."""
    return lax.optimization_barrier((tree, event))[0]


def _deliver(hops: Hops, cargo, t: int, home: bool = False):
    """`cargo` of every piece at the device `t` further on that looks at it, or back from there; zeros elsewhere."""
    ring = hops.ring
    runs = 1 if ring.layout is None else ring.layout.runs_per_piece
    later = [piece for piece in range(ring.parts) if piece + t >= ring.parts]  # a later device's piece: its end wraps
    earlier = [piece for piece in range(ring.parts) if piece + t < ring.parts]
    if ring.layout is None:
        senders = [None]
    else:
        senders = [None, later] if runs == 2 else [earlier]

    def move(x, axis):
        parts = jnp.split(x, runs, axis=axis)
        distance = -t if home else t
        who = [s if s is None or not home else [(piece + t) % ring.parts for piece in s] for s in senders]
        return jnp.concatenate([ring.send(part, distance, s) for part, s in zip(parts, who)], axis=axis)

    places = 2 if hops.pieces.head_major else 1
    k, v, coordinates = cargo
    return move(k, places), move(v, places), {name: move(x, 1) for name, x in coordinates.items()}
