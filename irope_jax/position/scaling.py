"""RoPE scalings: rules that choose the frequencies of a rotation, usually to stretch a trained model to longer text.

Adding one = one frozen dataclass here with a `kind`, a `__post_init__` that checks its numbers and a `frequencies`
method, added to the union `RopeScaling` (and its formula, written again from the paper, in `tests/oracles`). Nothing
else in the package changes: rotation, model and configuration read the union. A larger base ("ABF") is no scaling: it
is `theta` of the layer.

Below, `theta_i` is the unscaled frequency of pair i, `L` the length a model was trained at (`original_length`) and `s`
the factor by which it is to be stretched. "Rotations" of a pair are its turns within L tokens, `L theta_i / (2 pi)`.
Checked against Hugging Face's numbers where it has the method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.position.rope import Frequencies


class Scaling(Protocol):
    """What every member of `RopeScaling` can do."""

    kind: ClassVar[str]

    def frequencies(self, head_dim: int, theta: float, seq_len: int | None = None) -> Frequencies:
        """Frequencies of `head_dim / 2` pairs for base `theta`, computed in float64 on the host.

        Args:
          head_dim: width that is rotated; odd is a `ConfigError`.
          theta: base of the unscaled rotation.
          seq_len: tokens of the longest document to be rotated, for scalings that depend on it (`DynamicNTK`,
            `LongRoPE`); the others ignore it. `None` means longer than anything the scaling tells apart, which
            `DynamicNTK` cannot answer.
        """
        ...


@dataclass(frozen=True)
class Unscaled:
    """The frequencies of the paper, `theta ** (-2i / H)`."""

    kind: ClassVar[str] = "unscaled"

    def frequencies(self, head_dim: int, theta: float, seq_len: int | None = None) -> Frequencies:
        return Frequencies.geometric(head_dim, theta)


@dataclass(frozen=True)
class Linear:
    """Position interpolation, PI (arXiv 2306.15595; Hugging Face `linear`): `theta_i / s`.

    Neighbouring tokens come `s` times closer together, which a model has to be tuned to: without it PI loses more than
    it wins.

    Attributes:
      factor: s.
    """

    factor: float
    kind: ClassVar[str] = "linear"

    def __post_init__(self):
        check_factor(self.factor)

    def frequencies(self, head_dim: int, theta: float, seq_len: int | None = None) -> Frequencies:
        return Frequencies(Frequencies.geometric(head_dim, theta).inv_freq / self.factor)


@dataclass(frozen=True)
class NTK:
    """NTK-aware interpolation: the base grows to `theta * s ** (H / (H - 2))` (YaRN, arXiv 2309.00071, appendix A.2).

    The fastest pair keeps its frequency, the slowest is divided by exactly s, those between follow geometrically.

    Attributes:
      factor: s; somewhat more than the stretch that is wanted does better.
    """

    factor: float
    kind: ClassVar[str] = "ntk"

    def __post_init__(self):
        check_factor(self.factor)

    def frequencies(self, head_dim: int, theta: float, seq_len: int | None = None) -> Frequencies:
        return Frequencies(_ntk(head_dim, theta, self.factor))


@dataclass(frozen=True)
class DynamicNTK:
    """NTK with a factor that follows the length n of the document: `s n / L - (s - 1)` beyond L, nothing up to it.

    Hugging Face `dynamic`, but by document and not by the longest row of the batch: what else is packed beside a
    document changes nothing. Lengths are rounded up to the next multiple of `step`, and never past the length of the
    row, so that all frequencies are float64 numbers of the host and keys that were rotated stay right while a document
    grows within a step.

    Attributes:
      factor: s; 1 makes the factor n / L.
      original_length: L.
      step: tokens between two sets of frequencies. The table that a program holds has (row length - L) / step sets of
        12 bytes a pair: 6 MB for 64 pairs and 2 million tokens at the default.
    """

    factor: float
    original_length: int
    step: int = 256
    kind: ClassVar[str] = "dynamic_ntk"

    def __post_init__(self):
        check_factor(self.factor)
        check_length(self.original_length)
        if self.step < 1:
            raise ConfigError("step", self.step, "tokens between two sets of frequencies; use 1 or more")

    def frequencies(self, head_dim: int, theta: float, seq_len: int | None = None) -> Frequencies:
        if seq_len is None:
            raise ConfigError("scaling", self, "depends on the length of the text, which is not known here")
        if seq_len <= self.original_length:
            return Frequencies.geometric(head_dim, theta)
        first = (self.original_length // self.step + 1) * self.step
        lengths = [self.original_length, *range(first, seq_len, self.step), seq_len]
        table = [_ntk(head_dim, theta, self.factor_at(length)) for length in lengths]
        return Frequencies(table[-1], shorter=tuple(zip(lengths[:-1], table[:-1])))

    def factor_at(self, length: int) -> float:
        """The NTK factor of a document of `length` tokens."""
        return max(1.0, self.factor * length / self.original_length - (self.factor - 1))


@dataclass(frozen=True)
class NTKByParts:
    """Pairs of many rotations stay, pairs of few are divided by s, between them a straight line in rotations.

    YaRN's paper (arXiv 2309.00071, section 3.2). Code and checkpoints use another ramp, linear in the pair's number:
    that is `YaRN`. They differ by 0.37 of the way at H = 128, L = 4096.

    Attributes:
      factor: s.
      original_length: L.
      low_rotations: at most this many within L and a pair is divided by s (alpha).
      high_rotations: at least this many and it stays (beta).
    """

    factor: float
    original_length: int
    low_rotations: float = 1.0
    high_rotations: float = 32.0
    kind: ClassVar[str] = "ntk_by_parts"

    def __post_init__(self):
        check_factor(self.factor)
        check_length(self.original_length)
        if not 0 <= self.low_rotations < self.high_rotations:
            fix = f"use 0 to below high_rotations={self.high_rotations}"
            raise ConfigError("low_rotations", self.low_rotations, fix)

    def frequencies(self, head_dim: int, theta: float, seq_len: int | None = None) -> Frequencies:
        inv_freq = Frequencies.geometric(head_dim, theta).inv_freq
        rotations = self.original_length * inv_freq / (2 * np.pi)
        stays = np.clip((rotations - self.low_rotations) / (self.high_rotations - self.low_rotations), 0, 1)
        return Frequencies(_blend(inv_freq, self.factor, stays))


@dataclass(frozen=True)
class YaRN:
    """YaRN as its code and the checkpoints have it (arXiv 2309.00071): a ramp over pair numbers, and sharper attention.

    Attributes:
      factor: s.
      original_length: L.
      beta_fast: pairs with more rotations than this stay.
      beta_slow: pairs with fewer are divided by s.
      truncate: whether the ends of the ramp are rounded outward to whole pairs (gpt-oss does not).
      attention_factor: on q and on k, so the logits get its square; None computes it from the two fields below.
      mscale, mscale_all_dim: DeepSeek's pair. With `m(k) = 0.1 k ln s + 1`, q and k get `m(mscale) / m(mscale_all_dim)`
        each and the logits `m(mscale_all_dim) ** 2`; the defaults give YaRN's own `0.1 ln s + 1`.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    kind: ClassVar[str] = "yarn"

    def __post_init__(self):
        check_factor(self.factor)
        check_length(self.original_length)
        if not 0 < self.beta_slow <= self.beta_fast:
            raise ConfigError("beta_slow", self.beta_slow, f"use above 0 and up to beta_fast={self.beta_fast}")
        check_attention_factor(self.attention_factor)
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "would flatten attention; use 0 or more")

    def frequencies(self, head_dim: int, theta: float, seq_len: int | None = None) -> Frequencies:
        inv_freq = Frequencies.geometric(head_dim, theta).inv_freq
        low, high = self.ramp(head_dim, theta)
        stays = 1 - np.clip((np.arange(len(inv_freq)) - low) / (high - low), 0, 1)
        all_dim = yarn_magnitude(self.factor, self.mscale_all_dim)
        given = self.attention_factor
        return Frequencies(
            _blend(inv_freq, self.factor, stays),
            attention_factor=yarn_magnitude(self.factor, self.mscale) / all_dim if given is None else given,
            logit_factor=all_dim**2,
        )

    def ramp(self, head_dim: int, theta: float) -> tuple[float, float]:
        """Number of the last pair that stays and of the first that is divided by s, as far as there are such."""

        def pair_of(rotations: float) -> float:
            return head_dim * math.log(self.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return low, high + 0.001 if low == high else high  # an empty ramp is a step


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling (Hugging Face `llama3`): short wavelengths stay, long ones are divided by s.

    Between wavelengths `L / high_freq_factor` and `L / low_freq_factor` a straight line in rotations. Equal factors
    make a hard step (Llama 4 Scout).

    Attributes:
      factor: s.
      original_length: L.
      low_freq_factor, high_freq_factor: rotations within L at the two ends.
    """

    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    kind: ClassVar[str] = "llama3"

    def __post_init__(self):
        check_factor(self.factor)
        check_length(self.original_length)
        if not 0 < self.low_freq_factor <= self.high_freq_factor:
            fix = f"use above 0 and up to high_freq_factor={self.high_freq_factor}"
            raise ConfigError("low_freq_factor", self.low_freq_factor, fix)

    def frequencies(self, head_dim: int, theta: float, seq_len: int | None = None) -> Frequencies:
        inv_freq = Frequencies.geometric(head_dim, theta).inv_freq
        rotations = self.original_length * inv_freq / (2 * np.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        stays = (rotations >= low) * 1.0 if low == high else np.clip((rotations - low) / (high - low), 0, 1)
        return Frequencies(_blend(inv_freq, self.factor, stays))


@dataclass(frozen=True)
class LongRoPE:
    """A factor of its own for every pair, `theta_i / factor_i`, found by search (arXiv 2402.13753).

    Attributes:
      original_length: L; documents up to it turn by `short_factor`, longer ones by `long_factor`.
      factor: s, for the attention factor only.
      long_factor: per pair, fastest first.
      short_factor: the same for documents up to L; empty means all ones.
      first_tokens: tokens at positions below this turn unscaled whatever the document's length (n-hat of the paper).
      attention_factor: on q and on k; None follows the policy.
      attention_policy: `longrope` is `sqrt(1 + ln s / ln L)` (Phi-3, Hugging Face), `yarn` is `0.1 ln s + 1`, `none` 1.
    """

    original_length: int
    factor: float
    long_factor: tuple[float, ...]
    short_factor: tuple[float, ...] = ()
    first_tokens: int = 0
    attention_factor: float | None = None
    attention_policy: Literal["longrope", "yarn", "none"] = "longrope"
    kind: ClassVar[str] = "longrope"

    def __post_init__(self):
        check_factor(self.factor)
        check_length(self.original_length)
        check_attention_factor(self.attention_factor)
        for name in ("long_factor", "short_factor"):
            values = getattr(self, name)
            if not all(math.isfinite(value) and value > 0 for value in values):
                raise ConfigError(name, values, "every factor divides a frequency; use positive numbers")
        if not self.long_factor:
            raise ConfigError("long_factor", self.long_factor, "give one factor per pair of the head width")
        if self.first_tokens < 0:
            raise ConfigError("first_tokens", self.first_tokens, "tokens that turn unscaled; use 0 or more")
        if self.attention_policy not in ("longrope", "yarn", "none"):
            raise ConfigError("attention_policy", self.attention_policy, "choose one of: longrope, yarn, none")

    def frequencies(self, head_dim: int, theta: float, seq_len: int | None = None) -> Frequencies:
        inv_freq = Frequencies.geometric(head_dim, theta).inv_freq
        for name in ("long_factor", "short_factor"):
            values = getattr(self, name)
            if values and len(values) != len(inv_freq):
                fix = f"has {len(values)} factors; a rotated width of {head_dim} has {len(inv_freq)} pairs"
                raise ConfigError(f"scaling.{name}", values, fix)
        short = inv_freq / np.asarray(self.short_factor or 1.0)
        is_short = seq_len is not None and seq_len <= self.original_length
        return Frequencies(
            short if is_short else inv_freq / np.asarray(self.long_factor),
            attention_factor=self.magnitude,
            shorter=() if is_short else ((self.original_length, short),),
            first_tokens=self.first_tokens,
            first=inv_freq if self.first_tokens else None,
        )

    @property
    def magnitude(self) -> float:
        """The attention factor, given or by the policy."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.attention_policy == "none" or self.factor <= 1:
            return 1.0
        if self.attention_policy == "yarn":
            return yarn_magnitude(self.factor, 1.0)
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))


