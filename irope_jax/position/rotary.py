"""`RoPE` as configuration, and how it turns queries and keys at given places.

Belongs here: what one rotating layer is. The mathematics of a rotation is `rope.py`, the choice of frequencies
`scaling.py`, the union with layers that do not rotate `encoding.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import flax.struct
import jax
import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array, TokenInfo
from irope_jax.position import rope
from irope_jax.position.documents import document_lengths
from irope_jax.position.rope import Blur, Frequencies, Pairing, Turns
from irope_jax.position.scaling import AtLength, DynamicNTK, LongRoPE, RopeScaling, Unscaled


@flax.struct.dataclass
class Places:
    """Where vectors stand, as a rotation needs to know it.

    Attributes:
      positions: int32 `[B, T]`, to turn by.
      lengths: int32 `[B, T]`, tokens of the document; None where frequencies do not depend on it.
      offsets: float32 `[B, T]`, a fraction of a position to add; None for none.
      spreads: float32 `[B, T]`, standard deviation of the position in positions; None for none.
    """

    positions: Array
    lengths: Array | None = None
    offsets: Array | None = None
    spreads: Array | None = None


@dataclass(frozen=True)
class RoPE:
    """Rotary positions.

    Attributes:
      theta: base of the frequencies; larger turns more slowly.
      scaling: how the frequencies are changed for longer text.
      pairing: which entries of a head form a pair; see `rope.Pairing`.
      fraction: how much of a head turns; 1 is all of it.
      part: which part. `proportional`: the fastest `floor(fraction * H / 2)` pairs; the slowest stand still and carry
        content at any distance (p-RoPE, arXiv 2410.06205). `prefix`: the first `fraction * H` entries, with a whole
        spectrum of their own (GPT-NeoX; Hugging Face `partial_rotary_factor`).
      blur: what is made of `TokenInfo.spreads`, where entries stand for several positions; see `rope.attenuation`.
    """

    theta: float = 10000.0
    scaling: RopeScaling = field(default_factory=Unscaled)
    pairing: Pairing = "half"
    fraction: float = 1.0
    part: Literal["proportional", "prefix"] = "proportional"
    blur: Blur = "gaussian"
    kind: ClassVar[str] = "rope"

    def __post_init__(self):
        if not self.theta > 1:
            raise ConfigError("theta", self.theta, "the base of the frequencies must be above 1; 10000.0 is usual")
        for name, options in (
            ("pairing", ("half", "interleaved")),
            ("part", ("proportional", "prefix")),
            ("blur", ("gaussian", "span")),
        ):
            if getattr(self, name) not in options:
                raise ConfigError(name, getattr(self, name), f"choose {options[0]!r} or {options[1]!r}")
        if not 0 < self.fraction <= 1:
            raise ConfigError("fraction", self.fraction, "the share of a head that turns; above 0 and up to 1")

    @property
    def partial_prefix(self) -> bool:
        """Whether entries beyond a prefix are left alone: a factor on the rotation is then not one on the logits."""
        return self.part == "prefix" and self.fraction < 1

    @property
    def magnifies_part(self) -> bool:
        """Whether a factor of the scaling lies on the turned entries only, not on whole queries and keys."""
        return self.partial_prefix and self.scaling.kind in ("yarn", "longrope")

    @property
    def follows_length(self) -> bool:
        """Whether frequencies depend on the length of a document."""
        return isinstance(self.scaling, DynamicNTK | LongRoPE)

    @property
    def relative(self) -> bool:
        """Whether scores depend on distances alone, so that positions may be counted from anywhere."""
        return getattr(self.scaling, "first_tokens", 0) == 0

    def at_length(self, length: int) -> RoPE:
        """The rotation of documents of `length` tokens, for any."""
        return dataclasses.replace(self, scaling=AtLength(self.scaling, length)) if self.follows_length else self

    def frequencies(self, head_dim: int, seq_len: int | None = None) -> Frequencies:
        """Frequencies of this layer for head width `head_dim`.

        Raises:
          ConfigError: an odd width, or a scaling that does not fit it.
        """
        if self.part == "prefix":
            width = round(self.fraction * head_dim, 6)
            if width % 2 or width < 2:
                fix = f"turns {width:g} of {head_dim} entries; choose a fraction that gives whole pairs"
                raise ConfigError("fraction", self.fraction, fix)
            return self.scaling.frequencies(int(width), self.theta, seq_len)
        found = self.scaling.frequencies(head_dim, self.theta, seq_len)
        turning = int(self.fraction * (head_dim // 2) + 1e-9)
        if turning == head_dim // 2:
            return found
        still = lambda inv_freq: np.where(np.arange(head_dim // 2) < turning, inv_freq, 0.0)
        return dataclasses.replace(
            found,
            inv_freq=still(found.inv_freq),
            shorter=tuple((length, still(inv_freq)) for length, inv_freq in found.shorter),
            first=None if found.first is None else still(found.first),
        )

    def check(self, head_dim: int) -> None:
        """Raises `ConfigError` if heads of this width cannot be turned so."""
        # any length will do: what it chooses was computed from checked numbers
        self.frequencies(head_dim, getattr(self.scaling, "original_length", None))
        self.frequencies(head_dim, getattr(self.scaling, "original_length", 1) + 1)

    def logit_factor(self, head_dim: int) -> float:
        """What the layer's logits are multiplied by beside `1 / sqrt(H)`."""
        found = self.frequencies(head_dim, getattr(self.scaling, "original_length", None))
        return (1.0 if self.partial_prefix else found.attention_factor**2) * found.logit_factor

    def places(self, info: TokenInfo, positions_BT: Array) -> Places:
        """The places of tokens that are to be turned by `positions_BT`."""
        lengths = document_lengths(info) if self.follows_length else None
        return Places(positions_BT, lengths, info.offsets, info.spreads)

    def turn(
        self, q_BTNH: Array, k_BSKH: Array, q_at: Places, k_at: Places, turns: Turns | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Queries and keys turned by their places, in their own types.

        The very same `Places` twice compute their angles once. `turns` replaces the frequencies of the scaling: a
        search or a training of frequencies passes them as arguments of the compiled program.
        """
        factor = 1.0
        if turns is None:
            frequencies = self.frequencies(q_BTNH.shape[-1], k_at.positions.shape[-1])
            turns, factor = Turns.of(frequencies), frequencies.attention_factor if self.partial_prefix else 1.0

        def angles(at: Places) -> tuple[jax.Array, jax.Array]:
            found = rope.cos_sin(
                at.positions, turns, lengths=at.lengths, offsets=at.offsets, spreads=at.spreads, blur=self.blur
            )
            return found if factor == 1 else (found[0] * factor, found[1] * factor)

        q_turn = angles(q_at)
        k_turn = q_turn if k_at is q_at else angles(k_at)
        return rope.turn(q_BTNH, *q_turn, self.pairing), rope.turn(k_BSKH, *k_turn, self.pairing)
