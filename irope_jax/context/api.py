"""`attend_sharded`: the only attention call the model makes.

On one device it is `attention.attend` itself. On a mesh it opens a `shard_map` in which batch and heads are local; a
sequence cut along the `context` axis gathers its keys, values and their coordinates first. Cheaper ways to span devices
(by what the mask of the layer needs) belong in this room beside it.
"""

from __future__ import annotations

from functools import partial

import jax
from jax.sharding import PartitionSpec as P

from irope_jax.attention.api import attend
from irope_jax.attention.mask import MaskSpec
from irope_jax.core.types import Array, TokenInfo
from irope_jax.sharding.rules import spec


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
) -> jax.Array:
    """Attention over the mesh in force (`jax.set_mesh`), equal to `attention.attend` on one device.

    Args and return value are those of `attention.attend`, with logical (whole) shapes; batch must divide by
    data x fsdp, lengths by context, key heads by tensor.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, mask, scale=scale, slopes=slopes, impl=impl)
    tokens = spec(("batch", "length"))
    q_spec, kv_spec = spec(("batch", "length", "heads", None)), spec(("batch", "length", "kv_heads", None))
    local = partial(_gather_keys, mask=mask, scale=scale, impl=impl, parts=mesh.shape["context"])
    return jax.shard_map(
        local,
        in_specs=(q_spec, kv_spec, kv_spec, tokens, tokens, P(spec(("heads",))[0])),
        out_specs=q_spec,
        check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, slopes)


def _gather_keys(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, slopes, *, mask, scale, impl, parts):
    """Shapes below are per device. With the sequence cut, a piece no longer starts at the row it promised."""
    if parts > 1:
        promise = k_info.first_row
        k_BSKH, v_BSKH, k_info = jax.tree.map(
            lambda x: jax.lax.all_gather(x, "context", axis=1, tiled=True), (k_BSKH, v_BSKH, k_info)
        )
        q_info, k_info = q_info.replace(first_row=None), k_info.replace(first_row=promise)
    return attend(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, mask, scale=scale, slopes=slopes, impl=impl)
