"""Rotary position embedding (RoFormer, arXiv 2104.09864): frequencies, their phases, and the rotation of pairs.

Belongs here: turning vectors by phases, and phases that stay right at any int32 position. Does not belong here: how
frequencies are chosen (`scaling.py`), which layers rotate (`encoding.py`), which positions a layer uses (the model).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array

Pairing = Literal["half", "interleaved"]
"""Which entries form a pair. `half`: (i, i + H/2), as GPT-NeoX and most Hugging Face models. `interleaved`: (2i, 2i+1),
as the original paper, Meta's code and Llama 4. One is the other after a fixed permutation of the head width."""

_DIGIT = 11  # bits per digit of a position; three digits cover int32
_TURN = 2.0**32  # a full turn in fixed point: uint32 arithmetic then reduces modulo one turn for free


@dataclass(frozen=True, eq=False)
class Frequencies:
    """How fast each pair of a head turns. Static host values: they are constants of the compiled program.

    Attributes:
      inv_freq: float64 `[H/2]`, radians per position.
      attention_factor: factor that a scaling method (YaRN, LongRoPE) wants on q and on k alike. The rotation does not
        apply it, so that it always keeps norms: a weightless norm on q and k after the rotation would cancel the
        factor. Multiply the logits by its square instead (`encoding.logit_factor`).
    """

    inv_freq: np.ndarray
    attention_factor: float = 1.0

    @classmethod
    def geometric(cls, head_dim: int, theta: float) -> Frequencies:
        """The frequencies of the paper, `theta ** (-2i / H)` for i = 0 … H/2 - 1 (section 3.2.2)."""
        if head_dim < 2 or head_dim % 2:
            raise ConfigError("head_dim", head_dim, "a rotation turns pairs; make the head width even and at least 2")
        return cls(theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))


def phases(positions: Array, frequencies: Frequencies) -> jax.Array:
    """The angle of each pair at each position, reduced to half a turn either way.

    A float32 product `position * inv_freq` is wrong by 0.01 rad at position 1e6 and by more than 0.1 rad at 1e7. Here
    angles are fixed-point fractions of a turn: the position is cut into digits of 11 bits, and what one unit of each
    digit turns by is built in float64 on the host, already reduced to a fraction of a turn. The products and their sum
    wrap modulo 2**32, which is the reduction modulo one turn. The error is below 4e-6 rad at every int32 position.

    Args:
      positions: integers of any shape `[...]`; negative ones turn backwards.
      frequencies: of `H/2` pairs.

    Returns:
      float32 `[..., H/2]` in [-pi, pi].
    """
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions are {positions.dtype}; they must be integers, floats lose positions beyond 2**24")
    positions = positions.astype(jnp.int32)[..., None]
    turns = np.asarray(frequencies.inv_freq, np.float64) / (2 * np.pi)
    mask = (1 << _DIGIT) - 1
    digits = (positions & mask, (positions >> _DIGIT) & mask, positions >> (2 * _DIGIT))
    angle = jnp.zeros(positions.shape[:-1] + turns.shape, jnp.uint32)
    for place, digit in enumerate(digits):
        unit = turns * 2.0 ** (place * _DIGIT)
        unit = np.round((unit - np.floor(unit)) * _TURN) % _TURN
        angle = angle + digit.astype(jnp.uint32) * unit.astype(np.uint32)
    signed = jax.lax.bitcast_convert_type(angle, jnp.int32)
    return signed.astype(jnp.float32) * np.float32(2 * np.pi / _TURN)


def cos_sin(positions: Array, frequencies: Frequencies) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of `phases`, float32 `[..., H/2]`: computed once, shared by queries and keys."""
    angle = phases(positions, frequencies)
    return jnp.cos(angle), jnp.sin(angle)


def turn(x_BTNH: Array, cos_BTP: Array, sin_BTP: Array, pairing: Pairing) -> jax.Array:
    """Turn every pair of every head by the angle of its place (P = H/2 pairs).

    Args:
      x_BTNH: queries or keys, any float type and any number of heads.
      cos_BTP, sin_BTP: from `cos_sin`.
      pairing: which entries form a pair.

    Returns:
      `[B, T, N, H]` in the type of `x_BTNH`; the arithmetic is float32.
    """
    if x_BTNH.shape[-1] != 2 * cos_BTP.shape[-1]:
        raise ConfigError(
            "head_dim", x_BTNH.shape[-1], f"these frequencies are for a head width of {2 * cos_BTP.shape[-1]}"
        )
    x = x_BTNH.astype(jnp.float32)
    c, s = cos_BTP[..., None, :], sin_BTP[..., None, :]
    if pairing == "half":
        a, b = jnp.split(x, 2, axis=-1)
        out = jnp.concatenate([a * c - b * s, a * s + b * c], axis=-1)
    elif pairing == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
        out = jnp.stack([a * c - b * s, a * s + b * c], axis=-1).reshape(x.shape)
    else:
        raise ConfigError("pairing", pairing, "choose 'half' or 'interleaved'")
    return out.astype(x_BTNH.dtype)


def rotate(x_BTNH: Array, positions_BT: Array, frequencies: Frequencies, pairing: Pairing = "half") -> jax.Array:
    """Rotate queries or keys by their positions: `turn` by `cos_sin(positions_BT, frequencies)`.

    The score of a rotated query and a rotated key depends on the difference of their positions only.
    """
    return turn(x_BTNH, *cos_sin(positions_BT, frequencies), pairing)
