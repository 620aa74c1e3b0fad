"""Optimizer algorithms as config, each made of optax's own.

All take the same schedule, and the same decoupled weight decay, multiplied by the rate. What they hold for a parameter
lies where the parameter lies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from irope_jax.core.config import ConfigError
from irope_jax.train.patterns import by_path, matches


def _check_fractions(spec: Any, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if value is not None and not 0 <= value < 1:
            raise ConfigError(name, value, "must be in [0, 1)")


@dataclass(frozen=True)
class AdamW:
    """Loshchilov & Hutter 2019."""

    kind: ClassVar[str] = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self):
        _check_fractions(self, "b1", "b2")


@dataclass(frozen=True)
class Adafactor:
    """Shazeer & Stern 2018: of the second moment of a matrix, the means of its rows and of its columns.

    Each layer of a stack is a parameter of its own: nothing is averaged over the repeats of the period. The two longest
    axes of a parameter are its rows and columns.

    Attributes:
      decay_rate: the second moment forgets as `1 - t ** -decay_rate`.
      momentum: decay of a first moment; None holds none.
      clip_rms: an update is scaled down to this root mean square, parameter by parameter; None leaves it.
      relative: the rate is multiplied by the root mean square of the parameter (at least 1e-3), as in the paper; rates
        near 1e-2 are usual then. False makes it Adam's (Zhai et al. 2022, with `momentum` 0.9).
      min_factored: a parameter with fewer than two axes of this length has its second moment whole.
    """

    kind: ClassVar[str] = "adafactor"
    decay_rate: float = 0.8
    momentum: float | None = None
    clip_rms: float | None = 1.0
    relative: bool = True
    min_factored: int = 128

    def __post_init__(self):
        _check_fractions(self, "decay_rate", "momentum")
        if self.clip_rms is not None and self.clip_rms <= 0:
            raise ConfigError("clip_rms", self.clip_rms, "must be positive, or None for no clipping")
        if self.min_factored < 2:
            raise ConfigError("min_factored", self.min_factored, "must be at least 2")


@dataclass(frozen=True)
class Lion:
    """Chen et al. 2023: the sign of a momentum. Rates 3 to 10 times smaller than AdamW's, decay as much larger."""

    kind: ClassVar[str] = "lion"
    b1: float = 0.9
    b2: float = 0.99

    def __post_init__(self):
        _check_fractions(self, "b1", "b2")


@dataclass(frozen=True)
class Muon:
    """Jordan et al. 2024: the momentum of a matrix, made nearly orthogonal by Newton-Schulz steps.

    For the matrices inside layers (`MATRICES`), each layer and each expert by itself; all else (embedding, head, norms,
    biases, routers) is AdamW's, at the same rate.

    Attributes:
      momentum: Nesterov's.
      newton_schulz: steps of the iteration.
      rms: root mean square of an update at rate 1; 0.2 is like AdamW's (Liu et al. 2025), so that its rates and decays
        serve. None scales by `sqrt(max(1, columns / rows))`, Jordan's rule, for rates near 0.02.
      b1, b2, eps: AdamW's.
    """

    kind: ClassVar[str] = "muon"
    momentum: float = 0.95
    newton_schulz: int = 5
    rms: float | None = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self):
        _check_fractions(self, "momentum", "b1", "b2")
        if self.newton_schulz < 1:
            raise ConfigError("newton_schulz", self.newton_schulz, "must be at least 1")
        if self.rms is not None and self.rms <= 0:
            raise ConfigError("rms", self.rms, "must be positive, or None to scale by shape")


@dataclass(frozen=True)
class ScheduleFreeAdamW:
    """Defazio et al. 2024: AdamW without a decay of the rate; a running average of the weights takes its place.

    Training moves the interpolation `b1 * average + (1 - b1) * z` of the average and of the plain iterate z;
    evaluations, exports and later runs use the average.
    """

    kind: ClassVar[str] = "schedule_free_adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        _check_fractions(self, "b1", "b2")
        if self.b1 == 0:
            raise ConfigError("b1", self.b1, "must be positive: the average could not be told from what is trained")


Algorithm = AdamW | Adafactor | Lion | Muon | ScheduleFreeAdamW

MATRICES = {
    "periods/*/attention/query": MuonDimensionNumbers((1,), (2, 3)),  # [R, D, N, H]: D rows, N * H columns
    "periods/*/attention/key": MuonDimensionNumbers((1,), (2, 3)),
    "periods/*/attention/value": MuonDimensionNumbers((1,), (2, 3)),
    "periods/*/attention/out": MuonDimensionNumbers((1, 2), (3,)),  # [R, N, H, D]
    "periods/*/feed_forward/*gate": MuonDimensionNumbers((-2,), (-1,)),  # [R, D, F]; of experts [R, E, D, F]
    "periods/*/feed_forward/*up": MuonDimensionNumbers((-2,), (-1,)),
    "periods/*/feed_forward/*down": MuonDimensionNumbers((-2,), (-1,)),  # [R, F, D]
}
"""Which axes of a parameter are the rows (what a token's vector is multiplied by and summed over) and the columns of a
matrix; along all others there are as many matrices, each by itself."""


def matrix_axes(path: str) -> MuonDimensionNumbers | None:
    """None for what is no matrix inside a layer."""
    return next((axes for pattern, axes in MATRICES.items() if matches(path, (pattern,))), None)


def transformation(
    algorithm: Algorithm, rate: optax.Schedule, weight_decay: float, decayed: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """The optax transformation of an algorithm; of a schedule-free one, what it wraps.

    Args:
      decayed: parameters to booleans, where weight decay applies.
    """
    match algorithm:
        case AdamW(b1, b2, eps):
            return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)
        case Lion(b1, b2):
            return optax.lion(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
        case Adafactor():
            adafactor = optax.adafactor(
                rate,
                min_dim_size_to_factor=algorithm.min_factored,
                decay_rate=algorithm.decay_rate,
                multiply_by_parameter_scale=algorithm.relative,
                clipping_threshold=algorithm.clip_rms,
                momentum=algorithm.momentum,
                weight_decay_rate=lambda step: weight_decay * rate(step),
                weight_decay_mask=decayed,
            )
            stacked = lambda path: "stacked" if path.startswith("periods/") else "whole"
            return optax.partition(
                {"stacked": _each_repeat(adafactor), "whole": adafactor}, lambda params: by_path(stacked, params)
            )
        case Muon(b1=b1, b2=b2, eps=eps):
            muon = optax.contrib.muon(
                rate,
                ns_steps=algorithm.newton_schulz,
                beta=algorithm.momentum,
                weight_decay=weight_decay,
                weight_decay_mask=decayed,
                consistent_rms=algorithm.rms,
                muon_weight_dimension_numbers=lambda params: by_path(matrix_axes, params),
            )
            adamw = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)
            label = lambda path: "adamw" if matrix_axes(path) is None else "muon"
            return optax.partition({"muon": muon, "adamw": adamw}, lambda params: by_path(label, params))
        case ScheduleFreeAdamW(b2=b2, eps=eps):
            return optax.chain(
                optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True),
                optax.add_decayed_weights(weight_decay, mask=decayed),
                optax.scale_by_learning_rate(rate),
            )


def _each_repeat(one: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation of one layer's parameters, applied to each repeat of stacked ones (leading axis R)."""

    def init(params):
        return jax.vmap(one.init)(params) if jax.tree.leaves(params) else one.init(params)

    def update(updates, state, params=None):
        if not jax.tree.leaves(updates):
            return one.update(updates, state, params)
        return jax.vmap(one.update)(updates, state, params)

    return optax.GradientTransformation(init, update)
