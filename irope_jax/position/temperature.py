"""Attention temperature: a factor on each query that sharpens attention as more keys become visible.

Belongs here: factors that are functions of a query's coordinates, and the one that is learned. Always computed in
float32 from integers: bfloat16 positions put one token in six of the first million into the wrong step of a staircase.
How many keys a query sees is told by its mask and passed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array, TokenInfo
from irope_jax.position.documents import document_lengths

When = Literal["always", "eval"]
"""`eval`: not while training; the model learns without the temperature and is read with it."""


@dataclass(frozen=True)
class Constant:
    """No temperature: every query keeps its size."""

    kind: ClassVar[str] = "none"


@dataclass(frozen=True)
class LogFloor:
    """Llama 4's temperature: `1 + attn_scale * ln(1 + floor((position + offset) / floor_scale))`.

    A staircase that first rises at position `floor_scale - offset` (positions count from 0 in the document). With
    `floor_scale = L` and `attn_scale = 1 / ln L` for a training length L it is log-n scaling, under which a key that
    stood out among L keys stands out among any number.

    Attributes:
      floor_scale: width of a step in tokens.
      attn_scale: height of the staircase per e-fold of length.
      offset: Llama 4 counts tokens (1), Ministral 3 positions (0).
      by: `position` of the query, so that decoding agrees with one forward pass; or `length` of its whole document, one
        factor for all of it.
      when: `always`, or `eval` only.
    """

    floor_scale: int = 8192
    attn_scale: float = 0.1
    offset: Literal[0, 1] = 1
    by: Literal["position", "length"] = "position"
    when: When = "always"
    kind: ClassVar[str] = "log_floor"

    def __post_init__(self):
        if self.floor_scale < 1:
            raise ConfigError("floor_scale", self.floor_scale, "the width of a step in tokens; use 1 or more")
        if self.attn_scale < 0:
            raise ConfigError("attn_scale", self.attn_scale, "would flatten attention with length; use 0 or more")


@dataclass(frozen=True)
class LogN:
    """Log-n scaling: `max(1, ln n / ln L)` for a query that sees n keys (Su 2021; Qwen).

    Attributes:
      train_length: L; up to it nothing changes.
      when: `always`, or `eval` only.
    """

    train_length: int
    when: When = "always"
    kind: ClassVar[str] = "log_n"

    def __post_init__(self):
        if self.train_length < 2:
            raise ConfigError("train_length", self.train_length, "tokens the model was trained at; use 2 or more")


@dataclass(frozen=True)
class SSMax:
    """Scalable softmax: `s ln n` for a query that sees n keys, s learned per head (arXiv 2501.19399).

    A query that sees itself alone gets 0, which changes nothing: it has nowhere else to look.

    Attributes:
      train_length: s starts so that the mean factor over n = 1 … train_length is 1.
    """

    train_length: int
    kind: ClassVar[str] = "ssmax"

    def __post_init__(self):
        if self.train_length < 2:
            raise ConfigError("train_length", self.train_length, "tokens of a training document; use 2 or more")

    @property
    def initial(self) -> float:
        """`1 / mean(ln n)`; the mean is `ln(train_length!) / train_length`."""
        return self.train_length / math.lgamma(self.train_length + 1)


TemperatureSpec = Constant | LogFloor | LogN | SSMax


def scale(
    spec: TemperatureSpec, info: TokenInfo, visible_BT: Array, learned_N: Array | None = None
) -> jax.Array | None:
    """The factor of each query, or `None` where there is nothing to multiply.

    Args:
      spec: which temperature.
      info: coordinates of the queries; integer positions in their documents, so that packing and decoding agree.
      visible_BT: int32, how many keys each query sees.
      learned_N: float32, the learned factor per head where `is_learned(spec)`.

    Returns:
      float32 `[B, T, N]` where it differs by head, else `[B, T, 1]`.
    """
    match spec:
        case Constant():
            return None
        case LogFloor(floor_scale, attn_scale, offset, by):
            counts_BT = _whole(info.positions) + offset if by == "position" else document_lengths(info) - 1 + offset
            factor_BT = 1.0 + attn_scale * jnp.log1p((counts_BT // floor_scale).astype(jnp.float32))
            return factor_BT[..., None]
        case LogN(train_length):
            factor_BT = jnp.maximum(1.0, _log(visible_BT) / math.log(train_length))
            return factor_BT[..., None]
        case SSMax():
            return _log(visible_BT)[..., None] * learned_N.astype(jnp.float32)
    raise ConfigError("temperature", spec, "not a TemperatureSpec; choose Constant, LogFloor, LogN or SSMax")


def is_learned(spec: TemperatureSpec) -> bool:
    """Whether the temperature has a parameter per head."""
    return isinstance(spec, SSMax)


def in_training(spec: TemperatureSpec) -> TemperatureSpec:
    """The temperature while training."""
    return Constant() if getattr(spec, "when", "always") == "eval" else spec


def _whole(positions: Array) -> jax.Array:
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions are {positions.dtype}; a temperature needs integer positions")
    return positions.astype(jnp.int32)


def _log(visible_BT: Array) -> jax.Array:
    return jnp.log(jnp.maximum(_whole(visible_BT), 1).astype(jnp.float32))
