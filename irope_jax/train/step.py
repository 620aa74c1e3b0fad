"""One optimizer step: gradients over micro-batches, the update, and the scalars that describe it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from irope_jax.core.types import Batch
from irope_jax.losses import chunked_cross_entropy
from irope_jax.model.config import ModelConfig
from irope_jax.model.decoder import hidden_states
from irope_jax.sharding.rules import token_parts
from irope_jax.train.state import TrainState


def loss_sums(config: ModelConfig, params: Any, batch: Batch, z_loss: float) -> tuple[jax.Array, Any]:
    """Weighted sum of token losses, whose gradient includes the z-loss, and the `LossSums` it came from."""
    hidden_BTD, w_DV = hidden_states(config.in_training(), params, batch.tokens, batch.info)
    sums = chunked_cross_entropy(hidden_BTD, w_DV, batch.targets, batch.weights, z_loss=z_loss, shards=token_parts())
    return sums.loss_sum, sums


def gradients(config: ModelConfig, params: Any, batch: Batch, *, z_loss: float, accumulate: int) -> tuple[Any, Any]:
    """Gradient of the mean loss per unit of weight, and the summed `LossSums`.

    With `accumulate > 1` the batch is cut along B and the parts follow one another, so that memory is that of one part;
    sums are divided once at the end, so the result does not depend on how weights are spread over the parts.
    """
    grad = jax.grad(lambda p, b: loss_sums(config, p, b, z_loss), has_aux=True)
    if accumulate == 1:
        grads, sums = grad(params, batch)
    else:
        # [B] -> [parts, B / parts] with neighbouring rows in different parts: a sharded batch stays where it lies.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        zeros = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), zeros)
        add = lambda total, part: (jax.tree.map(jnp.add, total, grad(params, part)), None)
        (grads, sums), _ = jax.lax.scan(add, zeros, parts)
    weight = jnp.maximum(sums.weight_sum, 1e-9)
    return jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), grads, params), sums


def make_train_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    *,
    z_loss: float = 0.0,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The function `(state, batch) -> (state, scalars)`, to be jitted with the state donated.

    A step whose loss or gradient is not finite changes nothing but its counters. Scalars: `loss` (nats per unit of
    weight, without z-loss), `accuracy`, `grad_norm` (before clipping), `update_norm`, `param_norm`, `learning_rate`,
    `weight` (targets counted), `skipped`, `skipped_in_a_row`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, sums = gradients(config, state.params, batch, z_loss=z_loss, accumulate=accumulate)
        weight = jnp.maximum(sums.weight_sum, 1e-9)
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(grad_norm) & jnp.isfinite(sums.loss_sum)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        bad = 1 - good.astype(jnp.int32)
        after = state.replace(
            step=state.step + 1,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + bad) * bad,
            params=keep(optax.apply_updates(state.params, updates), state.params),
            opt_state=keep(opt_state, state.opt_state),
        )
        scalars = {
            "loss": sums.loss_sum / weight,
            "accuracy": sums.correct_sum / weight,
            "grad_norm": grad_norm,
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(after.params),
            "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
            "weight": sums.weight_sum,
            "skipped": after.skipped,
            "skipped_in_a_row": after.skipped_in_a_row,
        }
        return after, scalars

    return train_step
