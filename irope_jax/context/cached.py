"""Attention with a cache over the mesh in force: new keys go into their slots, queries attend to what is kept.

A layer that sees its whole document has its slots cut along the context axis: every device attends to those it holds
and the partial results merge, whatever the length (`split_keys`). A layer with a reach keeps so little that every
device has all of it; a long piece of prompt is then cut by queries.

Row r of a document lies on device `r % P`: at every length all devices hold equally many, and work equally.
"""

from __future__ import annotations

from functools import partial, reduce

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from irope_jax.attention.blocks import plan_in_order
from irope_jax.attention.blockwise import partial_blockwise
from irope_jax.attention.cached import partial_cached
from irope_jax.attention.mask import MaskSpec
from irope_jax.attention.partial import Partial, finish, merge
from irope_jax.attention.reference import partial_reference
from irope_jax.attention.stored import KeysValues
from irope_jax.attention.stored_on_host import StoredOnHost
from irope_jax.context.split_keys import merge_across
from irope_jax.core.types import PAD_SEGMENT, Array, TokenInfo
from irope_jax.sharding.rules import spec

AXIS = "context"


@flax.struct.dataclass
class Places:
    """Where the tokens of a call go in the layers of one mask.

    Attributes:
      before: coordinates of the slots without these tokens and what was taken back, `[B, S]`.
      after: with them.
      slot: int32 `[B, T]`, number of the slot in order of rows; S for tokens that are not kept.
    """

    before: TokenInfo
    after: TokenInfo
    slot: Array


def is_cut(mask: MaskSpec) -> bool:
    """Whether the slots of such layers are cut along the context axis."""
    return mask.reach is None


def slot_axes(mask: MaskSpec) -> tuple[str | None, ...]:
    """Logical axes of coordinates `[B, S]`."""
    return ("batch", "length" if is_cut(mask) else None)


def stored_axes(mask: MaskSpec) -> tuple[str | None, ...]:
    """Logical axes of keys and values `[R, B, K, S, H]`."""
    return ("layers", "batch", "kv_heads", slot_axes(mask)[1], None)


HOST_AXES = ("host_slots", "kv_heads", None)
"""Logical axes of keys and values that lie on the host."""


def on_host(kept: KeysValues) -> bool:
    return isinstance(kept.keys, StoredOnHost)


def scale_axes(mask: MaskSpec) -> tuple[str | None, ...]:
    """Logical axes of their scales `[R, B, K, blocks, S]`."""
    return ("layers", "batch", "kv_heads", None, slot_axes(mask)[1])


def _parts() -> tuple[bool, int]:
    """Whether there is one device only, and the parts of the context axis."""
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    return alone, 1 if alone else mesh.shape[AXIS]


