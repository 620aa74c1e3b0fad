"""Frozen dataclasses from nested dictionaries and back, with errors a person can act on.

A configuration enters as nested dictionaries (an `ml_collections.ConfigDict`, a JSON file, command-line overrides) and is
turned once into frozen dataclasses by `from_dict`; after that no dictionary exists. Every default is written on the
dataclass. A union of dataclasses is told apart by `kind`, a `ClassVar[str]` on each member. Errors are `ConfigError`:
one line naming the field, the value and the fix. This module knows no particular dataclass.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be run.

    Args:
      field: dotted path of the field, relative to the dataclass that found the mistake; `from_dict` puts the path of
        that dataclass in front.
      value: the offending value, or `ConfigError.ABSENT`.
      fix: what is wrong and what to write instead.
    """

    ABSENT = object()

    def __init__(self, field: str, value: Any, fix: str):
        self.field, self.value, self.fix = field, value, fix
        super().__init__(field, value, fix)

    def __str__(self) -> str:
        if self.value is ConfigError.ABSENT:
            return f"{self.field}: {self.fix}"
        shown = str(self.value) if isinstance(self.value, Text) else repr(self.value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return f"{self.field}={shown}: {self.fix}".replace("\n", " ")

    def within(self, path: str) -> ConfigError:
        """The same error seen from outside: its field lies below `path`."""
        return ConfigError(join(path, self.field), self.value, self.fix)


class Text(str):
    """A value typed on the command line: its type is decided by the field it is meant for."""


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def nearest(word: str, options: typing.Iterable[str]) -> str:
    """` did you mean 'x'?` or the list of what there is."""
    options = list(options)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(options)}"


def from_dict(cls: type[T], data: Any, path: str = "config") -> T:
    """Build the frozen dataclass `cls` from nested mappings.

    Args:
      cls: a dataclass; its annotations may be scalars, `Literal`, optional values, `tuple[X, ...]`, `dict[str, X]`,
        dataclasses and unions of dataclasses with a `kind`.
      data: nested mappings and sequences of plain values; an instance of `cls` passes through.
      path: name of the root in error messages.

    Raises:
      ConfigError: unknown key (with the nearest known one), wrong type, missing value, or whatever the `__post_init__`
        of a dataclass found impossible.
    """
    return _build(cls, data, path)


