"""The closed form: what a step costs on one device, by hand from `LayerSpec`s. Instant, and no compiler is asked.

    parameters   every weight by its logical axes: `embed` is cut by fsdp x context, heads and widths by tensor
    optimizer    two moments a parameter for AdamW; what others hold is read from their shapes
    kept         residual stream and attention's output of each layer, by remat preset; other choices are traced
    cache        `model.cache.cache_bytes`, cut
    sent         attention as `context.strategy` decides, weights gathered and gradients summed, experts, tensor parts
    FLOPs        2 a weight and token forward, twice that backward; 4 N H a visible pair forward, 10 N H
                 backward, of splash's kernels 14

    working      what lives within a layer: a fit to what compilers allocate, within a fifth (`tests/plan/cells.json`)

Only a compiler knows its temporaries; the fit is there to tell what may fit from what cannot. For decoding it is left
out: there a step holds little beside its cache. `traffic` is a floor: weights, moments and what is kept, moved as often
as a step must.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from irope_jax.attention.mask import visible_pairs
from irope_jax.context.layout import ContextLayout
from irope_jax.context.strategy import CallShape, Decision, Promises, decide
from irope_jax.model.cache import cache_bytes
from irope_jax.model.config import FfnSpec, LayerSpec, ModelConfig
from irope_jax.model.kept import layer_memory, share
from irope_jax.model.moe import MoE
from irope_jax.plan.job import Compiler, Figures, Job
from irope_jax.position.absolute import Learned
from irope_jax.sharding.mesh import MeshConfig, abstract_mesh
from irope_jax.train.optimizer import make_optimizer
from irope_jax.train.state import state_shardings

REMATERIALISED = ("full", "attention", "offload", "offload_inputs")
"""Presets that compute a layer's products again; of them those that keep what attention gave."""
KEEPS_ATTENTION = ("attention", "offload", "none", "dots")


LANES = 128
"""Numbers in a row of a TPU's tile."""


@dataclass(frozen=True)
class Weight:
    """A matrix of the model.

    Attributes:
      size: numbers in it.
      parts: devices that share it out.
      gathered: of those, the ones that a product gathers it from.
      layer: of the period, or None.
      used: share of it that a token is multiplied with: 1, of experts `top_k / num_experts`, of a look-up 0.
      summed: how many devices beside those of `gathered` have a gradient of it to add.
      repeats: how often it stands in the model.
    """

    size: int
    parts: int
    gathered: int
    layer: int | None
    used: float = 1.0
    summed: int = 1
    repeats: int = 1


def weights(model: ModelConfig, mesh: MeshConfig) -> list[Weight]:
    """Every parameter of the model."""
    embed, tensor = mesh.fsdp * mesh.context, mesh.tensor
    d, h, n, k = model.d_model, model.head_dim, model.num_heads, model.num_kv_heads
    repeats, found = model.num_layers // len(model.period), []
    others = mesh.data * mesh.expert

    def add(size, layer, cut=embed * tensor, gathered=embed, **more):
        more = {"summed": others, "repeats": 1 if layer is None else repeats, **more}
        found.append(Weight(size, cut, gathered, layer, **more))

    def ffn(spec: FfnSpec, i: int):
        if not isinstance(spec, MoE):
            add(3 * d * spec.hidden_dim, i)
            return
        share_of = {"used": spec.top_k / spec.num_experts, "summed": mesh.data}
        add(3 * d * spec.hidden_dim * spec.num_experts, i, cut=embed * tensor * mesh.expert, **share_of)
        add(d * spec.num_experts, i, cut=embed)
        if spec.balance.bias_rate:
            add(spec.num_experts, i, cut=1, gathered=1, used=0.0)
        if spec.shared is not None:
            ffn(spec.shared, i)

    for i, layer in enumerate(model.period):
        add(2 * d * n * h + 2 * d * k * h, i)
        if model.attention_bias != "none":
            add((n + 2 * k) * h, i, cut=tensor, gathered=1, used=0.0)
        if model.attention_bias == "all":
            add(d, i, cut=1, gathered=1, used=0.0)
        if layer.qk_norm == "learned":
            add(2 * h, i, cut=1, gathered=1, used=0.0)
        if layer.qk_norm == "learned_all_heads":
            add((n + k) * h, i, cut=tensor, gathered=1, used=0.0)
        add(d * (1 if model.block == "parallel" else 2), i, cut=1, gathered=1, used=0.0)
        ffn(layer.ffn, i)
    untied = model.output_head == "untied"
    add(model.vocab_size * d, None, used=0.0 if untied else 1.0, gathered=1 if untied else embed)
    if untied:
        add(model.vocab_size * d, None)
    if isinstance(model.position_embedding, Learned):
        add(model.position_embedding.size * d, None, cut=embed, gathered=1, used=0.0)
    add(d, None, cut=1, gathered=1, used=0.0)
    return found


