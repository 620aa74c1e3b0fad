"""Next-token losses from hidden states, in chunks of tokens: no array of batch x length x vocabulary ever exists.

Belongs here: cross-entropy with the output matrix, its z-loss, per-token losses for evaluation. Does not belong here:
which tokens count (weights are data), how sums over steps or devices are averaged (the training step does that).

Sums over tokens do not care about their order, so a chunk is not a stretch of the sequence but every n-th token of it:
a sequence split over devices stays split, each device working on its own tokens in every chunk.
"""

from __future__ import annotations

import math
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from irope_jax.core.config import ConfigError
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
      chunk: tokens whose logits exist at a time, over the whole batch; `None` makes it `TILE / V`, so that a small
        vocabulary takes one chunk.
      z_loss: factor of the squared log-partition term (PaLM, arXiv 2204.02311 section 5: 1e-4) in the gradient.
      shards: into how many equal pieces devices split the batch and the sequence. Under plain `jit`, the gradient of
        `w_DV` is then kept apart by piece until the end and summed across devices once; with (1, 1) it would be summed
        across devices in every chunk. Costs nothing and changes nothing else.

    Returns:
      `LossSums`. The gradient with respect to `hidden_BTD` and `w_DV` has their types; that of `w_DV` is accumulated in
      float32.

    Raises:
      ConfigError: a chunk below 1 or shards that do not divide batch and length.
    """
    layout = _Layout.of(hidden_BTD.shape, w_DV.shape[1], chunk, shards)
    return _sums(layout, float(z_loss), hidden_BTD, w_DV, targets_BT, weights_BT.astype(jnp.float32))


def token_losses(
    hidden_BTD: Array, w_DV: Array, targets_BT: Array, *, chunk: int | None = None, shards: tuple[int, int] = (1, 1)
) -> tuple[jax.Array, jax.Array]:
    """Each token's own loss, for evaluation: forward only, in chunks.

    Args:
      hidden_BTD, w_DV, targets_BT, chunk, shards: as in `chunked_cross_entropy`.

    Returns:
      negative log-likelihood float32 `[B, T]` in nats, and bool `[B, T]`: the target has strictly the largest logit.
    """
    layout = _Layout.of(hidden_BTD.shape, w_DV.shape[1], chunk, shards)
    hidden, targets = layout.split(hidden_BTD), layout.split(targets_BT)

    def body(out, i):
        _, lse, target, correct = _read(layout.take(hidden, i), w_DV, layout.take(targets, i))
        return (layout.put(out[0], lse - target, i), layout.put(out[1], correct, i)), None

    nll, correct = layout.fold(body, (jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool)))
    return layout.join(nll), layout.join(correct)


# --- chunks: [B, T] -> [u, b, s, t, n]: u x s pieces held by devices, n chunks of every n-th token --------------------

_CHUNK_AXIS = 4


@flax.struct.dataclass
class _Layout:
    batch: int = flax.struct.field(pytree_node=False)
    length: int = flax.struct.field(pytree_node=False)
    shards: tuple[int, int] = flax.struct.field(pytree_node=False)
    chunks: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, shape, vocabulary: int, chunk: int | None, shards: tuple[int, int]) -> _Layout:
        batch, length, _ = shape
        chunk = max(1, TILE // vocabulary) if chunk is None else chunk
        if chunk < 1:
            raise ConfigError("chunk", chunk, "tokens whose logits exist at a time; use 1 or more, or None")
        if batch % shards[0] or length % shards[1]:
            raise ConfigError("shards", shards, f"must divide batch and length, {batch} and {length}")
        piece = length // shards[1]
        fewest = min(piece, math.ceil(batch * length / chunk))
        # A divisor of the length needs no padding; look for one before padding to a multiple.
        exact = (n for n in range(fewest, min(2 * fewest, piece) + 1) if piece % n == 0)
        return cls(batch, length, tuple(shards), next(exact, fewest))

    def split(self, x: Array) -> jax.Array:
        """`[B, T, ...]` to `[u, b, s, t, n, ...]`; each piece is padded with zeros to a multiple of n."""
        (u, s), n = self.shards, self.chunks
        x = jnp.reshape(x, (u, self.batch // u, s, self.length // s, *x.shape[2:]))
        missing = -x.shape[3] % n
        if missing:
            x = jnp.pad(x, [(0, missing if axis == 3 else 0) for axis in range(x.ndim)])
        return x.reshape(*x.shape[:3], x.shape[3] // n, n, *x.shape[4:])

    def join(self, x: jax.Array) -> jax.Array:
        """Back to `[B, T, ...]`."""
        x = x.reshape(*x.shape[:3], x.shape[3] * x.shape[4], *x.shape[5:])
        x = x[:, :, :, : self.length // self.shards[1]]
        return x.reshape(self.batch, self.length, *x.shape[4:])

    def take(self, x: jax.Array, i) -> jax.Array:
        return lax.dynamic_index_in_dim(x, i, _CHUNK_AXIS, keepdims=False)

    def put(self, x: jax.Array, value: jax.Array, i) -> jax.Array:
        return lax.dynamic_update_index_in_dim(x, value.astype(x.dtype), i, _CHUNK_AXIS)

    def fold(self, body, carry):
        if self.chunks == 1:
            return body(carry, 0)[0]
        return lax.scan(body, carry, jnp.arange(self.chunks))[0]


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


def _nothing(layout: _Layout) -> LossSums:
    return LossSums(*[jnp.zeros(layout.shards, jnp.float32)] * 4)


def _total(sums: LossSums) -> LossSums:
    return jax.tree.map(jnp.sum, sums)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(layout: _Layout, z_loss: float, hidden_BTD, w_DV, targets_BT, weights_BT) -> LossSums:
    hidden, targets, weights = (layout.split(x) for x in (hidden_BTD, targets_BT, weights_BT))

    def body(sums, i):
        _, *read = _read(layout.take(hidden, i), w_DV, layout.take(targets, i))
        return _accumulate(sums, *read, layout.take(weights, i)), None

    return _total(layout.fold(body, _nothing(layout)))


def _sums_and_gradients(layout: _Layout, z_loss: float, hidden_BTD, w_DV, targets_BT, weights_BT):
    hidden, targets, weights = (layout.split(x) for x in (hidden_BTD, targets_BT, weights_BT))
    compute = jnp.result_type(hidden, w_DV)

    def body(carry, i):
        sums, d_hidden, d_w = carry
        h, t, weight = (layout.take(x, i) for x in (hidden, targets, weights))
        logits, lse, target, correct = _read(h, w_DV, t)
        sums = _accumulate(sums, lse, target, correct, weight)
        pull = (weight * (1.0 + 2.0 * z_loss * lse))[..., None]
        d_logits = pull * jnp.exp(logits - lse[..., None]) - jnp.where(_is_target(t, logits), weight[..., None], 0.0)
        d_logits = d_logits.astype(compute)
        d_h = jnp.einsum("ubstv,dv->ubstd", d_logits, w_DV, preferred_element_type=jnp.float32)
        d_w += jnp.einsum("ubstd,ubstv->usdv", h, d_logits, preferred_element_type=jnp.float32)
        return (sums, layout.put(d_hidden, d_h, i), d_w), None

    start = (_nothing(layout), jnp.zeros_like(hidden), jnp.zeros((*layout.shards, *w_DV.shape), jnp.float32))
    sums, d_hidden, d_w = layout.fold(body, start)
    # The empty arrays carry the types of w and weights to the backward pass.
    types = jnp.zeros((0,), w_DV.dtype), jnp.zeros((0, *weights_BT.shape), weights_BT.dtype)
    return _total(sums), (layout.join(d_hidden), d_w.sum((0, 1)), *types)


def _pull_back(layout: _Layout, z_loss: float, saved, cotangent: LossSums):
    d_hidden_BTD, d_w_DV, w_type, weights_type = saved
    scale = cotangent.loss_sum
    d_hidden_BTD = (scale * d_hidden_BTD.astype(jnp.float32)).astype(d_hidden_BTD.dtype)
    d_weights_BT = jnp.zeros(weights_type.shape[1:], weights_type.dtype)
    return d_hidden_BTD, (scale * d_w_DV).astype(w_type.dtype), None, d_weights_BT


_sums.defvjp(_sums_and_gradients, _pull_back)
