"""How long documents are, told by the coordinates of their tokens, for frequencies and temperatures that depend on it.

Nothing here looks at what a token sees; that is a mask's business.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from irope_jax.core.types import PAD_SEGMENT, TokenInfo


def document_lengths(info: TokenInfo) -> jax.Array:
    """Tokens of the document each token belongs to, int32 `[B, T]`: its greatest position plus one.

    In any order of places. Padding gets 1. All tokens of a document must be in the same row of `info`; segments are
    at most as many as places, which packing keeps.
    """
    positions, segments = jnp.asarray(info.positions), jnp.asarray(info.segments)
    real = segments != PAD_SEGMENT
    ends = jnp.where(real, positions, 0) + 1
    if info.document_multiple == 0:  # one document per row
        longest = jnp.max(ends, axis=-1, keepdims=True)
        return jnp.where(real, jnp.broadcast_to(longest, ends.shape), 1)
    count = ends.shape[-1] + 1
    longest = jax.vmap(lambda e, s: jax.ops.segment_max(e, s, num_segments=count))(ends, segments)
    return jnp.where(real, jnp.take_along_axis(longest, segments, axis=-1), 1)
