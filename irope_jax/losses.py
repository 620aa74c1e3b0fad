"""Next-token losses from hidden states, in chunks of tokens: no array of batch x length x vocabulary ever exists.

Belongs here: cross-entropy with the output matrix, its z-loss, per-token losses for evaluation. Does not belong here:
which tokens count (weights are data), how sums over steps or devices are averaged (the training step does that).
"""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from irope_jax.core.chunks import TokenChunks
from irope_jax.core.types import Array

TILE = 2**25
"""Logits that exist at a time when no chunk is given: 128 MiB of float32."""


@flax.struct.dataclass
class LossSums:
    """Sums over the tokens of a batch, float32 scalars; divide by `weight_sum` for means.

    Attributes:
      loss_sum: sum of weight x negative log-likelihood (nats). The only field that carries a gradient, and with
        `z_loss > 0` that gradient is the one of `loss_sum + z_loss * z_sum`.
      weight_sum: sum of weights.
      z_sum: sum of weight x (log of the softmax denominator) squared; a measurement.
      correct_sum: sum of the weights of tokens whose target has strictly the largest logit.
    """

    loss_sum: Array
    weight_sum: Array
    z_sum: Array
    correct_sum: Array


def chunked_cross_entropy(
    hidden_BTD: Array,
    w_DV: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    chunk: int | None = None,
    z_loss: float = 0.0,
    shards: tuple[int, int] = (1, 1),
) -> LossSums:
    """Weighted cross-entropy of `hidden @ w` against targets, in chunks, with the gradient made on the way.

    When differentiated, the forward pass computes both gradients chunk by chunk while the logits are at hand, so each
    chunk costs three matrix products, as many as the naive loss with all logits stored. Otherwise only the sums are
    computed. Logits accumulate in float32 and the softmax is float32 whatever the input types. Reverse mode, first
    order only; inside `shard_map` it needs `check_vma=False`.

    Args:
      hidden_BTD: final hidden states.
      w_DV: output matrix.
      targets_BT: int token ids; where the weight is 0 any value will do.
      weights_BT: weight of each token's loss. Data: no gradient flows to it.
      chunk: tokens whose logits exist at a time, of each piece; `None` makes it `TILE / V`, so that a small vocabulary
        takes one chunk.
      z_loss: factor of the squared log-partition term (PaLM, arXiv 2204.02311 section 5: 1e-4) in the gradient.
      shards: into how many equal pieces devices split the batch and the sequence. Under plain `jit`, the gradient of
        `w_DV` is then kept apart by piece until the end and summed across devices once; with (1, 1) it would be summed
        across devices in every chunk. Costs nothing and changes nothing else; inside `shard_map` leave it alone.

    Returns:
      `LossSums`. The gradient with respect to `hidden_BTD` and `w_DV` has their types; that of `w_DV` is accumulated in
      float32.

    Raises:
      ConfigError: a chunk below 1 or shards that do not divide batch and length.
    """
    chunks = _chunks(hidden_BTD, w_DV, chunk, shards)
    return _sums(chunks, float(z_loss), hidden_BTD, w_DV, targets_BT, weights_BT.astype(jnp.float32))


def token_losses(
    hidden_BTD: Array, w_DV: Array, targets_BT: Array, *, chunk: int | None = None, shards: tuple[int, int] = (1, 1)
) -> tuple[jax.Array, jax.Array]:
    """Each token's own loss, for evaluation: forward only, in chunks.

    Args:
      hidden_BTD, w_DV, targets_BT, chunk, shards: as in `chunked_cross_entropy`.

    Returns:
      negative log-likelihood float32 `[B, T]` in nats, and bool `[B, T]`: the target has strictly the largest logit.
    """
    chunks = _chunks(hidden_BTD, w_DV, chunk, shards)
    hidden, targets = chunks.split(hidden_BTD), chunks.split(targets_BT)

    def body(out, i):
        _, lse, target, correct = _read(chunks.take(hidden, i), w_DV, chunks.take(targets, i))
        return chunks.put(out[0], lse - target, i), chunks.put(out[1], correct, i)

    nll, correct = chunks.fold(body, (jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool)))
    return chunks.join(nll), chunks.join(correct)


def predictions_at(hidden_BTD: Array, w_DV: Array, places_BQ: Array, wanted_BQ: Array) -> tuple[jax.Array, jax.Array]:
    """`(best_BQ, nll_BQ)`: the most likely next token at each place, and the loss in nats of the wanted one there."""
    hidden_BQD = jnp.take_along_axis(hidden_BTD, places_BQ[..., None], axis=1)
    logits_BQV = jnp.einsum("BQD,DV->BQV", hidden_BQD, w_DV, preferred_element_type=jnp.float32)
    nll_BQ = -jnp.take_along_axis(jax.nn.log_softmax(logits_BQV), wanted_BQ[..., None], axis=-1)[..., 0]
    return logits_BQV.argmax(-1), nll_BQ


