"""Mixture of experts: each token goes through a few of many SwiGLUs, on whatever device they lie.

    router -> dispatch (dropless, or with a limit) -> experts -> combine   (+ a shared expert that sees every token)

Belongs here: the spec, the module, and the two ways in which tokens and experts meet on a mesh. What a router reads
and how experts are kept even is `routing`, the products are `grouped`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from irope_jax.core.config import ConfigError
from irope_jax.core.types import PAD_SEGMENT, Precision, TokenInfo
from irope_jax.model.feed_forward import FeedForward, SwiGLU
from irope_jax.model.grouped import grouped_dot, permute
from irope_jax.model.remat import named
from irope_jax.model.routing import Balance, RouterSpec, Routing, SigmoidRouter, route, router_sums
from irope_jax.sharding.rules import RULES, length_axis, spec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dropless:
    """Every token reaches the experts it chose."""

    kind: ClassVar[str] = "dropless"


@dataclass(frozen=True)
class Capacity:
    """An expert takes at most `factor` times its even share of each group of tokens; the rest pass it by.

    First choices go before second ones, earlier tokens before later ones (GShard, arXiv 2006.16668). Groups are
    stretches of a row, so what is dropped does not depend on the mesh.

    Attributes:
      factor: room, in even shares.
      group: tokens of a group; must divide what a device holds of a row. A row shorter than that is one group.
    """

    factor: float = 1.25
    group: int = 1024
    kind: ClassVar[str] = "capacity"

    def __post_init__(self):
        if self.factor <= 0:
            raise ConfigError("factor", self.factor, "room in even shares; use 1 or more")
        if self.group < 1:
            raise ConfigError("group", self.group, "tokens that share the room; use 1 or more")

    def room(self, tokens: int, top_k: int, num_experts: int) -> int:
        """Tokens of a group of `tokens` that an expert takes."""
        return max(1, math.ceil(self.factor * tokens * top_k / num_experts))


DispatchSpec = Dropless | Capacity


@dataclass(frozen=True)
class MoE:
    """`num_experts` SwiGLUs of which each token uses `top_k`, without biases.

    Attributes:
      num_experts: E.
      hidden_dim: F of one expert.
      top_k: experts of a token.
      router: how they are chosen and weighed.
      shared: an expert that every token uses besides; None has none.
      dispatch: all tokens, or as many as an expert has room for.
      balance: what keeps experts evenly used.
      exchange: on a mesh with an expert axis, what travels: `tokens` (all-to-all to the device of their expert) or
        `weights` (every device gathers all experts: cheaper when it holds many tokens); `auto` compares bytes.
    """

    num_experts: int
    hidden_dim: int
    top_k: int = 1
    router: RouterSpec = SigmoidRouter()
    shared: SwiGLU | None = None
    dispatch: DispatchSpec = Dropless()
    balance: Balance = Balance()
    exchange: Literal["auto", "tokens", "weights"] = "auto"
    kind: ClassVar[str] = "moe"

    def __post_init__(self):
        for name in ("num_experts", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError("top_k", self.top_k, f"experts of a token; use 1 to num_experts={self.num_experts}")

    def __str__(self) -> str:
        words = [f"MoE {self.num_experts} x {self.hidden_dim}, top-{self.top_k} {self.router.kind}"]
        words += [f"shared {self.shared.hidden_dim}"] if self.shared else []
        words += [f"capacity {self.dispatch.factor:g}"] if isinstance(self.dispatch, Capacity) else []
        return ", ".join(words)


class ExpertWeights(NamedTuple):
    """`gate`, `up` `[E, D, F]` and `down` `[E, F, D]`."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


