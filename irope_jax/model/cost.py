"""Parameters and floating-point operations of a model in closed form: what it holds and what a token needs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from irope_jax.attention.mask import visible_pairs
from irope_jax.model.config import ModelConfig
from irope_jax.model.decoder import init_params
from irope_jax.model.moe import MoE


@lru_cache(maxsize=16)
def abstract_params(config: ModelConfig) -> Any:
    """Parameters as shapes, boxed with their logical axes; no memory. Do not change it: it is kept."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part: `embedding` (of tokens and positions), `attention`, `feed_forward`, `norms`, `head`."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(abstract_params(config))):
        names = [str(getattr(key, "key", key)) for key in path]
        part = next((p for p in ("attention", "feed_forward", "embedding", "head") if p in names), "norms")
        part = "embedding" if "position_table" in names else part
        counts[part] = counts.get(part, 0) + int(np.prod(leaf.shape))
    return counts


def active_parameters(config: ModelConfig, counts: Mapping[str, int] | None = None) -> int:
    """Parameters that a token meets: all but the experts it does not choose."""
    idle = 0
    for layer in config.layers:
        if isinstance(layer.ffn, MoE):
            idle += (layer.ffn.num_experts - layer.ffn.top_k) * 3 * layer.ffn.hidden_dim * config.d_model
    return sum((counts or parameter_counts(config)).values()) - idle


def train_flops_per_token(config: ModelConfig, length: int, counts: Mapping[str, int] | None = None) -> float:
    """Model FLOPs of one token's forward and backward pass in a document of `length` tokens.

    6 per weight that multiplies (the head included, the embedding look-up and experts not chosen not), and for each
    visible pair of query and key 12 N H; work done again by rematerialisation does not count.
    """
    counts = counts or parameter_counts(config)
    idle = sum(counts.values()) - active_parameters(config, counts)
    weights = counts["attention"] + counts["feed_forward"] - idle + config.vocab_size * config.d_model
    pairs = sum(visible_pairs(layer.mask, length) for layer in config.layers)
    return 6.0 * weights + 12.0 * config.num_heads * config.head_dim * pairs / length
