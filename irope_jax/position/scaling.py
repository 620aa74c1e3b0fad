"""RoPE scalings: rules that choose the frequencies of a rotation, usually to stretch a trained model to longer text.

Adding one = one frozen dataclass here with a `kind`, a `__post_init__` that checks its numbers and a `frequencies`
method, added to the union `RopeScaling` (and its formula, written again from the paper, in `tests/oracles`). Nothing
else in the package changes: rotation, model and configuration read the union.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from irope_jax.position.rope import Frequencies


class Scaling(Protocol):
    """What every member of `RopeScaling` can do."""

    kind: ClassVar[str]

    def frequencies(self, head_dim: int, theta: float, seq_len: int | None = None) -> Frequencies:
        """Frequencies of `head_dim / 2` pairs for base `theta`, computed in float64 on the host.

        Args:
          head_dim: head width H; odd is a `ConfigError`.
          theta: base of the unscaled rotation.
          seq_len: length of the sequence in tokens, for scalings that depend on it; `None` when it is not known. A
            scaling that needs it says so with a `ConfigError`, the others ignore it.
        """
        ...


@dataclass(frozen=True)
class Unscaled:
    """The frequencies of the paper, `theta ** (-2i / H)`."""

    kind: ClassVar[str] = "unscaled"

    def frequencies(self, head_dim: int, theta: float, seq_len: int | None = None) -> Frequencies:
        return Frequencies.geometric(head_dim, theta)


RopeScaling = Unscaled
"""The union of scalings: `Unscaled | NextOne | …` once there is a next one."""
