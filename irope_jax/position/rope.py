"""Rotary position embedding (RoFormer, arXiv 2104.09864): frequencies, their phases, and the rotation of pairs.

Belongs here: turning vectors by phases, and phases that stay right at any int32 position. Does not belong here: how
frequencies are chosen (`scaling.py`), which layers rotate (`encoding.py`), which positions a layer uses (the model).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array

Pairing = Literal["half", "interleaved"]
"""Which entries form a pair. `half`: (i, i + H/2), as GPT-NeoX and most Hugging Face models. `interleaved`: (2i, 2i+1),
as the original paper, Meta's code and Llama 4. One is the other after a fixed permutation of the head width."""

Blur = Literal["gaussian", "span"]
"""What is known of an entry that stands for several positions: a normal distribution, or a run of whole positions of
equal weight."""

_DIGIT = 11  # bits per digit of a position; three digits cover int32
_TURN = 2.0**32  # a full turn in fixed point: uint32 arithmetic then reduces modulo one turn for free
_RADIANS = np.float32(2 * np.pi / _TURN)


@dataclass(frozen=True, eq=False)
class Frequencies:
    """How fast each pair of a head turns: float64 values of the host, P pairs.

    Attributes:
      inv_freq: `[P]`, radians per position, of the longest documents.
      attention_factor: factor that a scaling method (YaRN, LongRoPE) wants on q and on k alike. The rotation does not
        apply it, so that it always keeps norms: a weightless norm on q and k after the rotation would cancel the
        factor. Multiply the logits by its square instead (`encoding.logit_factor`).
      logit_factor: further factor on the logits alone.
      shorter: `(length, inv_freq)` in growing order: documents of up to `length` tokens turn by these instead.
      first_tokens: tokens at positions below this turn by `first`, whatever their document.
      first: `[P]`, or None where `first_tokens` is 0.
    """

    inv_freq: np.ndarray
    attention_factor: float = 1.0
    logit_factor: float = 1.0
    shorter: tuple[tuple[int, np.ndarray], ...] = ()
    first_tokens: int = 0
    first: np.ndarray | None = None

    @classmethod
    def geometric(cls, head_dim: int, theta: float) -> Frequencies:
        """The frequencies of the paper, `theta ** (-2i / H)` for i = 0 … H/2 - 1 (section 3.2.2)."""
        if head_dim < 2 or head_dim % 2:
            raise ConfigError("head_dim", head_dim, "a rotation turns pairs; make the head width even and at least 2")
        return cls(theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))


@flax.struct.dataclass
class Turns:
    """Frequencies as a program reads them: arrays, so that a compiled program takes any others of the same shape.

    A frequency is a fraction of a turn in fixed point, once per digit of a position: place 0 turns by it per position,
    place 1 per 2048 positions, place 2 per 2048**2, each reduced modulo one turn.

    Attributes:
      units: uint32 `[R, 3, P]`, one set of frequencies for each range of document lengths.
      lengths: int32 `[R - 1]`, growing: set r is for documents of up to `lengths[r]` tokens, the last for longer ones.
        None where there is one set.
      first_units: uint32 `[3, P]`, frequencies of the first tokens; None where there is nothing special about them.
      first_tokens: int32, how many these are.
      trained: float32 `[P]`, radians per position that gradients flow to, instead of `units`.
    """

    units: Array | None
    lengths: Array | None = None
    first_units: Array | None = None
    first_tokens: Array | None = None
    trained: Array | None = None

    @classmethod
    def of(cls, frequencies: Frequencies) -> Turns:
        """Exact to 2**-33 of a turn for each digit of a position."""
        sets = [*(inv_freq for _, inv_freq in frequencies.shorter), frequencies.inv_freq]
        lengths = np.asarray([length for length, _ in frequencies.shorter], np.int32)
        turns = cls(fixed_point(np.stack(sets)), lengths if len(lengths) else None)
        if not frequencies.first_tokens:
            return turns
        return turns.replace(
            first_units=fixed_point(frequencies.first), first_tokens=np.asarray(frequencies.first_tokens, np.int32)
        )

    @classmethod
    def learned(cls, inv_freq_P: Array) -> Turns:
        """Frequencies that are parameters: float32 radians per position, differentiable."""
        return cls(None, trained=inv_freq_P)

    def inv_freq(self, units: Array) -> jax.Array:
        """Radians per position of chosen `units [..., 3, P]`, float32 `[..., P]`."""
        return units[..., 0, :].astype(jnp.float32) * _RADIANS

    def choose(self, positions: Array, lengths: Array | None) -> Array:
        """Units of each token, uint32 broadcastable to `[..., 3, P]`: by its document's length and its position."""
        if self.lengths is None:
            units = self.units[0]
        elif lengths is None:
            raise ValueError("these frequencies depend on the length of the document; give lengths")
        elif len(self.lengths) == 1:
            units = jnp.where((lengths <= self.lengths[0])[..., None, None], self.units[0], self.units[1])
        else:
            units = jnp.asarray(self.units)[jnp.searchsorted(jnp.asarray(self.lengths), lengths)]
        if self.first_units is not None:
            units = jnp.where((positions < self.first_tokens)[..., None, None], self.first_units, units)
        return units


