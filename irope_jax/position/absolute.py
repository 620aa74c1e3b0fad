"""Absolute position embeddings, added to the token embeddings once: the arms that rotations are compared with.

The tables and their union belong here; the decoder adds them and holds the learned one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array
from irope_jax.position.rope import Frequencies, phases


@dataclass(frozen=True)
class NoEmbedding:
    """Nothing is added: positions are a matter of the layers."""

    kind: ClassVar[str] = "none"


@dataclass(frozen=True)
class Sinusoidal:
    """Fixed sines and cosines (arXiv 1706.03762, section 3.5): entry 2i is `sin(p f_i)`, entry 2i + 1 `cos(p f_i)`.

    Attributes:
      base: of the frequencies `f_i = base ** (-2i / D)`.
      amplitude: of sines and cosines; the paper's 1 goes with token embeddings that were multiplied by `sqrt(D)`.
    """

    base: float = 10000.0
    amplitude: float = 1.0
    kind: ClassVar[str] = "sinusoidal"

    def __post_init__(self):
        if not self.base > 1:
            raise ConfigError("base", self.base, "the base of the frequencies must be above 1; 10000.0 is usual")
        if self.amplitude <= 0:
            raise ConfigError("amplitude", self.amplitude, "must be positive")


@dataclass(frozen=True)
class Learned:
    """A vector per position, a parameter of the model (GPT-2).

    Attributes:
      size: positions there are vectors for; a longer row is an error, since nothing was learned for it.
    """

    size: int
    kind: ClassVar[str] = "learned"

    def __post_init__(self):
        if self.size < 1:
            raise ConfigError("size", self.size, "positions there are vectors for; use 1 or more")


PositionEmbedding = NoEmbedding | Sinusoidal | Learned


def sinusoids(spec: Sinusoidal, positions_BT: Array, width: int) -> jax.Array:
    """float32 `[B, T, D]`, right at any int32 position.

    Raises:
      ConfigError: an odd width.
    """
    if width % 2:
        raise ConfigError("d_model", width, "sines and cosines come in pairs; use an even width")
    angle = phases(positions_BT, Frequencies.geometric(width, spec.base))
    return spec.amplitude * jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*angle.shape[:-1], width)
