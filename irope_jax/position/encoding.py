"""What a layer does with positions: the union `PositionSpec`, and the functions by which the model asks it.

Belongs here: which kinds there are and what each makes of queries, keys and logits. Which positions a layer passes (in
the document, or within a chunk) is the model's choice; this room turns by whatever it is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array, TokenInfo
from irope_jax.position.alibi import alibi_slopes
from irope_jax.position.extension import DualChunk, Part, ReRoPE, SelfExtend
from irope_jax.position.rope import Turns
from irope_jax.position.rotary import RoPE


@dataclass(frozen=True)
class NoPE:
    """No position information but the causal mask (arXiv 2305.19466)."""

    kind: ClassVar[str] = "nope"


@dataclass(frozen=True)
class ALiBi:
    """A penalty on distance in every head, `-slope * (i - j)`, and no rotation (arXiv 2108.12409)."""

    kind: ClassVar[str] = "alibi"


@dataclass(frozen=True)
class XPos:
    """RoPE whose pairs also decay with distance, the fast ones most (arXiv 2212.10554).

    Pair i of the logits is multiplied by `zeta_i ** (distance / scale_base)`, `zeta_i = (2i/H + gamma) / (1 + gamma)`:
    queries by `zeta_i ** (p / scale_base)`, keys by its inverse. Both leave the range of float32 at some distance from
    position 0 (`longest`: 26,156 tokens with the defaults), so longer documents need a chunked mask, whose positions
    start again in each chunk.

    Attributes:
      rope: the rotation.
      gamma: the larger, the slower the decay.
      scale_base: tokens by which the exponent grows by one.
    """

    rope: RoPE = field(default_factory=RoPE)
    gamma: float = 0.4
    scale_base: float = 512.0
    kind: ClassVar[str] = "xpos"

    def __post_init__(self):
        for name in ("gamma", "scale_base"):
            if getattr(self, name) <= 0:
                raise ConfigError(name, getattr(self, name), "must be positive")

    def log_zeta(self, head_dim: int) -> np.ndarray:
        """float64 `[P]`, logarithm of what a pair decays by in `scale_base` tokens."""
        return np.log((np.arange(0, head_dim, 2) / head_dim + self.gamma) / (1 + self.gamma))

    @property
    def longest(self) -> int:
        """Positions up to which factors stay in float32, with 24 of its 88 e-folds left for what they multiply."""
        return int(64.0 * self.scale_base / -np.log(self.gamma / (1 + self.gamma)))


PositionSpec = RoPE | NoPE | ALiBi | XPos | SelfExtend | ReRoPE | DualChunk
EXTENSIONS = SelfExtend | ReRoPE | DualChunk
"""Kinds that are several attentions over disjoint sets of keys."""


def rotation(spec: PositionSpec) -> RoPE | None:
    """The rotation inside a spec, if it has one."""
    return spec if isinstance(spec, RoPE) else getattr(spec, "rope", None)


def is_relative(spec: PositionSpec) -> bool:
    """Whether only distances matter, so that a layer may count positions from the start of a chunk."""
    inner = rotation(spec)
    return inner is None or inner.relative


def encode(
    spec: PositionSpec,
    q_BTNH: Array,
    k_BTKH: Array,
    info: TokenInfo,
    positions_BT: Array,
    *,
    turns: Turns | None = None,
    longest: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys of the same tokens as attention should see them.

    Args:
      spec: what the layer does with positions; none of `EXTENSIONS`, which `encode_parts` does.
      q_BTNH, k_BTKH: projected queries and keys.
      info: coordinates of the tokens.
      positions_BT: int32, what to turn by.
      turns: frequencies instead of the spec's own.
      longest: the greatest position there can be, plus one; None is the length of the row.

    Returns:
      Both, in their own types and shapes. The rotation keeps norms (unless entries have spreads); multiply the logits
      by `logit_factor(spec, H)`.

    Raises:
      ConfigError: a spec that cannot do this head width or length.
    """
    match spec:
        case NoPE() | ALiBi():
            return q_BTNH, k_BTKH
        case RoPE():
            at = spec.places(info, positions_BT)
            return spec.turn(q_BTNH, k_BTKH, at, at, turns)
        case XPos():
            longest = positions_BT.shape[-1] if longest is None else longest
            if longest > spec.longest:
                fix = f"stays in float32 up to {spec.longest:,} positions, here are {longest:,}; use a chunked mask"
                raise ConfigError("position", spec.kind, fix)
            at = spec.rope.places(info, positions_BT)
            q_BTNH, k_BTKH = spec.rope.turn(q_BTNH, k_BTKH, at, at, turns)
            log_zeta_P = spec.log_zeta(q_BTNH.shape[-1]).astype(np.float32)
            exponent_BTP = positions_BT[..., None] / spec.scale_base * log_zeta_P
            return _stretch(q_BTNH, exponent_BTP, spec.rope), _stretch(k_BTKH, -exponent_BTP, spec.rope)
    raise ConfigError("position", spec, "not a kind that encodes queries and keys once")


def _stretch(x_BTNH: Array, exponent_BTP: Array, inner: RoPE) -> jax.Array:
    double = jnp.repeat if inner.pairing == "interleaved" else lambda x, times, axis: jnp.concatenate([x] * times, axis)
    factor_BTH = double(jnp.exp(exponent_BTP), 2, axis=-1)
    return (x_BTNH.astype(jnp.float32) * factor_BTH[..., None, :]).astype(x_BTNH.dtype)


def encode_parts(
    spec: PositionSpec, q_BTNH: Array, k_BTKH: Array, info: TokenInfo, *, turns: Turns | None = None
) -> list[tuple[jax.Array, jax.Array, Part]] | None:
    """Queries and keys once per part of the keys, for `EXTENSIONS`; None for every other spec."""
    if not isinstance(spec, EXTENSIONS):
        return None
    encoded = []
    for part in spec.parts(info):
        q_at, k_at = spec.rope.places(info, part.q_positions), spec.rope.places(info, part.k_positions)
        encoded.append((*spec.rope.turn(q_BTNH, k_BTKH, q_at, k_at, turns), part))
    return encoded


def logit_factor(spec: PositionSpec, head_dim: int) -> float:
    """What the layer's attention logits are multiplied by beside 1/sqrt(H), usually 1."""
    inner = rotation(spec)
    return 1.0 if inner is None else inner.logit_factor(head_dim)


def slopes(spec: PositionSpec, num_heads: int) -> np.ndarray | None:
    """ALiBi's slopes, float32 `[N]`; None for every other spec."""
    return alibi_slopes(num_heads) if isinstance(spec, ALiBi) else None


def check(spec: PositionSpec, head_dim: int) -> None:
    """Raises `ConfigError` if heads of this width cannot be encoded so."""
    inner = rotation(spec)
    if inner is not None:
        inner.check(head_dim)
    if isinstance(spec, XPos) and inner.fraction < 1:
        raise ConfigError("rope.fraction", inner.fraction, "xPos decays every pair; use 1.0")