def to_dict(value: Any) -> Any:
    """Nested plain dictionaries, lists and scalars of a config dataclass; `from_dict` reads them back equal."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": value.kind} if hasattr(type(value), "kind") else {}
        return kind | {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_dict(v) for v in value]
    return value


def fingerprint(value: Any) -> str:
    """Twelve hex digits that two configs share only if every value is equal."""
    text = json.dumps(to_dict(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted paths at which two nested plain values differ, as `path: old -> new` lines."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(old) + [k for k in new if k not in old]
        missing = ConfigError.ABSENT
        return [line for k in keys for line in differences(old.get(k, missing), new.get(k, missing), join(path, str(k)))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new)) for line in differences(a, b, join(path, str(i)))]
    if old == new:
        return []
    show = lambda v: "absent" if v is ConfigError.ABSENT else repr(v)
    return [f"{path}: {show(old)} -> {show(new)}"]


def override(data: dict, assignments: typing.Iterable[tuple[str, str]], path: str = "config") -> dict:
    """Apply `a.b.0.c = text` assignments to a complete nested dictionary (as `to_dict` makes it); returns a new one.

    Assigning a `kind` empties the rest of that node, so the new member starts from its defaults. Keys must exist.
    """
    data = json.loads(json.dumps(data))
    for dotted, text in assignments:
        keys, node, here = dotted.split("."), data, path
        for key in keys[:-1]:
            node = node[_existing(node, key, join(here, ".".join(keys)) if here == path else here, text)]
            here = join(here, key)
        last = keys[-1]
        if last == "kind" and isinstance(node, dict):
            node.clear()
            node["kind"] = str(text)
        elif isinstance(node, dict) and "kind" in node and last not in node:
            node[last] = Text(text)  # a field of a member just chosen by kind; from_dict checks the name
        else:
            node[_existing(node, last, join(here, last), text)] = Text(text)
    return data


def _existing(node: Any, key: str, path: str, text: str) -> Any:
    if isinstance(node, dict):
        if key not in node:
            raise ConfigError(path, Text(text), f"no field {key!r} here; {nearest(key, node)}")
        return key
    if isinstance(node, list):
        if not key.lstrip("-").isdigit() or not -len(node) <= int(key) < len(node):
            raise ConfigError(path, Text(text), f"{key!r} is not an index of a list of {len(node)}; use 0 to {len(node) - 1}")
        return int(key)
    raise ConfigError(path, Text(text), f"{key!r} cannot be set below a plain value ({node!r})")


def _build(tp: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(tp)
    if tp is Any:
        return value
    if origin in (Union, types.UnionType):
        return _build_union(typing.get_args(tp), value, path)
    if origin is Literal:
        options = typing.get_args(tp)
        value = str(value) if isinstance(value, Text) else value
        if value not in options:
            raise ConfigError(path, value, f"unknown choice; {nearest(str(value), map(str, options))}")
        return value
    if origin is tuple:
        return _build_tuple(typing.get_args(tp), value, path)
    if origin is dict:
        value = _literal(value, path) if isinstance(value, Text) else value
        if not isinstance(value, Mapping):
            raise ConfigError(path, value, f"expected a dictionary, got {_type_name(value)}")
        inner = typing.get_args(tp)[1]
        return {str(k): _build(inner, v, join(path, str(k))) for k, v in value.items()}
    if dataclasses.is_dataclass(tp):
        return _build_dataclass(tp, value, path)
    return _build_scalar(tp, value, path)


def _build_union(members: tuple, value: Any, path: str) -> Any:
    if type(None) in members:
        if value is None or (isinstance(value, Text) and value.lower() in ("none", "null")):
            return None
        members = tuple(m for m in members if m is not type(None))
        if len(members) == 1:
            return _build(members[0], value, path)
    if isinstance(value, members if all(isinstance(m, type) for m in members) else ()):
        return value
    if not all(dataclasses.is_dataclass(m) for m in members):
        failures = []
        for member in members:  # scalars of several types: the first that fits, in the order written
            try:
                return _build(member, value, path)
            except ConfigError as error:
                failures.append(error)
        raise failures[-1]
    kinds = {m.kind: m for m in members}
    value = _literal(value, path) if isinstance(value, Text) else value
    if not isinstance(value, Mapping):
        raise ConfigError(path, value, f"expected a dictionary with a kind, one of: {', '.join(kinds)}")
    if "kind" not in value:
        raise ConfigError(join(path, "kind"), ConfigError.ABSENT, f"required; choose one of: {', '.join(kinds)}")
    kind = value["kind"]
    if kind not in kinds:
        raise ConfigError(join(path, "kind"), kind, f"unknown kind; {nearest(str(kind), kinds)}")
    return _build_dataclass(kinds[kind], value, path)


def _build_tuple(args: tuple, value: Any, path: str) -> tuple:
    value = _literal(value, path) if isinstance(value, Text) else value
    if not isinstance(value, (list, tuple)):
        raise ConfigError(path, value, f"expected a list, got {_type_name(value)}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_build(args[0], v, join(path, str(i))) for i, v in enumerate(value))
    if len(args) != len(value):
        raise ConfigError(path, value, f"expected {len(args)} values, got {len(value)}")
    return tuple(_build(a, v, join(path, str(i))) for i, (a, v) in enumerate(zip(args, value)))


def _build_dataclass(cls: type, value: Any, path: str) -> Any:
    if isinstance(value, cls):
        return value
    value = _literal(value, path) if isinstance(value, Text) else value
    if not isinstance(value, Mapping):
        raise ConfigError(path, value, f"expected a dictionary of {cls.__name__} fields, got {_type_name(value)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = {str(k): v for k, v in value.items()}
    if hasattr(cls, "kind") and given.get("kind", cls.kind) == cls.kind:
        given.pop("kind", None)
    for key, v in given.items():
        if key not in fields:
            raise ConfigError(join(path, key), v, f"{cls.__name__} has no such field; {nearest(key, fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ConfigError(join(path, name), ConfigError.ABSENT, f"required by {cls.__name__}; give it a value")
    built = {key: _build(hints[key], v, join(path, key)) for key, v in given.items()}
    try:
        return cls(**built)
    except ConfigError as error:
        raise error.within(path) from None


def _build_scalar(tp: type, value: Any, path: str) -> Any:
    if isinstance(value, Text):
        if tp is str:
            return str(value)
        if tp is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ConfigError(path, value, f"expected {tp.__name__}") from None
    if tp is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if tp is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) != (tp is bool) or not isinstance(value, tp):
        raise ConfigError(path, value, f"expected {tp.__name__}, got {_type_name(value)}")
    if tp is float and not math.isfinite(value):
        raise ConfigError(path, value, "expected a finite number")
    return value


def _literal(text: Text, path: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ConfigError(path, text, "expected a Python literal such as (1, 2) or {'kind': 'global'}") from None


def _type_name(value: Any) -> str:
    return "None" if value is None else type(value).__name__
