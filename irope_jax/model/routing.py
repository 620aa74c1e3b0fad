"""Which experts a token goes to, with what weight, and how evenly: routers and the balance between experts.

Belongs here: everything that reads router logits. How tokens reach their experts is `moe`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from irope_jax.core.config import ConfigError
from irope_jax.core.types import Array


@dataclass(frozen=True)
class SigmoidRouter:
    """The largest raw logits win; the sigmoid of each multiplies what its expert reads (Llama 4)."""

    kind: ClassVar[str] = "sigmoid"
    weighs: ClassVar[str] = "input"


@dataclass(frozen=True)
class SoftmaxRouter:
    """Softmax over all experts; the largest win and multiply what their experts give (Mixtral, arXiv 2401.04088).

    Attributes:
      renormalise: divide the chosen probabilities by their sum.
    """

    renormalise: bool = True
    kind: ClassVar[str] = "softmax"
    weighs: ClassVar[str] = "output"


RouterSpec = SigmoidRouter | SoftmaxRouter


@dataclass(frozen=True)
class Balance:
    """What keeps experts evenly used in training; none of it changes a model that is only evaluated.

    Attributes:
      loss: weight of the load-balance loss `E sum_e f_e P_e` (Switch, arXiv 2101.03961), 1 when even, mean over layers.
      z_loss: weight of the mean squared log-partition of the router (ST-MoE, arXiv 2202.08906), mean over layers.
      bias_rate: how far a step moves a bias that only the choice of experts reads, up where an expert got less than its
        share and down where more (arXiv 2408.15664); 0 has no such bias.
    """

    loss: float = 0.01
    z_loss: float = 0.001
    bias_rate: float = 0.0

    def __post_init__(self):
        for name in ("loss", "z_loss", "bias_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must not be negative; 0 leaves it out")


class Routing(NamedTuple):
    """`chosen`: int32 `[B, T, k]`, best first. `score`: float32 `[B, T, k]`, the weight of each."""

    chosen: jax.Array
    score: jax.Array


@flax.struct.dataclass
class RouterSums:
    """What routers did with the tokens of a batch that are not padding: sums, float32, to be added over parts.

    A leading axis runs over the repeats of the layer period where layers are stacked.

    Attributes:
      tokens: how many.
      load: assignments to each expert, `[E]`; a token makes k.
      balance: tokens times the load-balance loss; carries its gradient.
      z: sum of the squared log-partition; carries its gradient.
      dropped: assignments that found no room (capacity-limited dispatch only).
    """

    tokens: Array
    load: Array
    balance: Array
    z: Array
    dropped: Array


def route(spec: RouterSpec, logits_BTE: jax.Array, top_k: int, bias_E: jax.Array | None = None) -> Routing:
    """The `top_k` experts of each token; the bias moves the choice and never the weight."""
    values = logits_BTE if isinstance(spec, SigmoidRouter) else jax.nn.softmax(logits_BTE)
    ranked = jax.lax.stop_gradient(values if bias_E is None else values + bias_E)
    _, chosen_BTk = jax.lax.top_k(ranked, top_k)
    score_BTk = jnp.take_along_axis(values, chosen_BTk, axis=-1)
    if isinstance(spec, SigmoidRouter):
        score_BTk = jax.nn.sigmoid(score_BTk)
    elif spec.renormalise:
        score_BTk = score_BTk / score_BTk.sum(-1, keepdims=True)
    return Routing(chosen_BTk, score_BTk)


def router_sums(spec: RouterSpec, logits_BTE: jax.Array, chosen_BTk: jax.Array, real_BT: jax.Array) -> RouterSums:
    """Sums over the tokens where `real_BT`; nothing is dropped yet.

    The probability of an expert is the softmax, or for sigmoids its share in their sum (DeepSeek-V3, arXiv 2412.19437).
    """
    experts, k = logits_BTE.shape[-1], chosen_BTk.shape[-1]
    real_BT1 = real_BT[..., None].astype(jnp.float32)
    tokens = real_BT1.sum()
    load_E = (jax.nn.one_hot(chosen_BTk, experts, dtype=jnp.float32) * real_BT1[..., None]).sum((0, 1, 2))
    if isinstance(spec, SigmoidRouter):
        share_BTE = jax.nn.sigmoid(logits_BTE)
        share_BTE = share_BTE / share_BTE.sum(-1, keepdims=True)
    else:
        share_BTE = jax.nn.softmax(logits_BTE)
    share_E = (share_BTE * real_BT1).sum((0, 1))
    z_BT1 = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True))
    count = jnp.maximum(tokens, 1.0)
    return RouterSums(
        tokens=tokens,
        load=load_E,
        balance=experts * jnp.sum(jax.lax.stop_gradient(load_E) * share_E) / (k * count),
        z=(z_BT1 * real_BT1).sum(),
        dropped=jnp.zeros((), jnp.float32),
    )


def moved_bias(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
    """The bias after a step in which experts got `load_E`; both may have leading axes."""
    return bias_E + rate * jnp.sign(load_E.mean(-1, keepdims=True) - load_E)