class MixtureOfExperts(nn.Module):
    """The feed-forward part of a layer as a mixture. What its router did is sown as `router/sums`.

    Attributes: as `feed_forward.FeedForward`.
    """

    spec: MoE
    precision: Precision = Precision()
    init_std: float = 0.02
    out_std: float | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cut: str = "embed") -> jax.Array:
        """Hidden states `[B, T, D]` to the contribution of this layer to the residual stream `[B, T, D]`.

        `cut` is the logical axis by which the columns of the experts are laid out.
        """
        cfg, width = self.spec, x_BTD.shape[-1]
        compute, params = jnp.dtype(self.precision.compute), jnp.dtype(self.precision.params)
        out_std = self.init_std if self.out_std is None else self.out_std

        def weight(name: str, axes: tuple[str, ...], shape: tuple[int, ...], std: float) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
            return self.param(name, init, shape, params)

        e, f = cfg.num_experts, cfg.hidden_dim
        router_DE = weight("router", ("embed", None), (width, e), self.init_std)
        weights = ExpertWeights(
            weight("gate", ("expert", "embed", "mlp"), (e, width, f), self.init_std).astype(compute),
            weight("up", ("expert", "embed", "mlp"), (e, width, f), self.init_std).astype(compute),
            weight("down", ("expert", "mlp", "embed"), (e, f, width), out_std).astype(compute),
        )
        bias_E = None
        if cfg.balance.bias_rate:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None,))
            bias_E = self.param("balance_bias", init, (e,), params).astype(jnp.float32)
        # Routing is float32 whatever the compute type: a rounded logit sends a token elsewhere.
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), router_DE.astype(jnp.float32))
        logits_BTE = named(logits_BTE, "router_logits")
        routing = route(cfg.router, logits_BTE, cfg.top_k, bias_E)
        real_BT = info.segments != PAD_SEGMENT
        x_BTD = x_BTD.astype(compute)
        out_BTD, dropped = mixture(cfg, x_BTD, routing, weights, info, real_BT, cut)
        sums = router_sums(cfg.router, logits_BTE, routing.chosen, real_BT).replace(dropped=dropped)
        self.sow("router", "sums", sums, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        if cfg.shared is not None:
            shared = FeedForward(cfg.shared, self.precision, self.init_std, self.out_std, name="shared")
            out_BTD = out_BTD + shared(x_BTD)
        return out_BTD


def mixture(
    cfg: MoE,
    x_BTD: jax.Array,
    routing: Routing,
    weights: ExpertWeights,
    info: TokenInfo,
    real_BT: jax.Array,
    cut: str = "embed",
) -> tuple[jax.Array, jax.Array]:
    """`(out_BTD, dropped)`: the weighed sum of each token's experts, over the mesh in force, and lost assignments.

    Padding goes to no expert and gets zeros.

    Raises:
      ConfigError: groups of capacity that devices would cut; names the field and the fix.
    """
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    group = _group_size(cfg, info, 1 if mesh.empty else mesh.shape["context"])
    chosen_BTk = jnp.where(real_BT[..., None], routing.chosen, cfg.num_experts)  # padding: past the last expert
    if alone:
        run = partial(_on_device, cfg, group=group, parts=1, exchange="weights")
        return run(x_BTD, chosen_BTk, routing.score, weights)
    sizes = dict(mesh.shape)
    places = length_axis(x_BTD.shape[1])
    tokens = x_BTD.shape[0] * x_BTD.shape[1] // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
    tokens = tokens // sizes["context"] if places else tokens
    exchange = _exchange(cfg, tokens, sizes["expert"])
    local = partial(_local, cfg, group=group, parts=sizes["expert"], exchange=exchange, cut=cut)
    by_token = spec(("batch", places, None))
    in_out, out_in = spec(("expert", cut, "mlp")), spec(("expert", "mlp", cut))
    return jax.shard_map(
        local,
        in_specs=(by_token, by_token, by_token, ExpertWeights(in_out, in_out, out_in)),
        out_specs=(by_token, spec(())),
        check_vma=False,
    )(x_BTD, chosen_BTk, routing.score, weights)


def _exchange(cfg: MoE, tokens: int, parts: int) -> str:
    """`tokens` or `weights`: which is fewer numbers to receive in a forward pass, of `tokens` tokens a device."""
    if parts == 1 or cfg.exchange != "auto":
        return "weights" if parts == 1 else cfg.exchange
    sent = 2 * tokens * cfg.top_k
    gathered = 3 * cfg.hidden_dim * cfg.num_experts
    way = "tokens" if sent < gathered else "weights"
    _tell(way, tokens, cfg.top_k, cfg.num_experts, cfg.hidden_dim)
    return way


@lru_cache(maxsize=256)
def _tell(way: str, tokens: int, top_k: int, experts: int, hidden: int) -> None:
    """Cached, so that each distinct decision is logged once."""
    log.info(
        "experts: %s travel (there and back %d tokens x %d, against 3 x %d x %d columns of weights)",
        way, tokens, top_k, experts, hidden,
    )  # fmt: skip


def _group_size(cfg: MoE, info: TokenInfo, parts: int) -> int | None:
    """Tokens of a group that shares room; None without a limit."""
    if isinstance(cfg.dispatch, Dropless):
        return None
    length = info.shape[1]
    if length <= cfg.dispatch.group and parts == 1:
        return length
    whole = length // parts if info.zigzag is None else length // (2 * parts)  # contiguous on a device
    if whole % cfg.dispatch.group:
        usable = math.gcd(whole, cfg.dispatch.group)
        fix = f"must divide {whole}, the tokens of a row that follow one another on a device; use {usable}"
        raise ConfigError("ffn.dispatch.group", cfg.dispatch.group, fix)
    return cfg.dispatch.group


def _local(cfg, x_BTD, chosen_BTk, score_BTk, weights, *, group, parts, exchange, cut):
    """Shapes below are per device. Weights of its own experts are gathered as any parameter's."""
    gather = lambda w, axis: lax.all_gather(w, RULES[cut], axis=axis, tiled=True)
    weights = ExpertWeights(gather(weights.gate, 1), gather(weights.up, 1), gather(weights.down, 2))
    if exchange == "weights" and parts > 1:
        weights = ExpertWeights(*(lax.all_gather(w, "expert", axis=0, tiled=True) for w in weights))
    out_BTD, dropped = _on_device(
        cfg, x_BTD, chosen_BTk, score_BTk, weights, group=group, parts=parts, exchange=exchange
    )
    # Each device of `tensor` has some columns of the hidden layer, so a part of every sum.
    out_BTD = lax.psum(out_BTD, "tensor")
    return out_BTD, lax.psum(dropped, ("data", "fsdp", "context", "expert"))


def _on_device(cfg, x_BTD, chosen_BTk, score_BTk, weights, *, group, parts, exchange):
    """Tokens of this device through experts that are here (`weights`) or a device away (`tokens`)."""
    batch, length, width = x_BTD.shape
    flat = lambda z: z.reshape(batch * length, z.shape[-1])
    x_nD, chosen_nk, score_nk = flat(x_BTD), flat(chosen_BTk), flat(score_BTk).astype(x_BTD.dtype)
    away = parts if exchange == "tokens" else 1
    if group is None:
        out_nD, dropped = _dropless(cfg, x_nD, chosen_nk, score_nk, weights, away), jnp.zeros((), jnp.float32)
    else:
        out_nD, dropped = _limited(cfg, x_nD, chosen_nk, score_nk, weights, away, group)
    return out_nD.reshape(batch, length, width), dropped


def _weighed(cfg: MoE, rows: jax.Array, score: jax.Array, when: str) -> jax.Array:
    return rows * score[..., None] if cfg.router.weighs == when else rows


def _dropless(cfg, x_nD, chosen_nk, score_nk, weights, away) -> jax.Array:
    """Assignments in order of their experts, through grouped products, and back in order of tokens."""
    (n, k), experts = chosen_nk.shape, cfg.num_experts
    x_nkD = _weighed(cfg, jnp.repeat(x_nD[:, None], k, axis=1), score_nk, "input")
    chosen_M = chosen_nk.reshape(n * k)
    order_M = jnp.argsort(chosen_M, stable=True)
    inverse_M = jnp.argsort(order_M)
    sizes_E = jnp.bincount(chosen_M, length=experts).astype(jnp.int32)  # padding, past the last, is not counted
    rows_MD = permute(x_nkD.reshape(n * k, -1), order_M, inverse_M)
    if away == 1:
        rows_MD = _experts(rows_MD, sizes_E, weights)
    else:
        rows_MD = _abroad(rows_MD, sizes_E, weights, away)
    out_nkD = permute(rows_MD, inverse_M, order_M).reshape(n, k, -1)
    return _weighed(cfg, out_nkD, score_nk, "output").sum(1)


def _experts(rows_MD, sizes_E, weights: ExpertWeights) -> jax.Array:
    """Rows in order of their experts through each row's SwiGLU; rows past the last give zeros."""
    rows_MD = named(rows_MD, "expert_rows")
    gate = named(grouped_dot(rows_MD, weights.gate, sizes_E), "expert_gate")
    up = named(grouped_dot(rows_MD, weights.up, sizes_E), "expert_up")
    return named(grouped_dot(jax.nn.silu(gate) * up, weights.down, sizes_E), "expert_out")


def _abroad(rows_MD, sizes_E, weights: ExpertWeights, parts: int) -> jax.Array:
    """The same with experts cut over `parts` devices: rows travel to their experts and the results back.

    No row is ever dropped, so there is room for the worst case: all rows of all devices.
    """
    most, mine = rows_MD.shape[0], weights.gate.shape[0]
    sizes_PPe = lax.all_gather(sizes_E, "expert").reshape(parts, parts, mine)  # from, to, expert there
    me = lax.axis_index("expert")
    arrived_PMD = _send(rows_MD, sizes_PPe.sum(2), me)
    # Row r of a device is of the expert in whose stretch of what that device sent here it lies.
    here_Pe = sizes_PPe[:, me]
    ends_Pe = jnp.cumsum(here_Pe, axis=1)
    expert_PM = jax.vmap(lambda ends: jnp.searchsorted(ends, jnp.arange(most), side="right"))(ends_Pe)
    order = jnp.argsort(expert_PM.reshape(parts * most), stable=True)
    inverse = jnp.argsort(order)
    out = _experts(permute(arrived_PMD.reshape(parts * most, -1), order, inverse), here_Pe.sum(0), weights)
    return _send_back(permute(out, inverse, order).reshape(parts, most, -1), sizes_PPe.sum(2), me)


def _send(rows_MD, sizes_PP, me) -> jax.Array:
    """Rows in order of the device they go to; `[P, M, D]`, by the device they came from, zeros after its last.

    `sizes_PP` are rows by device from and to. XLA:CPU has no all-to-all of unequal pieces: there whole pieces travel.
    """
    parts, most = len(sizes_PP), rows_MD.shape[0]

    def ragged(rows_MD, sizes_PP, me):
        room = jnp.zeros((parts * most, rows_MD.shape[1]), rows_MD.dtype)
        mine, theirs = sizes_PP[me], sizes_PP[:, me]
        there = jnp.full(parts, me * most, sizes_PP.dtype)
        return lax.ragged_all_to_all(rows_MD, room, _starts(mine), mine, there, theirs, axis_name="expert")

    def padded(rows_MD, sizes_PP, me):
        place, inside = _starts(sizes_PP[me])[:, None] + jnp.arange(most), jnp.arange(most) < sizes_PP[me][:, None]
        rows = jnp.take(rows_MD, jnp.where(inside, place, most), axis=0, mode="fill", fill_value=0)
        return _swap(rows).reshape(parts * most, -1)

    return lax.platform_dependent(rows_MD, sizes_PP, me, cpu=padded, default=ragged).reshape(parts, most, -1)


def _send_back(rows_PMD, sizes_PP, me) -> jax.Array:
    """The inverse of `_send`: `[M, D]`, zeros after the last."""
    parts, most, width = rows_PMD.shape

    def ragged(rows_PMD, sizes_PP, me):
        mine, theirs = sizes_PP[me], sizes_PP[:, me]
        here = jnp.arange(parts, dtype=sizes_PP.dtype) * most
        there = jax.vmap(_starts)(sizes_PP)[:, me]
        room = jnp.zeros((most, width), rows_PMD.dtype)
        flat = rows_PMD.reshape(parts * most, width)
        return lax.ragged_all_to_all(flat, room, here, theirs, there, mine, axis_name="expert")

    def padded(rows_PMD, sizes_PP, me):
        flat, starts, row = _swap(rows_PMD).reshape(parts * most, width), _starts(sizes_PP[me]), jnp.arange(most)
        part = jnp.searchsorted(jnp.cumsum(sizes_PP[me]), row, side="right")
        place = part * most + row - starts[jnp.minimum(part, parts - 1)]
        return jnp.take(flat, jnp.where(part < parts, place, parts * most), axis=0, mode="fill", fill_value=0)

    return lax.platform_dependent(rows_PMD, sizes_PP, me, cpu=padded, default=ragged)


def _starts(sizes: jax.Array) -> jax.Array:
    return jnp.cumsum(sizes) - sizes


def _swap(x_P: jax.Array) -> jax.Array:
    """Slice p to device p; slice p of the result came from device p."""
    return lax.all_to_all(x_P, "expert", split_axis=0, concat_axis=0, tiled=True)


def _limited(cfg, x_nD, chosen_nk, score_nk, weights, away, group) -> tuple[jax.Array, jax.Array]:
    """Experts with a fixed number of places a group; assignments that find none are dropped."""
    (n, k), experts, width = chosen_nk.shape, cfg.num_experts, x_nD.shape[-1]
    groups, room = n // group, cfg.dispatch.room(group, k, cfg.num_experts)
    chosen_Ggk = chosen_nk.reshape(groups, group, k)
    # Choice by choice, and token by token within a choice: the place is how many came before to the same expert.
    turns = chosen_Ggk.swapaxes(1, 2).reshape(groups, k * group)
    taken = jax.nn.one_hot(turns, experts, dtype=jnp.int32)  # padding, past the last, takes no place
    before = (
        jnp.take_along_axis(jnp.cumsum(taken, axis=1), jnp.minimum(turns, experts - 1)[..., None], axis=-1)[..., 0] - 1
    )
    place_Ggk = before.reshape(groups, k, group).swapaxes(1, 2)
    real, kept = chosen_Ggk < experts, (chosen_Ggk < experts) & (place_Ggk < room)
    slots = groups * experts * room
    first = jnp.arange(groups)[:, None, None] * experts * room
    slot = jnp.where(kept, first + chosen_Ggk * room + place_Ggk, slots).reshape(n, k)
    x_nkD = _weighed(cfg, jnp.repeat(x_nD[:, None], k, axis=1), score_nk, "input")
    places = jnp.zeros((slots, width), x_nD.dtype).at[slot].set(x_nkD, mode="drop")
    if away > 1:
        # [groups, parts, experts of a part, room] -> to each part its experts, of the groups of all.
        places = places.reshape(groups, away, experts // away, room, width).swapaxes(0, 1)
        places = _swap(places).reshape(away * groups, experts // away, room, width)
    else:
        places = places.reshape(groups, experts, room, width)
    places = named(places, "expert_rows")
    gate = named(jnp.einsum("gecD,eDF->gecF", places, weights.gate), "expert_gate")
    up = named(jnp.einsum("gecD,eDF->gecF", places, weights.up), "expert_up")
    out = named(jnp.einsum("gecF,eFD->gecD", jax.nn.silu(gate) * up, weights.down), "expert_out")
    if away > 1:
        out = _swap(out.reshape(away, groups, experts // away, room, width)).swapaxes(0, 1)
    out_nkD = jnp.take(out.reshape(slots, width), slot, axis=0, mode="fill", fill_value=0)
    return _weighed(cfg, out_nkD, score_nk, "output").sum(1), (real & ~kept).sum().astype(jnp.float32)
