"""ALiBi (arXiv 2108.12409): instead of rotating anything, each head subtracts its slope times the distance.

Only the slopes belong here; subtracting is the business of attention, which knows the distances.
"""

from __future__ import annotations

import numpy as np

from irope_jax.core.config import ConfigError


def alibi_slopes(num_heads: int) -> np.ndarray:
    """float32 `[N]`: `2 ** (-8 h / N)` for h = 1 … N where N is a power of two.

    Other numbers take the slopes of the power of two below, then every other slope of the power of two above, as the
    authors do for pretrained sizes.
    """
    if num_heads < 1:
        raise ConfigError("num_heads", num_heads, "must be at least 1")
    below = 2 ** (num_heads.bit_length() - 1)
    slopes = _geometric(below)
    if below < num_heads:
        slopes = np.concatenate([slopes, _geometric(2 * below)[::2][: num_heads - below]])
    return slopes.astype(np.float32)


def _geometric(count: int) -> np.ndarray:
    return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)