@dataclass(frozen=True)
class AtLength:
    """A scaling whose frequencies are those of documents of one length, whatever is rotated.

    No member of `RopeScaling`: decoding makes it of one, since keys that are kept were rotated before the document
    had its length.

    Attributes:
      scaling: `DynamicNTK` or `LongRoPE`.
      length: tokens of the document.
    """

    scaling: DynamicNTK | LongRoPE
    length: int

    @property
    def kind(self) -> str:
        return self.scaling.kind

    @property
    def factor(self) -> float:
        return self.scaling.factor

    @property
    def first_tokens(self) -> int:
        return getattr(self.scaling, "first_tokens", 0)

    def frequencies(self, head_dim: int, theta: float, seq_len: int | None = None) -> Frequencies:
        """Of `Scaling`; the length of what is rotated plays no part."""
        return replace(self.scaling.frequencies(head_dim, theta, self.length), shorter=())


RopeScaling = Unscaled | Linear | NTK | DynamicNTK | NTKByParts | YaRN | Llama3 | LongRoPE


def yarn_magnitude(factor: float, mscale: float) -> float:
    """`0.1 mscale ln s + 1`, and 1 where nothing is stretched (YaRN, section 3.4; `mscale` is DeepSeek's)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def critical_pair(head_dim: int, theta: float, length: int) -> int:
    """Number of the first pair that does not finish one turn within `length` tokens: trained on part of a circle only.

    Pairs from here on are what extension is about (LongRoPE2, arXiv 2502.20082, calls twice this the critical
    dimension).
    """
    pair = math.ceil(head_dim / 2 * math.log(length / (2 * math.pi)) / math.log(theta))
    return min(max(pair, 0), head_dim // 2)


def _ntk(head_dim: int, theta: float, factor: float) -> np.ndarray:
    if head_dim == 2:  # the only pair is the fastest: it stays
        return Frequencies.geometric(head_dim, theta).inv_freq
    inv_freq = Frequencies.geometric(head_dim, theta).inv_freq
    return inv_freq * factor ** (-np.arange(0, head_dim, 2, dtype=np.float64) / (head_dim - 2))


def _blend(inv_freq: np.ndarray, factor: float, stays: np.ndarray) -> np.ndarray:
    """Frequencies of which a share `stays` and the rest is divided by `factor`; exactly the old ones for factor 1."""
    return inv_freq / factor * (1 - stays) + inv_freq * stays if factor != 1 else inv_freq


def check_factor(factor: float) -> None:
    if not (math.isfinite(factor) and factor >= 1):
        raise ConfigError("factor", factor, "by how much the length is stretched; use 1 or more")


def check_length(length: int) -> None:
    if length < 2:
        raise ConfigError("original_length", length, "tokens the model was trained at; use 2 or more")


def check_attention_factor(factor: float | None) -> None:
    if factor is not None and not (math.isfinite(factor) and factor > 0):
        raise ConfigError("attention_factor", factor, "multiplies q and k; use a positive number, or None")
