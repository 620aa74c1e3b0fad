"""What a layer does with positions: rotate queries and keys (`RoPE`) or nothing (`NoPE`).

Belongs here: the union `PositionSpec` and the one function the model calls. Which positions a layer passes (in the
document, or within a chunk) is the model's choice; this room turns by whatever it is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import jax

from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array
from irope_jax.position import rope
from irope_jax.position.rope import Frequencies, Pairing
from irope_jax.position.scaling import RopeScaling, Unscaled


@dataclass(frozen=True)
class RoPE:
    """Rotary positions.

    Attributes:
      theta: base of the frequencies; larger turns more slowly.
      scaling: how the frequencies are changed for longer text.
      pairing: which entries of a head form a pair; see `rope.Pairing`.
    """

    theta: float = 10000.0
    scaling: RopeScaling = field(default_factory=Unscaled)
    pairing: Pairing = "half"
    kind: ClassVar[str] = "rope"

    def __post_init__(self):
        if not self.theta > 1:
            raise ConfigError("theta", self.theta, "the base of the frequencies must be above 1; 10000.0 is usual")
        if self.pairing not in ("half", "interleaved"):
            raise ConfigError("pairing", self.pairing, "choose 'half' or 'interleaved'")

    def frequencies(self, head_dim: int, seq_len: int | None = None) -> Frequencies:
        """Frequencies of this layer for head width `head_dim`; raises `ConfigError` if it is odd."""
        return self.scaling.frequencies(head_dim, self.theta, seq_len)


@dataclass(frozen=True)
class NoPE:
    """No position information but the causal mask (arXiv 2305.19466)."""

    kind: ClassVar[str] = "nope"


PositionSpec = RoPE | NoPE


def encode(
    spec: PositionSpec, q_BTNH: Array, k_BSKH: Array, q_positions_BT: Array, k_positions_BS: Array
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys as attention should see them.

    Args:
      spec: what the layer does with positions.
      q_BTNH, k_BSKH: projected queries and keys, before any cache.
      q_positions_BT, k_positions_BS: int32 positions. Passing the very same array twice computes its angles once.

    Returns:
      Both, in their own types and shapes. The rotation keeps norms; multiply the logits by `logit_factor(spec, H)`.
    """
    match spec:
        case NoPE():
            return q_BTNH, k_BSKH
        case RoPE():
            frequencies = spec.frequencies(q_BTNH.shape[-1])
            q_turn = rope.cos_sin(q_positions_BT, frequencies)
            k_turn = q_turn if k_positions_BS is q_positions_BT else rope.cos_sin(k_positions_BS, frequencies)
            return rope.turn(q_BTNH, *q_turn, spec.pairing), rope.turn(k_BSKH, *k_turn, spec.pairing)
    raise ConfigError("position", spec, "not a PositionSpec; choose RoPE or NoPE")


def logit_factor(spec: PositionSpec, head_dim: int, seq_len: int | None = None) -> float:
    """What the layer's attention logits are multiplied by beside 1/sqrt(H): `attention_factor ** 2`, usually 1."""
    return spec.frequencies(head_dim, seq_len).attention_factor ** 2 if isinstance(spec, RoPE) else 1.0
