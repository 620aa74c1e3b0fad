"""`attend_sharded`: the only attention call the model makes.

On one device it is `attention.attend` itself. On a mesh it opens a `shard_map` in which batch and heads are local, and
goes the way that `strategy.decide` finds for the mask of the layer, the length, the layout of the tokens and the
config. Every distinct decision is logged once; one that is not the cheap way of such a mask says what it costs.
"""

from __future__ import annotations

import logging
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from irope_jax.attention.api import attend, choose_pieces
from irope_jax.attention.mask import MaskSpec
from irope_jax.context.all_to_all import attend_all_to_all, group_layout
from irope_jax.context.gather import gather_attention
from irope_jax.context.halo import attend_halo
from irope_jax.context.hops import Ring
from irope_jax.context.layout import layout_of
from irope_jax.context.ring import ring_attention
from irope_jax.context.split_keys import attend_split_keys
from irope_jax.context.strategy import CallShape, ContextConfig, Decision, Promises, decide
from irope_jax.core.types import Array, TokenInfo
from irope_jax.sharding.rules import spec

log = logging.getLogger(__name__)

AXIS = "context"
DEFAULT = ContextConfig()


def attend_sharded(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    *,
    scale: float | None = None,
    slopes: Array | None = None,
    impl: str | None = None,
    context: ContextConfig = DEFAULT,
) -> jax.Array:
    """Attention over the mesh in force (`jax.set_mesh`), equal to `attention.attend` on one device.

    Args and return value are those of `attention.attend`, with logical (whole) shapes; batch must divide by
    data x fsdp x expert, heads by tensor. As many queries as keys means that they are the same tokens, cut along the
    context axis; fewer means decoding: queries are whole on every device and keys are cut.

    Args:
      context: layout and ways; `strategy.ContextConfig`.

    Raises:
      ConfigError: a length that cannot be cut, or a way asked for that is impossible; names the field and the fix.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, mask, scale=scale, slopes=slopes, impl=impl)
    parts, tensor = mesh.shape[AXIS], mesh.shape["tensor"]
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else float(scale)
    layout = layout_of(k_info, parts)
    decision = _decide(q_BTNH, k_BSKH, q_info, k_info, mask, layout, context, parts, tensor)
    if parts > 1:
        _tell(decision)
    decoding = q_BTNH.shape[1] != k_BSKH.shape[1]
    places = None if decoding else "length"
    key_places = None if decoding and decision.kind == "local" else "length"
    q_spec = spec(("batch", places, "heads", None))
    kv_spec = spec(("batch", key_places, "kv_heads", None))
    local = partial(
        _local, mask=mask, scale=scale, impl=impl, decision=decision, parts=parts, gradients=context.gradients,
        whole=parts == 1 or (decoding and decision.kind == "local"),
    )  # fmt: skip
    return jax.shard_map(
        local,
        in_specs=(
            q_spec, kv_spec, kv_spec, spec(("batch", places)), spec(("batch", key_places)), P(spec(("heads",))[0])
        ),
        out_specs=q_spec,
        check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, slopes)  # fmt: skip


def _decide(q_BTNH, k_BSKH, q_info, k_info, mask, layout, context, parts, tensor) -> Decision:
    (_, t, n, h), (_, s, kv, _) = q_BTNH.shape, k_BSKH.shape
    shape = CallShape(parts, t, s, max(n // tensor, 1), max(kv // tensor, 1), h, jnp.dtype(k_BSKH.dtype).itemsize)
    return decide(mask, shape, layout, Promises.of(q_info, k_info), context)


@lru_cache(maxsize=1024)
def _tell(decision: Decision) -> None:
    """Cached, so that each distinct decision is logged once."""
    if decision.fell_back is not None:
        log.warning("context: %s, because %s", decision.describe(), decision.fell_back)
    else:
        log.info("context: %s (%s)", decision.describe(), decision.why)


def _local(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, slopes, *, mask, scale, impl, decision, parts, gradients, whole):
    """Shapes below are per device; `whole`: it holds all queries and keys of its rows."""
    arrays, options = (q_BTNH, k_BSKH, v_BSKH), {"scale": scale, "slopes": slopes}
    if whole or decision.kind == "split_keys":
        way = attend if whole else attend_split_keys
        return way(*arrays, q_info, k_info, mask, impl=impl, **options)
    # a piece no longer stands where the whole row promised
    info, layout = q_info.replace(first_row=None, zigzag=None), decision.layout
    if decision.kind in ("local", "halo"):
        halo = {"layout": layout, "halo": decision.halo}
        return attend_halo(*arrays, info, info, mask, impl=impl, **halo, **options)
    if decision.kind == "gather":
        return gather_attention(*arrays, info, info, mask, impl=impl, layout=layout, parts=parts, **options)
    ring = partial(_ring, impl=impl, gradients=gradients, parts=parts // decision.group, stride=decision.group)
    if decision.kind in ("ring", "direct"):
        return ring(*arrays, info, info, mask, layout=layout, direct=decision.kind == "direct", **options)
    together = group_layout(layout, decision.group)
    inner = partial(attend, impl=impl) if together.parts == 1 else partial(ring, layout=together)
    return attend_all_to_all(
        *arrays, info, info, mask, layout=layout, group=decision.group, inner=inner, **options
    )  # fmt: skip


def _ring(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    info,
    _,
    mask,
    *,
    scale,
    slopes,
    impl,
    gradients,
    parts,
    stride,
    layout,
    direct=False,
):
    ring = Ring(parts, layout, AXIS, stride, gradients, direct)
    _, pieces = choose_pieces(q_BTNH, k_BSKH, mask, ring.relations(), slopes=slopes, impl=impl)
    return ring_attention(
        q_BTNH, k_BSKH, v_BSKH, info, mask, scale=scale, slopes=slopes, pieces=pieces, ring=ring
    )  # fmt: skip
