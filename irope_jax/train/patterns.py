"""Parameters by glob patterns on their paths, such as `periods/layer_0/attention/query` or `*norm/scale`."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from irope_jax.core.config import ConfigError, nearest

MOVED_BY_RULE = ("*/balance_bias",)
"""Parameters that no gradient moves, whatever a config says."""


def by_path(choose: Callable[[str], Any], params: Any) -> Any:
    """`choose(path)` at each parameter."""
    # A box, in which parameters lie while a state is made, is a leaf: paths are the same with and without.
    return jax.tree_util.tree_map_with_path(lambda path, _: choose(_name(path)), params, is_leaf=_is_box)


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def matching(params: Any, patterns: tuple[str, ...]) -> Any:
    """True at each parameter whose path matches one of the patterns."""
    return by_path(lambda path: matches(path, patterns), params)


def check_patterns(field: str, patterns: tuple[str, ...], params: Any, what: str = "parameter") -> None:
    """That each pattern names something.

    Raises:
      ConfigError: one that does not; names the field.
    """
    names = sorted(_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box))
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"train.optimizer.{field}", pattern, f"matches no {what}; {nearest(pattern, names)}")


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)
