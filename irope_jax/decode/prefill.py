"""Reading prompts into a cache, piece by piece: memory of a piece and not of the prompt, any number of tokens.

A piece attends to what was read before and to itself; whatever the split, the result is that of one forward pass. On a
mesh with a context axis the queries of a piece go to the keys that each device holds and come back as partial results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from irope_jax.core.types import Array
from irope_jax.decode.stepping import stepping
from irope_jax.model.cache import KVCache
from irope_jax.model.config import ModelConfig
from irope_jax.model.decoder import cached_hidden_states

SHORTEST = 16
"""Tokens of the shortest piece; below that a step costs what its weights cost to read."""


@functools.lru_cache(maxsize=16)
def piece_step(model: ModelConfig) -> Callable:
    """`(params, cache, logits_BV, tokens_BT, real_BT) -> (cache, logits_BV)`: one piece; the cache is given up.

    Logits are float32, of the last token that each row has read so far.
    """

    def step(params, cache: KVCache, logits_BV, tokens_BT, real_BT):
        count_B = jnp.sum(real_BT, axis=-1)
        asked_BT = jnp.arange(tokens_BT.shape[1]) == count_B[:, None] - 1
        info = cache.next_info(real_BT)
        hidden_BTD, w_DV, cache = cached_hidden_states(model, params, tokens_BT, info, cache, asked_BT)
        last_BD = jnp.take_along_axis(hidden_BTD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)[:, 0]
        new_BV = jnp.einsum("BD,DV->BV", last_BD, w_DV, preferred_element_type=jnp.float32)
        return cache, jnp.where((count_B > 0)[:, None], new_BV, logits_BV)

    return stepping(step)


def pieces(rows: Sequence[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`(tokens_BT, real_BT)` of pieces of `size` tokens, the last a power of two; rows that ended are padding."""
    longest = max(map(len, rows))
    for start in range(0, longest, size):
        left = longest - start
        width = size if left >= size else min(size, max(SHORTEST, 1 << (left - 1).bit_length()))
        tokens = np.zeros((len(rows), width), np.int32)
        real = np.zeros((len(rows), width), bool)
        for b, row in enumerate(rows):
            part = row[start : start + width]
            tokens[b, : len(part)], real[b, : len(part)] = part, True
        yield tokens, real


def prefill(
    model: ModelConfig,
    params: Any,
    cache: KVCache,
    rows: Sequence[np.ndarray],
    *,
    size: int,
    logits_BV: Array | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[KVCache, jax.Array]:
    """The cache with the tokens of each row read after what it holds, and the logits of what follows.

    Args:
      cache: given up.
      rows: int32 tokens of each row, of any lengths; empty rows stay as they are.
      size: tokens of a piece.
      logits_BV: float32, of the last token that each row has read before. None if there is none.
      progress: called with the number of tokens of each piece once it is read.
    """
    step = piece_step(model)
    if logits_BV is None:
        logits_BV = _nothing_read(len(rows), model.vocab_size)
    for tokens, real in pieces(rows, size):
        cache, logits_BV = step(params, cache, logits_BV, tokens, real)
        jax.block_until_ready(logits_BV)
        progress(int(real.sum()))
    return cache, logits_BV


def _nothing_read(rows: int, words: int) -> Array:
    """Logits before the first token. On a mesh of one device they lie as those of a step do: of arrays that lie
    otherwise jax compiles a program of its own, the same for the first piece and once more for the second."""
    nothing, mesh = np.full((rows, words), np.nan, np.float32), jax.sharding.get_mesh()
    return nothing if mesh.size != 1 else jax.device_put(nothing, NamedSharding(mesh, PartitionSpec()))
