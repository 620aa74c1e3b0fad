"""Which token comes next, given its logits: greedy, or drawn from what temperature, top-k, top-p and min-p leave.

Every draw has a key of its own, made of the seed, the number of the sample and the position: what a row draws does not
depend on what else is in its batch, nor on how many tokens are decoded between two looks of the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from irope_jax.core.config import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Filters apply in the order of the fields, each to what the one before has left.

    Attributes:
      temperature: logits are divided by it; 0 takes the largest, always.
      top_k: only so many of the most likely tokens.
      top_p: only the fewest most likely tokens that together have this probability (arXiv 1904.09751).
      min_p: only tokens at least this share as likely as the most likely one (arXiv 2407.01082).
      seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ConfigError("temperature", self.temperature, "use 0 for greedy, 1 for the model's own probabilities")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("top_k", self.top_k, "tokens to choose from; use 1 or more, or leave it None")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(name, value, "a probability above 0 and up to 1; or leave it None")
        if self.greedy:
            for name in ("top_k", "top_p", "min_p"):
                if getattr(self, name) is not None:
                    raise ConfigError(name, getattr(self, name), "filters draws, and at temperature 0 nothing is drawn")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def filtered(spec: Sampling, logits_BV: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Logits of what may be drawn, `-inf` elsewhere, most likely token first; and the tokens in that order.

    Without a filter the order is that of the vocabulary, and None.
    """
    logits_BV = logits_BV.astype(jnp.float32) / spec.temperature
    if spec.top_k is None and spec.top_p is None and spec.min_p is None:
        return logits_BV, None
    most = min(spec.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    left_BV, tokens_BV = jax.lax.top_k(logits_BV, most)
    if spec.top_p is not None:
        share_BV = jax.nn.softmax(left_BV)
        before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV  # the token that reaches the sum is in
        left_BV = jnp.where(before_BV < spec.top_p, left_BV, -jnp.inf)
    if spec.min_p is not None:
        left_BV = jnp.where(left_BV >= left_BV[:, :1] + jnp.log(spec.min_p), left_BV, -jnp.inf)
    return left_BV, tokens_BV


def choose(spec: Sampling, logits_BV: jax.Array, samples_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """The next token of each row, int32 `[B]`.

    Args:
      samples_B: int32, number of the sample; rows with the same number, position and logits draw the same.
      positions_B: int32, position of the token that is chosen.
    """
    if spec.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    left_BV, tokens_BV = filtered(spec, logits_BV)
    seed = jax.random.key(spec.seed)
    key = lambda sample, position: jax.random.fold_in(jax.random.fold_in(seed, sample), position)
    place_B = jax.vmap(lambda s, p, left: jax.random.categorical(key(s, p), left))(samples_B, positions_B, left_BV)
    if tokens_BV is None:
        return place_B.astype(jnp.int32)
    return jnp.take_along_axis(tokens_BV, place_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