def fixed_point(inv_freq: np.ndarray) -> np.ndarray:
    """`Turns.units` of float64 `[..., P]` radians per position: uint32 `[..., 3, P]`."""
    turns = np.asarray(inv_freq, np.float64) / (2 * np.pi)
    places = np.stack([turns * 2.0 ** (place * _DIGIT) for place in range(3)], axis=-2)
    return (np.round((places - np.floor(places)) * _TURN) % _TURN).astype(np.uint32)


def _angle(positions: Array, units: Array) -> jax.Array:
    """`positions * units` modulo one turn, as float32 radians in [-pi, pi]."""
    positions = positions.astype(jnp.int32)[..., None]
    mask = (1 << _DIGIT) - 1
    digits = (positions & mask, (positions >> _DIGIT) & mask, positions >> (2 * _DIGIT))
    angle = sum(digit.astype(jnp.uint32) * units[..., place, :] for place, digit in enumerate(digits))
    return jax.lax.bitcast_convert_type(angle, jnp.int32).astype(jnp.float32) * _RADIANS


@jax.custom_jvp
def _trained_angle(positions: Array, inv_freq_P: Array) -> jax.Array:
    """The angle of float32 frequencies: exact for the numbers that they are."""
    turns = inv_freq_P.astype(jnp.float32) / np.float32(2 * np.pi)
    places = jnp.stack([turns * np.float32(2.0 ** (place * _DIGIT)) for place in range(3)], axis=-2)
    # multiplying by powers of two and taking the fraction are exact in float32; a fraction stays below one turn
    units = ((places - jnp.floor(places)) * np.float32(_TURN)).astype(jnp.uint32)
    return _angle(positions, units)


@_trained_angle.defjvp
def _trained_angle_jvp(primals, tangents):
    positions, inv_freq_P = primals
    slope = positions.astype(jnp.float32)[..., None] * tangents[1]
    return _trained_angle(positions, inv_freq_P), slope


def _whole(positions: Array) -> jax.Array:
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions are {positions.dtype}; they must be integers, floats lose positions beyond 2**24")
    return positions


def phases(
    positions: Array, frequencies: Frequencies | Turns, *, lengths: Array | None = None, offsets: Array | None = None
) -> jax.Array:
    """The angle of each pair at each position, reduced to half a turn either way.

    A float32 product `position * inv_freq` is wrong by 0.01 rad at position 1e6 and by more than 0.1 rad at 1e7. Here
    angles are fixed-point fractions of a turn: the position is cut into digits of 11 bits, and what one unit of each
    digit turns by is built in float64 on the host, already reduced to a fraction of a turn. The products and their sum
    wrap modulo 2**32, which is the reduction modulo one turn. The error is below 4e-6 rad at every int32 position.

    Args:
      positions: integers of any shape `[...]`; negative ones turn backwards.
      frequencies: of P pairs.
      lengths: tokens of the document each position belongs to, where frequencies depend on it.
      offsets: float32, added to the positions: a fraction of one position, such as 0.5.

    Returns:
      float32 `[..., P]`, in [-pi, pi] where there are no offsets.
    """
    positions = _whole(positions)
    turns = Turns.of(frequencies) if isinstance(frequencies, Frequencies) else frequencies
    if turns.trained is not None:
        angle, inv_freq = _trained_angle(positions, turns.trained), turns.trained
    else:
        units = turns.choose(positions, lengths)
        angle, inv_freq = _angle(positions, units), turns.inv_freq(units)
    return angle if offsets is None else angle + offsets[..., None] * inv_freq