def _here(slot_BT: Array, slots: int, parts: int) -> Array:
    """Slots of this device, of `slots`; those of others do not exist here."""
    if parts == 1:
        return slot_BT
    mine = (slot_BT % parts == lax.axis_index(AXIS)) & (slot_BT < slots * parts)
    return jnp.where(mine, slot_BT // parts, slots)


def place(mask: MaskSpec, old: TokenInfo, info: TokenInfo, slot_BT: Array) -> TokenInfo:
    """Coordinates of the slots of such layers once tokens are put at theirs."""
    alone, parts = _parts()
    parts = parts if is_cut(mask) else 1

    def local(old, info, slot_BT):
        at = _here(slot_BT, old.shape[1], parts)
        rows = jnp.arange(at.shape[0])[:, None]
        put = lambda old, new: old.at[rows, at].set(new.astype(old.dtype), mode="drop")
        return TokenInfo(put(old.positions, info.positions), put(old.segments, info.segments), put(old.rows, info.rows))

    plain = TokenInfo(info.positions, info.segments, info.rows)
    if alone:
        return local(old, plain, slot_BT)
    kept, whole = spec(slot_axes(mask)), spec(("batch", None))
    return jax.shard_map(local, in_specs=(kept, whole, whole), out_specs=kept, check_vma=False)(old, plain, slot_BT)


def attend_cached(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    info: TokenInfo,
    cache: KeysValues,
    places: Places,
    mask: MaskSpec,
    *,
    scale: float,
    slopes: Array | None = None,
    impl: str | None = None,
    repeat: int | Array = 0,
    earlier: tuple[tuple[KeysValues, TokenInfo], ...] = (),
    asked: Array | None = None,
) -> tuple[jax.Array, KeysValues]:
    """Attention of the tokens of a call to those before and among themselves, and the cache with their keys.

    Per query and device, layers that see everything send `2 (P-1)/P * N (H + 2) * 4` bytes; others send nothing for a
    single token, and gather the keys and values of a longer piece.

    Args:
      q_BTNH, k_BTKH, v_BTKH: of the tokens of the call, rotated.
      info: their coordinates.
      cache: of R layers, of which this one is `repeat`.
      places: where they go; the same for all layers with this mask.
      impl: `reference` attends among the tokens of a piece by the definition; anything else blockwise.
      earlier: caches that several rows share, batch a divisor of B, and their coordinates.
      asked: bool `[B, T]`, tokens that must attend; None is all. Others see nothing, and blocks of them cost nothing.

    Returns:
      `[B, T, N, H]` in the type of the queries, and the cache.
    """
    alone, parts = _parts()
    options = dict(mask=mask, scale=scale, impl=impl)
    q_info = info if asked is None else info.replace(segments=jnp.where(asked, info.segments, PAD_SEGMENT))
    if alone:
        return _local(q_BTNH, k_BTKH, v_BTKH, q_info, info, cache, places, slopes, repeat, earlier, parts=1, **options)
    length = q_BTNH.shape[1]
    share = length > 1 and length % parts == 0
    near_cut = "length" if share and not is_cut(mask) else None
    out_cut = "length" if share else None
    lie = lambda kept: kept.map(
        lambda _: spec(HOST_AXES if on_host(kept) else stored_axes(mask)), lambda _: spec(scale_axes(mask))
    )
    coordinates = spec(slot_axes(mask))
    by_token, whole = spec(("batch", None)), spec(("batch", None, "kv_heads", None))
    at = Places(coordinates, coordinates, by_token)
    return jax.shard_map(
        partial(_local, parts=parts, share=share, **options),
        in_specs=(
            spec(("batch", near_cut, "heads", None)), whole, whole, spec(("batch", near_cut)), by_token,
            lie(cache), at, P(spec(("heads",))[0]), P(), tuple((lie(kept), coordinates) for kept, _ in earlier),
        ),
        out_specs=(spec(("batch", out_cut, "heads", None)), lie(cache)),
        check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKH, q_info, info, cache, places, slopes, repeat, earlier)  # fmt: skip


def _local(
    q_BTNH, k_BTKH, v_BTKH, q_info, k_info, cache, places, slopes, repeat, earlier, *, mask, scale, impl, parts,
    share=False,
):  # fmt: skip
    """Shapes are per device."""
    whole_shape = (cache.keys.rows, cache.keys.slots) if on_host(cache) else None
    cache = _sized(cache, places.before.shape)
    earlier = tuple((_sized(kept, there.shape), there) for kept, there in earlier)
    options = {"scale": scale, "slopes": slopes}
    cut = is_cut(mask)
    slot_BT = _here(places.slot, cache.keys.slots, parts if cut else 1)
    found = [_shared(q_BTNH, q_info, kept, there, mask, repeat, options) for kept, there in earlier]
    dtype, q_BTNH, k_BTKH = q_BTNH.dtype, cache.keys.spread(q_BTNH), cache.keys.spread(k_BTKH)
    attend = lambda cache, there: partial_cached(
        q_BTNH, cache.keys, cache.values, q_info, there, mask, repeat=repeat, **options
    )
    if cut and k_BTKH.shape[1] > 1:
        cache = cache.write(repeat, slot_BT, k_BTKH, v_BTKH)
        found.append(attend(cache, places.after))
    else:
        # Read before it is written: a piece may take the slots of keys that its first tokens still see. And XLA writes
        # where the cache lies if nobody reads it later.
        found.append(attend(cache, places.before))
        if cut:  # a single token, which one of the devices counts
            k_info = k_info.replace(segments=jnp.where(slot_BT < cache.keys.slots, k_info.segments, PAD_SEGMENT))
        dense = impl == "reference" or k_BTKH.shape[1] == 1
        k, v = cache.keys.rounded(k_BTKH), cache.values.rounded(v_BTKH)
        if dense:
            within = partial_reference
        elif q_BTNH.shape[1] == k.shape[1]:
            plan = plan_in_order(mask, q_info, k_info, k.shape[2], q_BTNH.shape[2] // k.shape[2])
            within = partial(partial_blockwise, plan=plan)
        else:  # a share of the queries: their places are not those of the keys
            within = partial_blockwise
        cache = cache.write(repeat, slot_BT + _never(found[-1]), k_BTKH, v_BTKH)
        found.append(within(q_BTNH, k, v, q_info, k_info, mask, **options))
    whole = reduce(merge, found)
    if cut and parts > 1:
        whole = _merge_shares(whole) if share else merge_across(whole, AXIS)
    return finish(whole, dtype), _sized(cache, whole_shape)


def _sized(kept: KeysValues, shape: tuple[int, int] | None) -> KeysValues:
    """What lies on the host does not know its rows and slots by its own shape: it is told those of this device."""
    if not on_host(kept):
        return kept
    tell = lambda one: one.replace(rows=shape[0], kept_slots=shape[1])
    return KeysValues(tell(kept.keys), tell(kept.values))


def _never(part: Partial) -> Array:
    """0, to be had only after `part`: without knowing what comes first, XLA copies a cache that is read and written."""
    nothing = part.sum[:, 0, 0] + jnp.abs(part.out[:, 0, 0, 0]) < 0
    return nothing.astype(jnp.int32)[:, None]


def _shared(q_BTNH, q_info, cache, k_info, mask, repeat, options) -> Partial:
    """Attention to a cache whose rows several rows of queries share: each of its slots is read once for all of them."""
    rows = k_info.shape[0]
    together = lambda x: x.reshape(rows, -1, *x.shape[2:])
    info = TokenInfo(together(q_info.positions), together(q_info.segments), together(q_info.rows))
    q_BTNH = cache.keys.spread(q_BTNH)
    found = partial_cached(together(q_BTNH), cache.keys, cache.values, info, k_info, mask, repeat=repeat, **options)
    return jax.tree.map(lambda x: x.reshape(*q_BTNH.shape[:2], *x.shape[2:]), found)


def _merge_shares(part: Partial) -> Partial:
    """`merge_across`, of which each device gets its share of the queries: half the bytes."""
    top = lax.pmax(part.max, AXIS)
    shrink = jnp.exp(part.max - jnp.where(top == -jnp.inf, 0.0, top))
    scatter = partial(lax.psum_scatter, axis_name=AXIS, scatter_dimension=1, tiled=True)
    out, total = scatter(part.out * shrink[..., None]), scatter(part.sum * shrink)
    mine = lax.dynamic_slice_in_dim(top, lax.axis_index(AXIS) * total.shape[1], total.shape[1], 1)
    return Partial(out, mine, total)
