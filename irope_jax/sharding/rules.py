"""Logical axes to mesh axes, for parameters and activations.

Modules name the axes of what they make by meaning (`embed`, `heads`, …); this table alone says where they go. Nothing
here knows which module uses which name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from irope_jax.core.config import ConfigError

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "length": "context",
    "group_batch": ("data", "expert"),  # whole within an (fsdp, context) group, beside columns that are cut there
    "host_slots": ("data", "fsdp", "expert", "context"),  # rows of a batch and slots of a cache, as one axis
    "group_embed": "fsdp",  # such columns, once the sequence is cut again
    # parameters; the widths inside a layer are also activations' last axes
    "embed": ("fsdp", "context"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "positions": None,
    "expert": "expert",
    "layers": None,
    # a layer's input and output: whole on every device of (context, tensor)
    "features": None,
}


class ShardingError(ConfigError):
    """A tensor that cannot be laid on the mesh; names the tensor, the axis and the fix."""


def spec(names: Sequence[str | None]) -> P:
    """The `PartitionSpec` of logical axis names; `None` is an axis that is never cut.

    Raises:
      ShardingError: an unknown name, or two axes that would use the same mesh axis.
    """
    taken: dict[str, str] = {}
    entries = []
    for name in names:
        if name is not None and name not in RULES:
            raise ShardingError("logical axis", name, f"not in the sharding rules; there are: {', '.join(RULES)}")
        entry = RULES[name] if name is not None else None
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            if axis in taken:
                raise ShardingError(
                    "logical axes",
                    tuple(names),
                    f"{taken[axis]!r} and {name!r} both go to mesh axis {axis!r}; rename one",
                )
            taken[axis] = name
        entries.append(entry)
    return P(*entries)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Ask the compiler to keep `x` laid out by its logical axes; nothing without a mesh.

    A `length` that does not divide (a few tokens of decoding) is whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    names = tuple(length_axis(size) if name == "length" else name for name, size in zip(names, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, spec(names))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(w: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """A weight whose `embed` axis is whole on every device, so that a product with it sends nothing more.

    Its gradient is cut again. Left to itself the TPU compiler may turn the gather into as many products as there are
    pieces, each beside a transfer.

    Args:
      w: a parameter, in the type that it is multiplied in.
      names: its logical axes.
    """
    return constrain(w, *_whole(names)) if _is_cut("embed") else w


def _whole(names: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return tuple(None if name == "embed" else name for name in names)


def _gathered(w, names):
    return gathered(w, names), None


def _cut(names, _, d_w):
    # Whole first: asked for pieces alone, the compiler would make each in a product of its own.
    return (constrain(constrain(d_w, *_whole(names)), *names) if _is_cut("embed") else d_w,)


gathered.defvjp(_gathered, _cut)


def _is_cut(name: str) -> bool:
    """Whether the mesh in force cuts this logical axis."""
    mesh, entry = jax.sharding.get_abstract_mesh(), RULES[name]
    return not mesh.empty and any(mesh.shape[axis] > 1 for axis in ((entry,) if isinstance(entry, str) else entry))


def length_axis(size: int) -> str | None:
    """`length` if the mesh in force cuts so many tokens evenly, else None: they are whole on every device.

    What is trained always divides (`ContextLayout.check`); tokens that are decoded do not.
    """
    return None if size % token_parts()[1] else "length"


def token_parts() -> tuple[int, int]:
    """Into how many parts the mesh in force cuts the batch and the sequence; (1, 1) without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1, 1
    return math.prod(mesh.shape[axis] for axis in RULES["batch"]), mesh.shape["context"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Layout of a `[B, T]` array of a batch."""
    return NamedSharding(mesh, spec(("batch", "length")))


def check_divides(name: str | None, size: int, devices: Mapping[str, int], where: str) -> None:
    """That an axis can be cut evenly.

    Args:
      name: the logical axis.
      size: its length.
      devices: devices along each mesh axis.
      where: what has the axis, for the message.

    Raises:
      ShardingError: it cannot; names the config field of the mesh axis and the largest size that would do.
    """
    entry = RULES[name] if name is not None else None
    rest = size
    for axis in (entry,) if isinstance(entry, str) else entry or ():
        if rest % devices[axis]:
            usable = max(d for d in range(1, devices[axis]) if rest % d == 0)
            fix = f"does not divide axis {name!r} of size {size} of {where}; use {usable}, or another divisor of {rest}"
            raise ShardingError(f"mesh.{axis}", devices[axis], fix)
        rest //= devices[axis]


def embed_axis(for_decoding: bool) -> str:
    """The logical axis of columns of parameters: for decoding they are whole along context, else a token would wait."""
    return "group_embed" if for_decoding else "embed"


def tree_shardings(boxed: Any, mesh: Mesh | AbstractMesh, *, whole_along_context: bool = False) -> Any:
    """Shardings of a tree of (abstract) arrays; leaves boxed by `nn.with_logical_partitioning` follow their names.

    Args:
      boxed: arrays or `ShapeDtypeStruct`s; unboxed leaves are replicated.
      mesh: the mesh to lay them on; an abstract one says as much, and holds no devices.
      whole_along_context: parameters for decoding: every device of `context` has all of its columns, as a token would
        otherwise wait for them in every layer.

    Returns:
      The same tree, unboxed, with a `NamedSharding` at each leaf.

    Raises:
      ShardingError: an axis does not divide by its mesh axes; names the parameter, the axis and the fix.
    """

    def lay(path, leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, P())
        if not hasattr(leaf.value, "shape"):  # optax leaves an empty node where a transformation skips a parameter
            return leaf.value
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = tuple(leaf.value.shape)
        names = tuple(embed_axis(whole_along_context) if name == "embed" else name for name in leaf.names)
        for size, name in zip(shape, names, strict=True):
            check_divides(name, size, mesh.shape, f"{where} {shape}")
        return NamedSharding(mesh, spec(names))

    return jax.tree_util.tree_map_with_path(lay, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