def closed_form(job: Job, *, compiler: Compiler = "tpu") -> Figures:
    """Figures of a job.

    Args:
      compiler: whose ways are counted. XLA:CPU does not turn a sum that is cut afterwards into a reduce-scatter; on
        TPUs attention is splash, whose backward kernels compute more.

    Raises:
      ConfigError: the sequence cannot be cut so.
    """
    model, mesh = job.model, job.mesh
    held, item = weights(model, _weights_mesh(job)), jnp.dtype(model.precision.params).itemsize
    parameters = sum(w.size * w.repeats // w.parts for w in held) * item
    sent, sent_by = {}, {}

    def send(layer: int | None, kind: str, count: float) -> None:
        name = "" if layer is None else f"layer_{layer}"
        if count:
            sent[kind], sent_by[name] = sent.get(kind, 0.0) + count, sent_by.get(name, 0.0) + count

    if job.mode == "train":
        _send_weights(job, send, scatters=compiler != "cpu")
        _send_attention(job, send)
        _send_tokens(job, send)
        optimizer, host = _optimizer(job, parameters, item)
        kept, offloaded = kept_activations(job)
        traffic = _training_traffic(job, held, parameters, optimizer + host, kept)
        flops = _training_flops(job, held, kernels=compiler == "tpu")
        temporaries = kept + parameters + working_bytes(job, held)  # those in the middle are gradients
        return Figures(
            parameters=parameters, optimizer=optimizer, kept=kept, host=host + offloaded,
            host_traffic=2.0 * (host + offloaded * job.train.accumulate), temporaries=temporaries,
            total=parameters + optimizer + temporaries, flops=flops, traffic=traffic, sent=sent,
            sent_by=dict(sorted(sent_by.items())),
        )  # fmt: skip
    cache = _cache(job)
    _send_cached(job, send)
    tokens = job.rows // mesh.batch_parts * (job.piece if job.mode == "prefill" else 1)
    flops = 2 * tokens * sum(w.size * w.repeats * w.used / max(w.parts // w.gathered, 1) for w in held)
    seen = tokens * sum(visible_keys(layer, job.length) for layer in model.layers)
    flops += 4 * model.num_heads * model.head_dim * seen / (mesh.tensor * mesh.context)
    return Figures(
        parameters=parameters, cache=cache, flops=flops, total=parameters + cache, traffic=float(parameters + cache),
        sent=sent, sent_by=dict(sorted(sent_by.items())),
    )  # fmt: skip


def _weights_mesh(job: Job) -> MeshConfig:
    """The axes that cut weights: for decoding they are whole along `context`."""
    return job.mesh if job.mode == "train" else replace(job.mesh, context=1)


def visible_keys(layer: LayerSpec, length: int) -> int:
    """Keys that the last token of a document of `length` tokens sees at most."""
    return length if layer.mask.reach is None else min(length, layer.mask.reach)


def tokens_here(job: Job) -> int:
    """Tokens of a training step on one device, in one of the parts that follow one another."""
    return job.data.batch_size * job.length // (job.train.accumulate * job.mesh.batch_parts * job.mesh.context)


def kept_activations(job: Job) -> tuple[int, int]:
    """Bytes that wait for the backward pass, on a device and on its host."""
    model, mesh, remat = job.model.in_training(), job.mesh, job.model.remat
    tokens, item = tokens_here(job), jnp.dtype(model.precision.compute).itemsize
    if remat in REMATERIALISED:
        inputs = model.num_layers * tokens * model.d_model * item
        heads = model.num_layers * tokens * model.num_heads // mesh.tensor
        attention = heads * (model.head_dim * item + 4) if remat in KEEPS_ATTENTION else 0
        return (0, inputs + attention) if remat.startswith("offload") else (inputs + attention, 0)
    here, repeats = share(model, mesh), model.num_layers // len(model.period)
    length = job.length // mesh.context
    memories = {layer: layer_memory(here, layer, tokens // length, length) for layer in set(here.period)}
    of = lambda where: repeats * sum(memories[layer].bytes(where) for layer in here.period)
    return of("device"), of("host")


def working_bytes(job: Job, held: list[Weight]) -> int:
    """What lives within a layer and at the head: the weights of the greatest layer gathered for a product, with their
    gradient in float32; that of the head, whole; and some activations of the widths of the model.
    """
    model, item = job.model, jnp.dtype(job.model.precision.compute).itemsize
    gathered = lambda layer: sum(w.size * w.gathered // w.parts for w in held if w.layer == layer)
    layer = max(map(gathered, range(len(model.period))))
    head = model.vocab_size * model.d_model // job.mesh.tensor
    widest = max(_hidden(spec.ffn) for spec in model.period) // job.mesh.tensor
    return layer * (item + 4) + head * 4 + tokens_here(job) * item * (4 * widest + 3 * model.d_model)


def _hidden(spec: FfnSpec) -> int:
    """Hidden numbers of a token."""
    if isinstance(spec, MoE):
        return spec.hidden_dim * spec.top_k + (_hidden(spec.shared) if spec.shared else 0)
    return spec.hidden_dim


def attention_flops(job: Job, layer: int, *, forward: int, backward: bool, kernels: bool = False) -> float:
    """FLOPs of one device in the attention of a layer of the period, all its repeats, in a training step.

    Args:
      forward: how often it goes forward.
      kernels: the two backward kernels of splash both compute the scores and their gradient anew: 14 N H a pair
        instead of 10.
    """
    model = job.model
    rows = job.data.batch_size / (job.mesh.batch_parts * job.mesh.context)
    pairs = rows * visible_pairs(model.period[layer].mask, job.length) * (model.num_layers // len(model.period))
    products = 4 * forward + ((14 if kernels else 10) if backward else 0)
    return products * pairs * model.num_heads * model.head_dim / job.mesh.tensor


def _training_flops(job: Job, held: list[Weight], kernels: bool) -> float:
    model, again = job.model, job.model.remat in REMATERIALISED
    tokens, total = tokens_here(job) * job.train.accumulate, 0.0
    for w in held:
        cut = w.parts // w.gathered
        if 0 < w.used < 1:
            cut = job.mesh.tensor  # tokens travel to experts, or experts to tokens: the products are the same
        total += tokens * w.size * w.repeats * w.used / cut * (8 if again and w.layer is not None else 6)
    turns = 2 if again and model.remat not in KEEPS_ATTENTION else 1
    attention = lambda i: attention_flops(job, i, forward=turns, backward=True, kernels=kernels)
    return total + sum(map(attention, range(len(model.period))))


def _optimizer(job: Job, parameters: int, item: int) -> tuple[int, int]:
    config = job.train.optimizer
    if config.algorithm.kind == "adamw" and config.state == type(config.state)() and config.trainable == ("*",):
        averaged = 0 if config.ema_decay is None else parameters // item * 4
        return parameters // item * 8 + averaged, 0
    abstract, shardings = state_shardings(job.model, make_optimizer(config, job.train.steps), abstract_mesh(job.mesh))
    sizes = {False: 0, True: 0}
    trees = (abstract.opt_state, shardings.opt_state), (abstract.averaged, shardings.averaged)
    for leaves, places in trees:
        for leaf, place in zip(jax.tree.leaves(leaves), jax.tree.leaves(places), strict=True):
            size = math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            sizes["host" in (place.memory_kind or "")] += size
    return sizes[False], sizes[True]


def _cache(job: Job) -> int:
    rows, mesh = job.rows // job.mesh.batch_parts, job.mesh
    total = 0
    for kind in cache_bytes(job.cached_model, replace(job.cache, batch=rows)):
        cut = mesh.context if kind.mask.reach is None else 1
        total += (kind.keys_values + kind.scales) // (cut * mesh.tensor) + kind.coordinates // cut
    return total + 8 * rows


def _training_traffic(job: Job, held: list[Weight], parameters: int, moments: int, kept: int) -> float:
    """Bytes between the chip and its memory at least: weights in each pass, the update, what is kept, twice each."""
    item = jnp.dtype(job.model.precision.compute).itemsize
    passes = 3 if job.model.remat in REMATERIALISED else 2
    whole = sum(w.size * w.repeats / (w.parts / w.gathered) for w in held if w.used)
    return job.train.accumulate * (passes + 1) * 2 * whole * item + 3 * parameters + 2 * moments + 2.0 * kept


def _send_weights(job: Job, send, *, scatters: bool) -> None:
    """Weights gathered for each pass, gradients summed: where the mesh cuts or repeats them.

    As compilers do it: pieces that do not fill lanes are gathered as a sum of whole arrays that are zero elsewhere, and
    a gradient is summed whole and then cut. Both cost twice the bytes of what was asked for. Only in the layers, where
    one axis cuts into whole lanes, a reduce-scatter sums a gradient for what it asks.
    """
    model, mesh, compute = job.model, job.mesh, jnp.dtype(job.model.precision.compute).itemsize
    stored = jnp.dtype(model.precision.params).itemsize
    again = 2 if model.remat in REMATERIALISED and model.num_layers > len(model.period) else 1
    for w in weights(model, mesh):
        here = w.size * w.repeats / (w.parts / w.gathered)
        rest = (w.gathered - 1) / w.gathered
        if w.gathered > 1:
            passes = again if w.layer is not None else 1
            lanes = model.d_model // w.gathered % LANES == 0
            kind, times = ("all-gather", 1) if lanes else ("all-reduce", 2)
            send(w.layer, kind, job.train.accumulate * passes * here * compute * rest * times)
            one_axis = 1 in (mesh.fsdp, mesh.context)
            scatter = scatters and lanes and one_axis and w.layer is not None
            kind, times = ("reduce-scatter", 1) if scatter else ("all-reduce", 2)
            send(w.layer, kind, job.train.accumulate * here * compute * rest * times)
        n = w.summed
        if n > 1:
            kind = "all-reduce"
            send(w.layer, kind, 2 * (n - 1) / n * here / w.gathered * (compute if w.layer is not None else stored))


def decisions(job: Job) -> list[Decision]:
    """How attention of each layer of the period spans devices."""
    model, data, mesh = job.model, job.data, job.mesh
    shape = CallShape(
        parts=mesh.context, q_length=job.length, k_length=job.length, query_heads=model.num_heads // mesh.tensor,
        key_heads=model.num_kv_heads // mesh.tensor, width=model.head_dim,
        itemsize=jnp.dtype(model.precision.compute).itemsize,
        batch=data.batch_size // (job.train.accumulate * mesh.batch_parts),
    )  # fmt: skip
    layout = ContextLayout(model.context.layout, mesh.context)
    promises = Promises(data.packing.document_multiple)
    return [decide(layer.mask, shape, layout, promises, model.context) for layer in model.period]


def _send_attention(job: Job, send) -> None:
    if job.mesh.context == 1:
        return
    kinds = {"ring": "collective-permute", "direct": "collective-permute", "halo": "collective-permute"}
    kinds |= {"gather": "all-gather"}
    turns = 1 if job.model.remat in KEEPS_ATTENTION else 2
    repeats = job.train.accumulate * (job.model.num_layers // len(job.model.period))
    for i, one in enumerate(decisions(job)):
        forward, backward = one.forward_bytes + one.coordinate_bytes, one.backward_bytes + one.coordinate_bytes
        if one.kind != "all_to_all":
            send(i, kinds.get(one.kind, one.kind), repeats * (turns * forward + backward))
            continue
        mine = one.gather_forward_bytes / max(job.mesh.context - 1, 1) * one.hops
        send(i, "collective-permute", repeats * (turns + 2 * (one.hops > 0)) * mine)
        send(i, "all-to-all", repeats * max(turns * forward + backward - (turns + 2) * mine, 0.0))


def _send_tokens(job: Job, send) -> None:
    """What activations cost: sums over `tensor`, tokens to experts and back, the look-up of the embedding."""
    model, mesh, item = job.model, job.mesh, jnp.dtype(job.model.precision.compute).itemsize
    tokens, repeats = tokens_here(job) * job.train.accumulate, model.num_layers // len(model.period)
    stream = tokens * model.d_model * item
    again = model.remat in REMATERIALISED
    if mesh.tensor > 1:
        share_of = 2 * (mesh.tensor - 1) / mesh.tensor
        for i, layer in enumerate(model.period):
            parts = 2 + (isinstance(layer.ffn, MoE) and layer.ffn.shared is not None)
            send(i, "all-reduce", repeats * stream * share_of * (2 * parts + (parts - 1) * again))
        send(None, "all-reduce", 2 * stream * share_of)
    embed = mesh.fsdp * mesh.context
    if embed > 1:
        send(None, "all-to-all", 2 * stream * (embed - 1) / embed)
    if mesh.expert > 1:
        for i, layer in enumerate(model.period):
            if isinstance(layer.ffn, MoE):
                _send_experts(job, send, i, layer.ffn, tokens, repeats)


def _send_experts(job: Job, send, i: int, spec: MoE, tokens: int, repeats: int) -> None:
    """As `model.moe` chooses: rows there and back, or the weights of other devices' experts."""
    model, mesh, item = job.model, job.mesh, jnp.dtype(job.model.precision.compute).itemsize
    passes, rest = (3 if model.remat in REMATERIALISED else 2), (mesh.expert - 1) / mesh.expert
    rows = 2 * tokens // job.train.accumulate * spec.top_k
    if spec.exchange == "tokens" or (spec.exchange == "auto" and rows < 3 * spec.hidden_dim * spec.num_experts):
        send(i, "ragged-all-to-all", repeats * passes * 2 * tokens * spec.top_k * model.d_model * item)
        return
    whole = 3 * spec.hidden_dim * spec.num_experts * model.d_model / mesh.tensor * item * repeats * rest
    send(i, "all-gather", (passes - 1) * whole)
    send(i, "reduce-scatter", whole)


def _send_cached(job: Job, send) -> None:
    model, mesh, item = job.model, job.mesh, jnp.dtype(job.model.precision.compute).itemsize
    rows = job.rows // mesh.batch_parts
    queries = rows * (job.piece if job.mode == "prefill" else 1)
    repeats = model.num_layers // len(model.period)
    for w in weights(model, _weights_mesh(job)):
        if w.gathered > 1:
            here = w.size * w.repeats / (w.parts / w.gathered)
            send(w.layer, "all-gather", here * item * (w.gathered - 1) / w.gathered)
    if mesh.fsdp > 1:
        send(None, "all-gather", queries * model.d_model * item * (1 - 1 / mesh.fsdp))
    if mesh.tensor > 1:  # the table is cut by words, and looked up in the type it has
        stored = jnp.dtype(model.precision.params).itemsize
        send(None, "all-reduce", 2 * (1 - 1 / mesh.tensor) * queries * model.d_model * stored)
    others = (mesh.context - 1) / mesh.context
    for i, layer in enumerate(model.period):
        heads, key_heads = model.num_heads // mesh.tensor, model.num_kv_heads // mesh.tensor
        partials = repeats * queries * heads * (model.head_dim + 2) * 4 * others if layer.mask.reach is None else 0
        if job.mode == "decode":
            send(i, "all-reduce", 2 * partials)
        elif mesh.context > 1:  # each device has its part of a piece, and asks the keys of all
            gathered = 2 * key_heads + (heads if layer.mask.reach is None else 0)
            send(i, "all-gather", repeats * queries * gathered * model.head_dim * item * others)
            send(i, "reduce-scatter", partials)
        if mesh.tensor > 1:
            send(i, "all-reduce", repeats * 2 * queries * model.d_model * item * 2 * (mesh.tensor - 1) / mesh.tensor)
