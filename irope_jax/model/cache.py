"""The KV cache of a model: what each layer's mask lets it forget is not kept.

    Global    every token, up to a capacity
    Chunked   one chunk, Sliding one window: a ring of as many slots, row r in slot r mod slots

Layers of one mask keep tokens of the same coordinates, which are kept once for all of them: `TokenInfo`, with padding
where a slot is empty. So what a query may see of a cache is said by the mask, as everywhere: at the border of a chunk
its slots still hold the old chunk, and nobody sees it.

Belongs here: sizes and slots. Which models can be decoded is `decodable`'s, attention with a cache `context.cached`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from irope_jax.attention.mask import MaskSpec
from irope_jax.attention.stored import LARGEST, KeysValues, Numbers, Stored
from irope_jax.attention.stored_on_host import StoredOnHost
from irope_jax.context.cached import HOST_AXES, Places, place, scale_axes, slot_axes, stored_axes
from irope_jax.context.strategy import mask_name
from irope_jax.core.config import ConfigError
from irope_jax.core.types import PAD_SEGMENT, TokenInfo
from irope_jax.model.config import ModelConfig
from irope_jax.model.decodable import check_decodable
from irope_jax.sharding.rules import token_parts, tree_shardings


@dataclass(frozen=True)
class CacheSpec:
    """How much a cache holds, and in which numbers.

    Attributes:
      batch: rows; each holds one document of its own length.
      capacity: tokens of a row that global layers keep; a multiple of `mesh.context`.
      numbers: format of keys and values. Integers have a scale per token, head and block.
      block: entries of a head that share a scale of 2 bytes; None means 16, or as many as divide the head. The logits
        of SmolLM2-135M are wrong by 0.61 % in int8 at 16, by 0.80 % at 64, by 0.32 % in bfloat16 (root mean square;
        `scripts/check_cache.py`).
      slack: slots of local layers beyond their reach: so many of the last tokens may be taken back (`rewound`).
      offload: keys and values of layers that see everything lie in the memory of the host, floats only; a device holds
        a block of them. Not on CPUs, which have one memory.
    """

    batch: int
    capacity: int
    numbers: Numbers = "bfloat16"
    block: int | None = None
    slack: int = 0
    offload: bool = False

    def __post_init__(self):
        for name in ("batch", "capacity"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        if self.numbers not in ("float32", "bfloat16", *LARGEST):
            raise ConfigError("numbers", self.numbers, "choose one of: float32, bfloat16, int8, int4")
        if self.block is not None and (self.block < 1 or self.numbers not in LARGEST):
            raise ConfigError("block", self.block, "entries that share a scale, of int8 or int4; else leave it None")
        if self.offload and self.numbers in LARGEST:
            raise ConfigError("offload", True, f"keeps floats; use bfloat16 instead of {self.numbers}")
        if self.slack < 0:
            raise ConfigError("slack", self.slack, "slots more than needed; use 0 or more")

    def slots(self, mask: MaskSpec) -> int:
        """Slots of a layer."""
        return self.capacity if mask.reach is None else min(mask.reach + self.slack, self.capacity)

    def on_host(self, mask: MaskSpec) -> bool:
        """Whether a layer lies in the memory of the host."""
        return self.offload and mask.reach is None

    def shared(self, model: ModelConfig) -> int:
        """Entries of a head that share a scale."""
        return self.block or math.gcd(16, model.head_dim)

    def check(self, model: ModelConfig) -> None:
        """Raises `ConfigError` if heads of the model cannot be kept so."""
        if model.head_dim % self.shared(model):
            fix = f"must divide the head width {model.head_dim}"
            raise ConfigError("block", self.block, fix)
        if self.numbers == "int4" and model.head_dim % 2:
            raise ConfigError("numbers", self.numbers, f"two to a byte: a head width of {model.head_dim} is odd")


def masks_of(model: ModelConfig) -> tuple[MaskSpec, ...]:
    """The different masks of a model, in order of first use."""
    return tuple(dict.fromkeys(layer.mask for layer in model.period))


@flax.struct.dataclass
class KVCache:
    """Keys, values and coordinates of the tokens that were read.

    Attributes:
      layers: for each layer of the period, stacked over its repeats.
      coordinates: for each of `masks`, `[B, S]`.
      lengths: int32 `[B]`, tokens that each row has read, those of `prefix` too: the row of the next.
      first: int32 `[B]`, row of the first token that is kept here and not in `prefix`.
      prefix: a cache that was filled before and is only read; its batch divides B, and row b goes on from row
        `b // (B / its batch)`.
      masks: the different masks of the period.
      room: tokens of a row; None where every layer forgets, and has the slots for all that it does not.
    """

    layers: tuple[KeysValues, ...]
    coordinates: tuple[TokenInfo, ...]
    lengths: jax.Array
    first: jax.Array
    prefix: KVCache | None = None
    masks: tuple[MaskSpec, ...] = flax.struct.field(pytree_node=False, default=())
    room: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def capacity(self) -> int:
        """Tokens of a row that there is room for; those of `prefix` are not counted."""
        return jnp.iinfo(jnp.int32).max if self.room is None else self.room

    def before(self) -> tuple[KVCache, ...]:
        """Prefix, its prefix …"""
        return () if self.prefix is None else (self.prefix, *self.prefix.before())

    def next_info(self, real_BT: jax.Array) -> TokenInfo:
        """Coordinates of the tokens that follow; `real_BT` false is padding at the end of a row."""
        rows_BT = self.lengths[:, None] + jnp.arange(real_BT.shape[1], dtype=jnp.int32)
        real_BT = real_BT.astype(bool)
        rows_BT = jnp.where(real_BT, rows_BT, 0)
        return TokenInfo(rows_BT, jnp.where(real_BT, 1, PAD_SEGMENT).astype(jnp.int32), rows_BT)

    def rewound(self, lengths_B: jax.Array) -> KVCache:
        """The cache as it was when its rows had these lengths: at most `slack` tokens less than now.

        What was read beyond lies in slots that the next tokens take, and comes after every query until then.
        """
        return self.replace(lengths=lengths_B.astype(jnp.int32))


@flax.struct.dataclass
class Reading:
    """What the layers need to know of the tokens of a call.

    Attributes:
      places: by mask.
      earlier: coordinates of prefixes, by mask.
      kept: keys and values of prefixes, by layer of the period.
      full: bool `[B]`, rows that have no room for their tokens.
      asked: bool `[B, T]`, tokens whose hidden states somebody wants; None is all of them.
    """

    places: tuple[Places, ...]
    earlier: tuple[tuple[TokenInfo, ...], ...]
    kept: tuple[tuple[KeysValues, ...], ...]
    full: jax.Array
    asked: jax.Array | None
    masks: tuple[MaskSpec, ...] = flax.struct.field(pytree_node=False)
    capacity: int = flax.struct.field(pytree_node=False)

    def of(self, mask: MaskSpec) -> int:
        return self.masks.index(mask)


@flax.struct.dataclass
class LayerCache:
    """What one layer is given: all repeats of it, and which it is; `asked` are the tokens that must attend."""

    kept: KeysValues
    repeat: jax.Array
    places: Places
    earlier: tuple[tuple[KeysValues, TokenInfo], ...]
    asked: jax.Array | None
    longest: int = flax.struct.field(pytree_node=False)


def empty_cache(model: ModelConfig, spec: CacheSpec) -> KVCache:
    """An empty cache, boxed with its logical axes; `new_cache` makes one.

    Raises:
      ConfigError: a model that cannot be decoded, or numbers that do not fit it.
    """
    check_decodable(model)
    spec.check(model)
    repeats, masks = model.num_layers // len(model.period), masks_of(model)

    def stored(mask):
        if spec.on_host(mask):
            rows = repeats * spec.batch * (spec.capacity + token_parts()[1])
            shape = (rows, model.num_kv_heads, model.head_dim)
            flat = Stored.empty(shape, spec.numbers, 1).data
            boxed = nn.LogicallyPartitioned(flat, HOST_AXES)
            own = lambda: StoredOnHost(boxed, None, spec.numbers, spec.batch, spec.capacity)
            return KeysValues(own(), own())
        shape = (repeats, spec.batch, model.num_kv_heads, spec.slots(mask), model.head_dim)
        empty = lambda: Stored.empty(shape, spec.numbers, spec.shared(model))
        box = lambda axes: lambda x: nn.LogicallyPartitioned(x, axes)
        return KeysValues(empty(), empty()).map(box(stored_axes(mask)), box(scale_axes(mask)))

    def coordinates(mask):
        box = lambda: nn.LogicallyPartitioned(jnp.zeros((spec.batch, spec.slots(mask)), jnp.int32), slot_axes(mask))
        return TokenInfo(box(), box(), box())

    per_row = lambda: nn.LogicallyPartitioned(jnp.zeros(spec.batch, jnp.int32), ("batch",))
    layers = tuple(stored(layer.mask) for layer in model.period)
    short = any(spec.slots(mask) == spec.capacity for mask in masks)
    room = spec.capacity if short else None
    return KVCache(layers, tuple(map(coordinates, masks)), per_row(), per_row(), masks=masks, room=room)


def cache_shardings(model: ModelConfig, spec: CacheSpec, mesh: Mesh | AbstractMesh) -> KVCache:
    """Where each array of a cache lies.

    Raises:
      ShardingError: an axis that does not divide by its mesh axes.
    """
    abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
    with jax.sharding.use_abstract_mesh(abstract):
        shardings = tree_shardings(jax.eval_shape(lambda: empty_cache(model, spec)), mesh)
    to_host = lambda sharding: sharding.with_memory_kind("pinned_host")
    layers = tuple(
        jax.tree.map(to_host, kept) if spec.on_host(layer.mask) else kept
        for kept, layer in zip(shardings.layers, model.period, strict=True)
    )
    return shardings.replace(layers=layers)


def new_cache(model: ModelConfig, spec: CacheSpec) -> KVCache:
    """An empty cache on the mesh in force: no device ever holds more than its part.

    Raises:
      ConfigError: `offload` without a mesh, or where devices have no memory of a host beside their own.
    """
    make = lambda: nn.meta.unbox(empty_cache(model, spec))
    mesh = jax.sharding.get_mesh()
    if spec.offload:
        return _new_on_host(make, model, spec, mesh)
    if mesh.empty or mesh.size == 1:
        return jax.jit(make)()
    return jax.jit(make, out_shardings=cache_shardings(model, spec, mesh))()


def _new_on_host(make, model: ModelConfig, spec: CacheSpec, mesh: Mesh) -> KVCache:
    """Zeros put where they belong one by one: made by a program they would pass through the device."""
    if mesh.empty or mesh.devices.flat[0].platform == "cpu":
        raise ConfigError("offload", True, "these devices have one memory only; leave it out")
    zeros = lambda x, place: jax.make_array_from_callback(
        x.shape, place, lambda part: np.zeros([len(range(n)[one]) for one, n in zip(part, x.shape)], x.dtype)
    )
    return jax.tree.map(zeros, jax.eval_shape(make), cache_shardings(model, spec, mesh))


def fork(model: ModelConfig, prefix: KVCache, spec: CacheSpec) -> KVCache:
    """An empty cache whose rows go on from those of `prefix`, which is shared and not copied.

    Args:
      spec: `batch` rows, a multiple of those of `prefix`; `capacity` is for the tokens that follow.

    Raises:
      ConfigError: batches that do not fit one another.
    """
    rows = prefix.lengths.shape[0]
    if spec.batch % rows:
        raise ConfigError("batch", spec.batch, f"rows that go on from {rows} each equally often; use a multiple")
    lengths = jnp.repeat(prefix.lengths, spec.batch // rows, total_repeat_length=spec.batch)
    return new_cache(model, spec).replace(lengths=lengths, first=lengths + 0, prefix=prefix)


def begin(cache: KVCache, info: TokenInfo, asked_BT: jax.Array | None = None) -> tuple[KVCache, Reading]:
    """The cache with the coordinates of the tokens of a call, and what layers need to put their keys there.

    Args:
      info: coordinates `[B, T]`; the real tokens of a row follow one another from row `lengths` on.
      asked_BT: tokens whose hidden states are wanted; None is all of them.
    """
    real = info.segments != PAD_SEGMENT
    last_B = jnp.max(jnp.where(real, info.rows, -1), axis=-1)
    offset = info.rows - cache.first[:, None]
    places = []
    for mask, there in zip(cache.masks, cache.coordinates):
        slots = there.shape[1]
        if mask.reach is None:
            keep, slot = real & (offset < slots), offset
        else:
            keep, slot = real & (info.rows > last_B[:, None] - slots), offset % slots
        taken_back = there.rows >= cache.lengths[:, None]
        before = there.replace(segments=jnp.where(taken_back, PAD_SEGMENT, there.segments))
        slot = jnp.where(keep, slot, slots).astype(jnp.int32)
        places.append(Places(before, place(mask, there, info, slot), slot))
    prefixes = cache.before()
    full = last_B - cache.first >= cache.capacity
    reading = Reading(
        tuple(places),
        tuple(tuple(one.coordinates[i] for one in prefixes) for i in range(len(cache.masks))),
        tuple(tuple(one.layers[i] for one in prefixes) for i in range(len(cache.layers))),
        full,
        asked_BT,
        cache.masks,
        cache.capacity + sum(one.capacity for one in prefixes),
    )
    lengths = jnp.maximum(cache.lengths, last_B + 1)
    return cache.replace(coordinates=tuple(one.after for one in places), lengths=lengths), reading


def layer_cache(model: ModelConfig, kept: KeysValues, repeat: jax.Array, reading: Reading, number: int) -> LayerCache:
    """What layer `number` of the period is given at one repeat.

    Of the model's last layer nobody reads more than what is asked; all others owe the next one every token.
    """
    at, asked, period = reading.of(model.period[number].mask), None, len(model.period)
    earlier = tuple(zip(reading.kept[number], reading.earlier[at], strict=True))
    if reading.asked is not None and number == period - 1:
        asked = reading.asked | (repeat < model.num_layers // period - 1)
    return LayerCache(kept, repeat, reading.places[at], earlier, asked, reading.capacity)


@dataclass(frozen=True)
class KindBytes:
    """Bytes of the layers of one mask, over all devices.

    Attributes:
      mask: of the layers.
      layers: how many.
      slots: of a row in each.
      keys_values: numbers.
      scales: of integers; 0 for floats.
      coordinates: 12 a slot, once for all these layers.
    """

    mask: MaskSpec
    layers: int
    slots: int
    keys_values: int
    scales: int
    coordinates: int

    @property
    def name(self) -> str:
        return mask_name(self.mask)

    @property
    def total(self) -> int:
        return self.keys_values + self.scales + self.coordinates


def cache_bytes(model: ModelConfig, spec: CacheSpec) -> tuple[KindBytes, ...]:
    """Bytes of a cache by kind of layer, in closed form. Lengths, 8 bytes a row, come on top (`row_bytes`)."""
    spec.check(model)
    bits = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}[spec.numbers]
    blocks = model.head_dim // spec.shared(model) if spec.numbers in LARGEST else 0
    found = []
    for mask in masks_of(model):
        layers = sum(layer.mask == mask for layer in model.layers)
        slots = spec.slots(mask)
        spare = token_parts()[1] if spec.on_host(mask) else 0
        vectors = layers * spec.batch * model.num_kv_heads * (slots + spare) * 2
        found.append(
            KindBytes(
                mask, layers, slots, vectors * model.head_dim * bits // 8, 2 * vectors * blocks, 12 * spec.batch * slots
            )
        )
    return tuple(found)


def row_bytes(spec: CacheSpec) -> int:
    """Bytes of `lengths` and `first`."""
    return 8 * spec.batch


def fitting_capacity(tokens: int, parts: int) -> int:
    """The least capacity for so many tokens that `parts` devices share evenly."""
    return math.ceil(max(tokens, 1) / parts) * parts