def _chunks(hidden_BTD, w_DV, chunk: int | None, shards: tuple[int, int]) -> TokenChunks:
    chunk = max(1, TILE // w_DV.shape[1]) if chunk is None else chunk
    return TokenChunks.of(*hidden_BTD.shape[:2], chunk, shards)


def _read(hidden, w_DV, targets) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Logits of a chunk `[u, b, s, t, V]`, their log-sum-exp, the target's logit, whether it is strictly largest."""
    logits = jnp.einsum("ubstd,dv->ubstv", hidden, w_DV, preferred_element_type=jnp.float32)
    target = jnp.sum(jnp.where(_is_target(targets, logits), logits, 0.0), axis=-1)
    correct = jnp.sum(logits >= target[..., None], axis=-1) == 1
    return logits, jax.nn.logsumexp(logits, axis=-1), target, correct


def _is_target(targets, logits) -> jax.Array:
    # A comparison instead of a gather: it fuses, and works piecewise where the vocabulary is split over devices.
    return targets[..., None] == lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)


def _accumulate(sums: LossSums, lse, target, correct, weights) -> LossSums:
    """Sums by piece `[u, s]`, so that no chunk waits for other devices; `_total` adds the pieces."""
    here = LossSums(weights * (lse - target), weights, weights * lse**2, weights * correct)
    return jax.tree.map(lambda total, x: total + jnp.sum(x, axis=(1, 3)), sums, here)


def _nothing(chunks: TokenChunks) -> LossSums:
    return LossSums(*[jnp.zeros(chunks.shards, jnp.float32)] * 4)


def _total(sums: LossSums) -> LossSums:
    return jax.tree.map(jnp.sum, sums)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(chunks: TokenChunks, z_loss: float, hidden_BTD, w_DV, targets_BT, weights_BT) -> LossSums:
    hidden, targets, weights = (chunks.split(x) for x in (hidden_BTD, targets_BT, weights_BT))

    def body(sums, i):
        _, *read = _read(chunks.take(hidden, i), w_DV, chunks.take(targets, i))
        return _accumulate(sums, *read, chunks.take(weights, i))

    return _total(chunks.fold(body, _nothing(chunks)))


def _sums_and_gradients(chunks: TokenChunks, z_loss: float, hidden_BTD, w_DV, targets_BT, weights_BT):
    hidden, targets, weights = (chunks.split(x) for x in (hidden_BTD, targets_BT, weights_BT))
    compute = jnp.result_type(hidden, w_DV)

    def body(carry, i):
        sums, d_hidden, d_w = carry
        h, t, weight = (chunks.take(x, i) for x in (hidden, targets, weights))
        logits, lse, target, correct = _read(h, w_DV, t)
        sums = _accumulate(sums, lse, target, correct, weight)
        pull = (weight * (1.0 + 2.0 * z_loss * lse))[..., None]
        d_logits = pull * jnp.exp(logits - lse[..., None]) - jnp.where(_is_target(t, logits), weight[..., None], 0.0)
        d_logits = d_logits.astype(compute)
        d_h = jnp.einsum("ubstv,dv->ubstd", d_logits, w_DV, preferred_element_type=jnp.float32)
        d_w += jnp.einsum("ubstd,ubstv->usdv", h, d_logits, preferred_element_type=jnp.float32)
        return sums, chunks.put(d_hidden, d_h, i), d_w

    start = (_nothing(chunks), jnp.zeros_like(hidden), jnp.zeros((*chunks.shards, *w_DV.shape), jnp.float32))
    sums, d_hidden, d_w = chunks.fold(body, start)
    # The empty arrays carry the types of w and weights to the backward pass.
    types = jnp.zeros((0,), w_DV.dtype), jnp.zeros((0, *weights_BT.shape), weights_BT.dtype)
    return _total(sums), (chunks.join(d_hidden), d_w.sum((0, 1)), *types)


def _pull_back(chunks: TokenChunks, z_loss: float, saved, cotangent: LossSums):
    d_hidden_BTD, d_w_DV, w_type, weights_type = saved
    scale = cotangent.loss_sum
    d_hidden_BTD = (scale * d_hidden_BTD.astype(jnp.float32)).astype(d_hidden_BTD.dtype)
    d_weights_BT = jnp.zeros(weights_type.shape[1:], weights_type.dtype)
    return d_hidden_BTD, (scale * d_w_DV).astype(w_type.dtype), None, d_weights_BT


_sums.defvjp(_sums_and_gradients, _pull_back)
