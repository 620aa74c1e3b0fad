"""Rotations as Hugging Face configs say them, in both directions; what the format cannot say is refused.

Reads the keys of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`), writes those of 5. Where
transformers takes a number from differs by method; it is said at each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from irope_jax.core.config import ConfigError, nearest
from irope_jax.position.rotary import RoPE
from irope_jax.position.scaling import (
    NTK,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    RopeScaling,
    Unscaled,
    YaRN,
    yarn_magnitude,
)

_KNOWN = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": (
        "factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor",
    ),
}  # fmt: skip


def rope_from_hf(values: Mapping[str, Any]) -> RoPE:
    """The rotation of a parsed `config.json`, entries paired by halves.

    Raises:
      ConfigError: a method or a key that is not known, or numbers that make no sense; names the field.
    """
    old, new = values.get("rope_scaling"), values.get("rope_parameters")
    if old and new and old != new:
        raise ConfigError("rope_scaling", old, "rope_parameters beside it say something else; keep one of the two")
    name, given = ("rope_parameters", new) if new else ("rope_scaling", old or {})
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise ConfigError(name, given, "expected one set of parameters for all layers")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KNOWN:
        raise ConfigError(f"{name}.rope_type", kind, f"not a method that is known; {nearest(str(kind), _KNOWN)}")
    common = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    for key, value in given.items():
        # an original length beside a method that does not read it is harmless: older versions always wrote it
        if key not in (*common, *_KNOWN[kind], "original_max_position_embeddings"):
            raise ConfigError(f"{name}.{key}", value, f"{kind!r} has no such parameter; {nearest(key, _KNOWN[kind])}")
    read = _Reader(name, {**given}, values)
    theta = read.number("rope_theta", values.get("rope_theta", 10000.0))
    fraction = read.number("partial_rotary_factor", values.get("partial_rotary_factor") or 1.0)
    try:
        scaling = _SCALINGS[kind](read)
        return RoPE(theta, scaling, fraction=fraction, part="prefix" if fraction < 1 else "proportional")
    except ConfigError as error:
        of_config = error.field.split(".")[0] in (name, "max_position_embeddings", "original_max_position_embeddings")
        raise error if of_config else error.within(name) from None


class _Reader:
    """Numbers of the method's parameters, then of the whole config."""

    def __init__(self, name: str, given: dict[str, Any], values: Mapping[str, Any]):
        self.name, self.given, self.values = name, given, values

    def number(self, key: str, default: Any = None) -> float:
        value = self.given.get(key)
        value = default if value is None else value
        number = _finite(value)
        if number is None:
            raise ConfigError(f"{self.name}.{key}", value, "expected a finite number")
        return number

    def optional(self, key: str) -> float | None:
        return None if self.given.get(key) is None else self.number(key)

    def numbers(self, key: str) -> tuple[float, ...]:
        values = self.given.get(key)
        numbers = [_finite(value) for value in values] if isinstance(values, list) else []
        if not numbers or None in numbers:
            raise ConfigError(f"{self.name}.{key}", values, "expected a list of finite numbers, one per pair")
        return tuple(numbers)

    def length(self, key: str = "max_position_embeddings") -> int:
        return _tokens(key, self.values.get(key))

    @property
    def original_length(self) -> int:
        """A key beside the parameters goes before the one among them, as in transformers; then the whole context."""
        if self.values.get("original_max_position_embeddings") is not None:
            return self.length("original_max_position_embeddings")
        key = "original_max_position_embeddings"
        if self.given.get(key) is None:
            return self.length()
        return _tokens(f"{self.name}.{key}", self.given[key])

    @property
    def factor(self) -> float:
        """Given, or how much longer the whole context is."""
        if self.given.get("factor") is None:
            return self.length() / self.original_length
        return self.number("factor")


def _finite(value: Any) -> float | None:
    """A number of a JSON file as float; None for anything else, and for what no float can hold."""
    if type(value) not in (int, float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _tokens(field: str, value: Any) -> int:
    number = _finite(value)
    if number is None or not number.is_integer() or not 2 <= number < 2**31:
        raise ConfigError(field, value, "expected a length in tokens, 2 or more")
    return int(number)


def _yarn(read: _Reader) -> YaRN:
    factor, given = read.factor, read.optional("attention_factor")
    mscale, all_dim = read.optional("mscale"), read.optional("mscale_all_dim")
    if given is None and mscale and all_dim:
        # transformers' Llama does not multiply the softmax scale as DeepSeek's own code does: only the quotient counts
        given = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim)
    return YaRN(
        factor,
        read.original_length,
        beta_fast=read.optional("beta_fast") or 32.0,
        beta_slow=read.optional("beta_slow") or 1.0,
        truncate=bool(read.given.get("truncate", True)),
        attention_factor=given,
    )


