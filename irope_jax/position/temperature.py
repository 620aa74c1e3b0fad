"""Attention temperature: a factor on each query that sharpens attention as more keys become visible.

Belongs here: factors that are pure functions of the query's position. Always computed in float32 from integer
positions: bfloat16 positions put one token in six of the first million into the wrong step of the staircase.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array


@dataclass(frozen=True)
class Constant:
    """No temperature: every query keeps its size."""

    kind: ClassVar[str] = "none"


@dataclass(frozen=True)
class LogFloor:
    """Llama 4's temperature: `1 + attn_scale * ln(1 + floor((position + 1) / floor_scale))`.

    A staircase that first rises at position `floor_scale - 1` (positions count from 0 in the document). With
    `floor_scale = L` and `attn_scale = 1 / ln L` for a training length L it is log-n scaling, under which a key that
    stood out among L keys stands out among any number.

    Attributes:
      floor_scale: width of the first step in tokens.
      attn_scale: height of the staircase per e-fold of length.
    """

    floor_scale: int = 8192
    attn_scale: float = 0.1
    kind: ClassVar[str] = "log_floor"

    def __post_init__(self):
        if self.floor_scale < 1:
            raise ConfigError("floor_scale", self.floor_scale, "the width of a step in tokens; use 1 or more")
        if self.attn_scale < 0:
            raise ConfigError("attn_scale", self.attn_scale, "would flatten attention with length; use 0 or more")


TemperatureSpec = Constant | LogFloor


def scale(spec: TemperatureSpec, positions_BT: Array) -> jax.Array | None:
    """The factor of each query, float32 `[B, T]`, or `None` where there is nothing to multiply.

    Args:
      spec: which temperature.
      positions_BT: integer positions of the queries in their documents, so that packing and decoding agree.
    """
    match spec:
        case Constant():
            return None
        case LogFloor(floor_scale, attn_scale):
            positions_BT = jnp.asarray(positions_BT)
            if not jnp.issubdtype(positions_BT.dtype, jnp.integer):
                raise TypeError(f"positions are {positions_BT.dtype}; a temperature needs integer positions")
            steps = (positions_BT.astype(jnp.int32) + 1) // floor_scale
            return 1.0 + attn_scale * jnp.log1p(steps.astype(jnp.float32))
    raise ConfigError("temperature", spec, "not a TemperatureSpec; choose Constant or LogFloor")
