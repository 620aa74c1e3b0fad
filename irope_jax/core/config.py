"""Frozen dataclasses from nested dictionaries and back, with errors a person can act on.

A configuration enters as nested dictionaries (an `ml_collections.ConfigDict`, a JSON file, command-line overrides) and
is turned once into frozen dataclasses by `from_dict`; after that no dictionary exists. Every default is written once on
the dataclass. A union of dataclasses is told apart by `kind`, a `ClassVar[str]` on each member. Errors are
`ConfigError`: one line naming the field, the value and the fix. This module knows no particular dataclass.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import json
import math
import re
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
        shown = ""
        if self.value is not ConfigError.ABSENT:
            shown = "=" + (str(self.value) if isinstance(self.value, Text) else repr(self.value))
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return " ".join(f"{self.field}{shown}: {self.fix}".splitlines())

    def within(self, path: str) -> ConfigError:
        """The same error seen from outside: its field lies below `path`."""
        return ConfigError(join(path, self.field), self.value, self.fix)


class Text(str):
    """A value typed on the command line: its type is decided by the field it is meant for."""


_SCALARS = (int, float, bool, str)


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def nearest(word: str, options: typing.Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of what there is."""
    options = list(options)
    if not options:
        return "there is nothing to choose from"
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(options)}"


def from_dict(cls: type[T], data: Any, path: str = "config") -> T:
    """Build the frozen dataclass `cls` from nested mappings.

    Args:
      cls: a dataclass; its annotations may be scalars, `Literal`, optional values, `tuple[X, ...]`, `tuple[X, Y]`,
        `dict[str, X]`, dataclasses, unions of dataclasses with a `kind`, and unions of these.
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
        absent = ConfigError.ABSENT
        pairs = [(k, old.get(k, absent), new.get(k, absent)) for k in [*old, *(k for k in new if k not in old)]]
        return [line for k, a, b in pairs for line in differences(a, b, join(path, str(k)))]
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new)) for line in differences(a, b, join(path, str(i)))]
    if old == new and type(old) is type(new):  # 1, 1.0 and True are different values of a config
        return []
    shown = ["absent" if value is ConfigError.ABSENT else repr(value) for value in (old, new)]
    return [f"{path}: {shown[0]} -> {shown[1]}"]


def override(data: Mapping, assignments: typing.Iterable[tuple[str, str]], path: str = "config") -> dict:
    """Apply assignments such as `("model.layers.0.mask.size", "512")` to a complete nested dictionary, left to right.

    Args:
      data: what `to_dict` makes; it is not changed.
      assignments: dotted paths, with indices for lists (negative ones count from the end), and texts. Assigning another
        `kind` replaces that node by the new member with its defaults; fields of the new member are assigned after it.
        Assigning below `None` makes a dictionary there.
      path: name of the root in error messages.

    Returns:
      A new nested dictionary for `from_dict`, which judges whether the fields exist and reads each text as the type of
      its field.

    Raises:
      ConfigError: no such index, nothing can lie below a plain value, or a `kind` that comes after fields it would
        throw away.
    """
    root = {"": to_dict(data)}
    for dotted, typed in assignments:
        _assign(root, [(path, ""), *_steps(path, dotted)], Text(typed))
    return root[""]


def _steps(path: str, dotted: str) -> list[tuple[str, str]]:
    """Every key of a dotted path together with the whole path that leads to it."""
    keys = dotted.split(".")
    return [(join(path, ".".join(keys[: i + 1])), key) for i, key in enumerate(keys)]


def _assign(node: Any, steps: list[tuple[str, str]], value: Text) -> None:
    """Set the value at the end of `steps`, each a key below the one before it."""
    (here, key), *rest = steps
    place = _place(node, key, here, value)
    if not rest:
        node[place] = value
        return
    below = node.get(place) if isinstance(node, dict) else node[place]
    if isinstance(below, Text):
        below = _literal(below, here)
    if below is None:
        below = {}
    if rest[0][1] == "kind" and len(rest) == 1 and isinstance(below, dict):
        below = _switched(below, value, rest[0][0])
    node[place] = below
    _assign(below, rest, value)


def _switched(node: dict, kind: Text, path: str) -> dict:
    """The node that holds nothing but a new kind; the same node if the kind is not new."""
    if node.get("kind") == kind:
        return node
    if _typed({key: child for key, child in node.items() if key != "kind"}):
        raise ConfigError(path, kind, "choose the kind before its fields; those already given would be lost")
    if node and "kind" not in node:
        raise ConfigError(path, kind, "there is no choice of kinds here")
    return {"kind": kind}


def _typed(node: Any) -> bool:
    """Whether anything in a node was assigned."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return isinstance(node, Text) or any(_typed(child) for child in children)


