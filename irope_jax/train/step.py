"""One optimizer step: gradients over micro-batches, the update, and the scalars that describe it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from irope_jax.core.types import Batch
from irope_jax.losses import chunked_cross_entropy
from irope_jax.model.config import LayerSpec, ModelConfig
from irope_jax.model.decoder import routed_hidden_states
from irope_jax.model.routing import RouterSums, moved_bias
from irope_jax.sharding.rules import token_parts
from irope_jax.train.optimizer import Optimizer
from irope_jax.train.placement import on_device
from irope_jax.train.state import TrainState


def loss_sums(config: ModelConfig, params: Any, batch: Batch, z_loss: float) -> tuple[jax.Array, Any]:
    """What is minimised, as a weighted sum over tokens, and the sums it came from.

    The gradient of the first includes the z-loss and what routers are asked for; the second is a pair of the `LossSums`
    and the `RouterSums` of each mixture by layer of the period.
    """
    hidden_BTD, w_DV, routers = routed_hidden_states(config.in_training(), params, batch.tokens, batch.info)
    with jax.named_scope("loss"):
        sums = chunked_cross_entropy(
            hidden_BTD, w_DV, batch.targets, batch.weights, z_loss=z_loss, shards=token_parts()
        )
    return sums.loss_sum + router_loss(config, routers) * sums.weight_sum, (sums, routers)


def router_loss(config: ModelConfig, routers: Mapping[str, RouterSums]) -> jax.Array:
    """Load-balance and router z-loss a token, each times its weight, mean over the mixtures of the model."""
    total, layers = jnp.zeros((), jnp.float32), 0
    for name, sums in routers.items():
        balance, tokens = layer_of(config, name).ffn.balance, jnp.maximum(sums.tokens, 1.0)
        total += ((balance.loss * sums.balance + balance.z_loss * sums.z) / tokens).sum()
        layers += sums.tokens.size
    return total / max(layers, 1)


def layer_of(config: ModelConfig, name: str) -> LayerSpec:
    """The layer of the period that parameters call `layer_<i>`."""
    return config.period[int(name.removeprefix("layer_"))]


def move_balance_biases(config: ModelConfig, params: Any, routers: Mapping[str, RouterSums]) -> Any:
    """Parameters after the step's loads moved the biases that routers choose by, where a layer has them."""
    periods = dict(params["periods"])
    for name, sums in routers.items():
        rate = layer_of(config, name).ffn.balance.bias_rate
        if rate:
            ffn = periods[name]["feed_forward"]
            moved = moved_bias(ffn["balance_bias"], sums.load, rate).astype(ffn["balance_bias"].dtype)
            periods[name] = {**periods[name], "feed_forward": {**ffn, "balance_bias": moved}}
    return {**params, "periods": periods}


def router_scalars(config: ModelConfig, routers: Mapping[str, RouterSums]) -> dict[str, jax.Array]:
    """How routers did, over the mixtures of the model; nothing without any.

    `router_balance_loss` (1 is even) and `router_z_loss` are means, unweighed; `router_max_load` is the largest load of
    an expert in even shares, `router_unused` the share of experts that no token chose, `router_dropped` that of
    assignments that found no room.
    """
    if not routers:
        return {}
    mean = lambda values: jnp.concatenate([jnp.ravel(value) for value in values]).mean()
    some = lambda sums: jnp.maximum(sums.tokens, 1.0)
    loads = [sums.load / jnp.maximum(sums.load.mean(-1, keepdims=True), 1e-9) for sums in routers.values()]
    return {
        "router_balance_loss": mean(sums.balance / some(sums) for sums in routers.values()),
        "router_z_loss": mean(sums.z / some(sums) for sums in routers.values()),
        "router_max_load": jnp.stack([load.max() for load in loads]).max(),
        "router_unused": mean(load == 0 for load in loads),
        "router_dropped": mean(sums.dropped / jnp.maximum(sums.load.sum(-1), 1.0) for sums in routers.values()),
    }


def layer_scalars(config: ModelConfig, **trees: Any) -> dict[str, jax.Array]:
    """Norms of each layer's attention and feed-forward part in each of the trees of parameters.

    Names are `layer_07/attention/grad_norm`; norms of a part count towards the part they stand before.
    """
    found = {}
    for what, tree in trees.items():
        for name, layer in tree["periods"].items():
            place = int(name.removeprefix("layer_"))
            for part in ("attention", "feed_forward"):
                leaves = jax.tree.leaves([value for key, value in layer.items() if key.startswith(part)])
                squares = sum(jnp.square(x.astype(jnp.float32)).reshape(len(x), -1).sum(1) for x in leaves)
                for repeat in range(config.num_layers // len(config.period)):
                    number = repeat * len(config.period) + place
                    found[f"layer_{number:02d}/{part}/{what}"] = jnp.sqrt(squares[repeat])
    return found


def gradients(config: ModelConfig, params: Any, batch: Batch, *, z_loss: float, accumulate: int) -> tuple[Any, Any]:
    """Gradient of the mean loss per unit of weight, and the sums of `loss_sums` over the batch.

    With `accumulate > 1` the batch is cut along B and the parts follow one another, so that memory is that of one part;
    sums are divided once at the end, so the result does not depend on how weights are spread over the parts. Experts
    are asked to be even within each part.
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
    weight = jnp.maximum(sums[0].weight_sum, 1e-9)
    return jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), grads, params), sums


def make_train_step(
    config: ModelConfig,
    optimizer: Optimizer,
    rate: optax.Schedule,
    *,
    z_loss: float = 0.0,
    accumulate: int = 1,
    by_layer: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The function `(state, batch, most=None) -> (state, scalars)`, to be jitted with the state donated.

    A step whose loss or gradient is not finite, or whose loss is above `most`, changes nothing but its counters.
    Scalars: `loss` (nats per unit of weight, without z-loss), `accuracy`, `grad_norm` (before clipping), `update_norm`,
    `param_norm`, `learning_rate`, `weight` (targets counted), `skipped`, `skipped_in_a_row`, `router_…` where there are
    mixtures of experts, and with `by_layer` those of `layer_scalars`.
    """

    def train_step(
        state: TrainState, batch: Batch, most: jax.Array | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        state = state.replace(opt_state=on_device(state.opt_state))
        grads, (sums, routers) = gradients(config, state.params, batch, z_loss=z_loss, accumulate=accumulate)
        weight = jnp.maximum(sums.weight_sum, 1e-9)
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(grad_norm) & jnp.isfinite(sums.loss_sum)
        if most is not None:
            good &= sums.loss_sum / weight <= most
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        bad = 1 - good.astype(jnp.int32)
        params = move_balance_biases(config, optax.apply_updates(state.params, updates), routers)
        averaged = state.averaged
        if optimizer.average is not None:
            averaged = optimizer.average(averaged, params, opt_state, state.step - state.skipped)
        after = state.replace(
            step=state.step + 1,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + bad) * bad,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            averaged=keep(averaged, state.averaged),
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
        scalars |= router_scalars(config, routers)
        if by_layer:
            trees = dict(grad_norm=grads, update_norm=updates, param_norm=after.params)
            scalars |= layer_scalars(config, **trees)
        return after, scalars

    return train_step