def attenuation(inv_freq: Array, spreads: Array, blur: Blur) -> jax.Array:
    """How much of a pair's length is left when a vector is averaged over the positions its entry stands for.

    The rotation of an entry whose position is uncertain is the mean of its rotations: it turns by the centre and
    shrinks by this, fast pairs most. `gaussian`: `exp(-(spread f)^2 / 2)`, the characteristic function of the normal
    distribution. `span`: w consecutive positions of equal weight, `sin(w f / 2) / (w sin(f / 2))` (Dirichlet's kernel);
    their standard deviation is `sqrt((w^2 - 1) / 12)`, so `spread` says w.

    Args:
      inv_freq: float32 `[..., P]`, f.
      spreads: float32 `[...]`, standard deviation in positions; 0 leaves everything as it is.
      blur: which distribution.

    Returns:
      float32 `[..., P]`, at most 1; `span` has negative side lobes where `w f > 2 pi`.
    """
    spreads = jnp.asarray(spreads, jnp.float32)[..., None]
    if blur == "gaussian":
        return jnp.exp(-0.5 * jnp.square(spreads * inv_freq))
    width = jnp.sqrt(1 + 12 * jnp.square(spreads))
    half = inv_freq / 2
    still = (spreads == 0) | (half == 0)  # pairs that never turn, and entries of one position
    return jnp.where(still, 1.0, jnp.sin(width * half) / (width * jnp.sin(jnp.where(half == 0, 1.0, half))))


def cos_sin(
    positions: Array,
    frequencies: Frequencies | Turns,
    *,
    lengths: Array | None = None,
    offsets: Array | None = None,
    spreads: Array | None = None,
    blur: Blur = "gaussian",
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of `phases`, times `attenuation` where entries have spreads: float32 `[..., P]` each."""
    turns = Turns.of(frequencies) if isinstance(frequencies, Frequencies) else frequencies
    angle = phases(positions, turns, lengths=lengths, offsets=offsets)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if spreads is None:
        return cos, sin
    inv_freq = turns.trained
    if inv_freq is None:
        inv_freq = turns.inv_freq(turns.choose(jnp.asarray(positions), lengths))
    left = attenuation(inv_freq, spreads, blur)
    return cos * left, sin * left


def turn(x_BTNH: Array, cos_BTP: Array, sin_BTP: Array, pairing: Pairing) -> jax.Array:
    """Turn the pairs of every head by the angles of their place.

    Args:
      x_BTNH: queries or keys, any float type and any number of heads.
      cos_BTP, sin_BTP: from `cos_sin`. Fewer pairs than H/2 turn the first 2P entries and leave the rest.
      pairing: which entries form a pair.

    Returns:
      `[B, T, N, H]` in the type of `x_BTNH`; the arithmetic is float32.
    """
    width = 2 * cos_BTP.shape[-1]
    if x_BTNH.shape[-1] < width:
        raise ConfigError("head_dim", x_BTNH.shape[-1], f"these frequencies are for a head width of {width}")
    x = x_BTNH[..., :width].astype(jnp.float32)
    c, s = cos_BTP[..., None, :], sin_BTP[..., None, :]
    if pairing == "half":
        a, b = jnp.split(x, 2, axis=-1)
        out = jnp.concatenate([a * c - b * s, a * s + b * c], axis=-1)
    elif pairing == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
        out = jnp.stack([a * c - b * s, a * s + b * c], axis=-1).reshape(x.shape)
    else:
        raise ConfigError("pairing", pairing, "choose 'half' or 'interleaved'")
    out = out.astype(x_BTNH.dtype)
    return out if width == x_BTNH.shape[-1] else jnp.concatenate([out, x_BTNH[..., width:]], axis=-1)


def rotate(
    x_BTNH: Array, positions_BT: Array, frequencies: Frequencies | Turns, pairing: Pairing = "half"
) -> jax.Array:
    """Rotate queries or keys by their positions: `turn` by `cos_sin(positions_BT, frequencies)`.

    The score of a rotated query and a rotated key depends on the difference of their positions only.
    """
    return turn(x_BTNH, *cos_sin(positions_BT, frequencies), pairing)