def _longrope(read: _Reader) -> LongRoPE:
    return LongRoPE(
        read.original_length,
        read.factor,
        read.numbers("long_factor"),
        read.numbers("short_factor"),
        attention_factor=read.optional("attention_factor"),
    )


_SCALINGS: dict[str, Callable[[_Reader], RopeScaling]] = {
    "default": lambda read: Unscaled(),
    "linear": lambda read: Linear(read.number("factor")),
    # its original length is the whole context of the config, and it changes with every token: step 1
    "dynamic": lambda read: DynamicNTK(read.number("factor"), read.length(), step=1),
    "yarn": _yarn,
    "llama3": lambda read: Llama3(
        read.number("factor"), read.original_length, read.number("low_freq_factor"), read.number("high_freq_factor")
    ),
    "longrope": _longrope,
}


def rope_to_hf(rope: RoPE, head_dim: int) -> dict[str, Any]:
    """Top-level keys of a `config.json` (transformers 5) that say this rotation, for entries paired by halves.

    `max_position_embeddings` is among them only where the method reads it as its original length.

    Raises:
      ConfigError: something transformers has no words for; names the field and what to do.
    """
    if rope.pairing != "half":
        fix = "Llama of transformers pairs by halves; permute q and k and use 'half'"
        raise ConfigError("pairing", rope.pairing, fix)
    if rope.fraction < 1 and rope.part == "proportional":
        fix = "transformers' partial_rotary_factor turns a prefix; it would turn what should stand still"
        raise ConfigError("fraction", rope.fraction, fix)
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.fraction < 1:
        parameters["partial_rotary_factor"] = rope.fraction
    extra: dict[str, Any] = {}
    scaling = rope.scaling
    match scaling:
        case Unscaled():
            pass
        case Linear(factor):
            parameters |= {"rope_type": "linear", "factor": factor}
        case NTK(factor):
            width = int(rope.fraction * head_dim)
            theta = rope.theta * (factor ** (width / (width - 2)) if width > 2 else 1)  # a lone pair stays
            raise ConfigError("scaling.kind", "ntk", f"is no method there; say it by theta={theta!r}, unscaled")
        case DynamicNTK(factor, original_length, step):
            if step != 1:
                raise ConfigError("scaling.step", step, "transformers changes frequencies with every token; use step=1")
            parameters |= {"rope_type": "dynamic", "factor": factor}
            extra["max_position_embeddings"] = original_length
        case YaRN():
            if scaling.mscale_all_dim:
                fix = "transformers' Llama leaves the softmax scale alone; use attention_factor instead"
                raise ConfigError("scaling.mscale_all_dim", scaling.mscale_all_dim, fix)
            magnitude = scaling.frequencies(2, rope.theta).attention_factor
            parameters |= {"rope_type": "yarn", "factor": scaling.factor, "attention_factor": magnitude}
            parameters |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
            parameters["original_max_position_embeddings"] = scaling.original_length
        case Llama3(factor, original_length, low, high):
            parameters |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            parameters["original_max_position_embeddings"] = original_length
        case LongRoPE():
            if scaling.first_tokens:
                fix = "transformers scales all tokens alike; search with first_tokens=(0,) for a model to be exported"
                raise ConfigError("scaling.first_tokens", scaling.first_tokens, fix)
            short = scaling.short_factor or (1.0,) * len(scaling.long_factor)
            parameters |= {"rope_type": "longrope", "factor": scaling.factor, "attention_factor": scaling.magnitude}
            parameters |= {"long_factor": list(scaling.long_factor), "short_factor": list(short)}
            parameters["original_max_position_embeddings"] = scaling.original_length
        case _:
            raise ConfigError("scaling.kind", scaling.kind, "transformers has no such method; choose one that it has")
    return {"rope_parameters": parameters, **extra}