def _place(node: Any, key: str, path: str, value: Text) -> str | int:
    """The key or index at which to assign."""
    if isinstance(node, dict):
        return key  # also one it does not hold: a node that was switched or made from None is incomplete
    if isinstance(node, list):
        if re.fullmatch(r"-?[0-9]+", key) and -len(node) <= int(key) < len(node):
            return int(key)
        fix = f"use 0 to {len(node) - 1}" if node else "the list is empty; assign a whole list"
        raise ConfigError(path, value, f"{key!r} is not an index of this list; {fix}")
    raise ConfigError(path, value, f"nothing can be set below the plain value {node!r}")


def _build(tp: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(tp)
    if tp is Any:
        return value
    if origin in (Union, types.UnionType):
        return _build_union(typing.get_args(tp), value, path)
    if origin is Literal:
        return _build_literal(typing.get_args(tp), value, path)
    if origin is tuple:
        return _build_tuple(typing.get_args(tp), value, path)
    if origin is dict:
        value = _literal(value, path)
        if not isinstance(value, Mapping):
            raise ConfigError(path, value, f"expected a dictionary, got {_type_name(value)}")
        inner = typing.get_args(tp)[1]
        return {str(k): _build(inner, v, join(path, str(k))) for k, v in value.items()}
    if dataclasses.is_dataclass(tp):
        return _build_dataclass(tp, value, path)
    if not isinstance(tp, type) or tp not in _SCALARS:
        raise TypeError(f"{path}: a config field cannot be annotated {tp}")
    return _build_scalar(tp, value, path)


def _build_literal(options: tuple, value: Any, path: str) -> Any:
    for option in options:
        # Typed text is compared as text; otherwise 1 must not pass for True.
        if str(option) == value if isinstance(value, Text) else option == value and type(option) is type(value):
            return option
    raise ConfigError(path, value, f"unknown choice; {nearest(str(value), map(str, options))}")


def _build_union(members: tuple, value: Any, path: str) -> Any:
    if type(None) in members:
        if value is None or (isinstance(value, Text) and value.lower() in ("none", "null")):
            return None
        members = tuple(m for m in members if m is not type(None))
        if len(members) == 1:
            return _build(members[0], value, path)
    specs = tuple(m for m in members if dataclasses.is_dataclass(m))
    if isinstance(value, specs):
        return value
    if len(specs) == len(members):
        value = _literal(value, path)
    if specs and isinstance(value, Mapping):
        return _build_kind({spec.kind: spec for spec in specs}, value, path)
    if len(specs) == len(members):
        raise ConfigError(path, value, f"expected a dictionary with a kind, one of: {', '.join(s.kind for s in specs)}")
    # The type the value already has, else the first that takes it, in the order written.
    for member in sorted(members, key=lambda member: member is not type(value)):
        try:
            return _build(member, value, path)
        except ConfigError:
            continue
    expected = " or ".join(m.__name__ if isinstance(m, type) else str(m).removeprefix("typing.") for m in members)
    raise ConfigError(path, value, f"expected {expected}, got {_type_name(value)}")


def _build_kind(kinds: dict[str, type], value: Mapping, path: str) -> Any:
    if "kind" not in value:
        raise ConfigError(join(path, "kind"), ConfigError.ABSENT, f"required; choose one of: {', '.join(kinds)}")
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(join(path, "kind"), kind, f"unknown kind; {nearest(str(kind), kinds)}")
    return _build_dataclass(kinds[kind], value, path)


def _build_tuple(args: tuple, value: Any, path: str) -> tuple:
    value = _literal(value, path)
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
    value = _literal(value, path)
    if not isinstance(value, Mapping):
        raise ConfigError(path, value, f"expected a dictionary of {cls.__name__} fields, got {_type_name(value)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = {str(k): v for k, v in value.items()}
    if hasattr(cls, "kind") and given.pop("kind", cls.kind) != cls.kind:
        raise ConfigError(join(path, "kind"), value["kind"], f"only {cls.kind!r} is possible here")
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
        value = _literal(value, path, f"expected {'true or false' if tp is bool else tp.__name__}")
    if tp is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else math.inf
    if tp is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) != (tp is bool) or not isinstance(value, tp):
        raise ConfigError(path, value, f"expected {tp.__name__}, got {_type_name(value)}")
    if tp is float and not math.isfinite(value):
        raise ConfigError(path, value, "expected a finite number")
    return value


def _literal(value: Any, path: str, fix: str = "expected a Python literal such as (1, 2) or {'kind': 'global'}") -> Any:
    """What typed text says; any other value is what it is."""
    if not isinstance(value, Text):
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ConfigError(path, value, fix) from None


def _type_name(value: Any) -> str:
    return "None" if value is None else "text" if isinstance(value, Text) else type(value).__name__
