"""What a layer keeps for its backward pass, and where, read from the traced layer. Nothing is allocated or run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from irope_jax.core.types import TokenInfo
from irope_jax.model.config import FfnSpec, LayerSpec, ModelConfig
from irope_jax.model.decoder import checkpointed_layer
from irope_jax.model.moe import MoE
from irope_jax.model.remat import NAMES
from irope_jax.sharding.mesh import MeshConfig

UNNAMED, WEIGHTS, COORDINATES = "(without a name)", "(weights in another type)", "(coordinates)"

_SAME = ("name", "reduce_precision", "device_put", "optimization_barrier")
"""Operations whose result is the tensor that went in."""


@dataclass(frozen=True)
class Kept:
    """A tensor that waits for the backward pass of one layer; those without a name are one entry together.

    Attributes:
      name: of `remat.NAMES`, or what kind of tensors without one.
      where: in whose memory.
      bytes: of all of it.
      shapes: as text, `bfloat16[1,4096,5120]`; empty for several together.
    """

    name: str
    where: Literal["device", "host"]
    bytes: int
    shapes: str = ""


@dataclass(frozen=True)
class LayerMemory:
    """`kept`, the layer's input first; `again`: names that are computed again."""

    kept: tuple[Kept, ...]
    again: tuple[str, ...]

    def bytes(self, where: str) -> int:
        return sum(kept.bytes for kept in self.kept if kept.where == where)


def share(config: ModelConfig, mesh: MeshConfig) -> ModelConfig:
    """The model whose layers, on one device, are as large as what one device of the mesh has of this model's.

    All experts are kept: a device sees its own tokens times the experts of each, wherever experts lie. What a device
    gathers of others (weights of `fsdp`, keys of a ring, tokens sent to its experts) is not in it.
    """

    def ffn(spec: FfnSpec) -> FfnSpec:
        spec = replace(spec, hidden_dim=spec.hidden_dim // mesh.tensor)
        return replace(spec, shared=ffn(spec.shared)) if isinstance(spec, MoE) and spec.shared else spec

    return replace(
        config,
        num_heads=config.num_heads // mesh.tensor,
        num_kv_heads=config.num_kv_heads // mesh.tensor,
        pattern=tuple(replace(layer, ffn=ffn(layer.ffn)) for layer in config.pattern),
    )


def layer_memory(config: ModelConfig, layer: LayerSpec, batch: int, length: int) -> LayerMemory:
    """What one layer keeps of `batch` rows of `length` tokens, as jax traces it for the platform at hand.

    Parameters, which are held anyway, are not counted; copies of them in the compute type are.
    """
    kept, _ = _trace(config, layer, batch, length)
    if config.remat == "none":
        return LayerMemory(kept, ())
    _, everything = _trace(replace(config, remat="none"), layer, batch, length)
    again = tuple(name for name in NAMES if name in everything and name not in {one.name for one in kept})
    return LayerMemory(kept, again)


def _trace(config: ModelConfig, layer: LayerSpec, batch: int, length: int) -> tuple[tuple[Kept, ...], set[str]]:
    """What is kept, and every name that occurs."""
    module = checkpointed_layer(config)(config, layer)
    x_BTD = jax.ShapeDtypeStruct((batch, length, config.d_model), jnp.dtype(config.precision.compute))
    info = jax.eval_shape(lambda: TokenInfo.single(batch, length))
    one = jax.ShapeDtypeStruct((1, 1, config.d_model), x_BTD.dtype)
    # No mesh: shapes are those of one device.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        init = lambda x_BTD: module.init(jax.random.key(0), x_BTD, TokenInfo.single(1, 1))["params"]
        params = nn.meta.unbox(jax.eval_shape(init, one))
        apply = lambda params, x_BTD, info: module.apply({"params": params}, x_BTD, info)
        # The function that `jax.vjp` gives is a pytree, and its leaves are what it keeps.
        pull = lambda params, x_BTD, info: jax.vjp(lambda p, x: apply(p, x, info), params, x_BTD)[1]
        jaxpr = jax.make_jaxpr(pull)(params, x_BTD, info).jaxpr
    sizes = [len(jax.tree.leaves(tree)) for tree in (params, x_BTD, info)]
    kinds = [kind for kind, size in zip(("weights", "x", "coordinates"), sizes) for _ in range(size)]
    return tuple(_read(jaxpr, kinds)), set(_names(jaxpr))


def _read(jaxpr: Any, kinds: list[str]) -> Iterator[Kept]:
    """Outputs of a traced `pull`; `kinds` says of each input what it is."""
    comes_from = dict(zip(jaxpr.invars, ({kind} for kind in kinds)))
    root: dict[Any, Any] = {}  # a tensor under all its names and in all its places
    names = {jaxpr.invars[kinds.index("x")]: "layer_input"}
    for op in jaxpr.eqns:
        ins = [x for x in op.invars if not hasattr(x, "val")]
        for out in op.outvars:
            comes_from[out] = set().union(*(comes_from.get(x, set()) for x in ins))
            if op.primitive.name in _SAME and len(ins) == 1:
                root[out] = root.get(ins[0], ins[0])
        if op.primitive.name == "name" and ins:
            names[root.get(ins[0], ins[0])] = op.params["name"]
    found: dict[tuple[str, str], tuple[int, list[str]]] = {}
    for out in dict.fromkeys(x for x in jaxpr.outvars if not hasattr(x, "val")):
        origin = comes_from.get(out, set())
        if out in jaxpr.invars and origin == {"weights"}:
            continue
        kind = UNNAMED if "x" in origin else WEIGHTS if "weights" in origin else COORDINATES
        name = names.get(root.get(out, out), kind)
        aval = out.aval
        where = "host" if aval.memory_space == jax.memory.Space.Host else "device"
        size, shapes = found.get((name, where), (0, []))
        text = f"{aval.dtype}{list(aval.shape)}".replace(" ", "")
        found[name, where] = size + math.prod(aval.shape) * aval.dtype.itemsize, [*shapes, text]
    order = list(NAMES)
    for (name, where), (size, shapes) in sorted(
        found.items(), key=lambda item: order.index(item[0][0]) if item[0][0] in NAMES else len(order)
    ):
        yield Kept(name, where, size, ", ".join(shapes) if name in NAMES else "")


def _names(jaxpr: Any) -> Iterator[str]:
    """Every name given in a program, also inside calls and loops."""
    for op in jaxpr.eqns:
        if op.primitive.name == "name":
            yield op.params["name"]
        for value in op.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _names(inner)
