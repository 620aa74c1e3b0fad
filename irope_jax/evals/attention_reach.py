"""How far each layer looks, head by head: distance, first tokens, last tokens, evenness of its attention.

A mask says how far a layer may look; this says how far it does. The probabilities are those of the model on held-out
text, computed exactly (`attention.statistics`). Great mass on the first tokens is an attention sink (arXiv 2309.17453):
often a head's way to look at nothing, so that its mean distance says little. No evidence of retrieval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from irope_jax.attention.statistics import Attending, AttentionStatistics, attention_statistics
from irope_jax.core.config import ConfigError
from irope_jax.core.hosts import is_main_process, to_host
from irope_jax.core.progress import ProgressBar
from irope_jax.core.types import PAD_SEGMENT, Batch
from irope_jax.data.pipeline import eval_text
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.evals.evaluator import Measurement
from irope_jax.evals.forward import on_mesh, rows_per_batch
from irope_jax.evals.perplexity import check_lengths, position_buckets
from irope_jax.model.config import ModelConfig
from irope_jax.model.decoder import observed_attention

MEASURES = ("distance", "sink_mass", "recent_mass", "entropy", "entropy_share")
"""What is measured of a head, in the order of the arrays."""


@dataclass(frozen=True)
class AttentionReach:
    """Statistics of attention, means over queries.

    Measures, per `length`, `layer` and `head` (from 0; `where` also says `mask` and `position`, the kinds of the
    layer's):

    - `distance`: tokens from the query back to what it looks at, weighted by probability;
    - `sink_mass`: probability of the first `sinks` tokens of the document (on chunked layers, of the chunk), over the
      queries that see more than those;
    - `recent_mass`: probability of the last `recent` tokens, the query's own included, over the queries that see more;
    - `entropy` in nats, and `entropy_share`, its part of `log(visible keys)`, over queries that see more than one.

    `even_distance`, `even_sink_mass` and `even_recent_mass` (per length and layer) are those of attention that gives
    the same to all it may see. Each of the five again by position: `NAME_by_position`, `from` … `to - 1`, in buckets.
    What no query can have is not measured: `recent_mass` in chunks of `recent` tokens.

    Attributes:
      name: label in the records.
      source: the text; held out from training.
      lengths: window lengths in tokens; each window is a document.
      windows: how many windows of each length.
      sinks: first tokens of a document or chunk.
      recent: last tokens.
      by_position: whose curves by position are recorded: of `layers` (means over heads) or of `heads`.
      bucket: width of the position buckets; None lets them double: 1, 1, 2, 4, 8 …
      block: queries whose probabilities exist at a time.
      batch_tokens: tokens of one forward pass.
    """

    kind: ClassVar[str] = "attention_reach"
    name: str = "attention_reach"
    source: SourceSpec = Corpus("validation")
    lengths: tuple[int, ...] = (1024,)
    windows: int = 4
    sinks: int = 4
    recent: int = 64
    by_position: Literal["layers", "heads"] = "layers"
    bucket: int | None = None
    block: int = 128
    batch_tokens: int = 4096

    def __post_init__(self):
        check_lengths(self.lengths)
        for field in ("windows", "sinks", "recent", "block", "batch_tokens"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "must be at least 1")
        if self.bucket is not None and self.bucket < 1:
            raise ConfigError("bucket", self.bucket, "positions of a bucket; use 1 or more, or None")
        if self.by_position not in ("layers", "heads"):
            raise ConfigError("by_position", self.by_position, "choose one of: layers, heads")

    def check(self, tokenizer: TokenizerSpec) -> None:
        """Nothing that can be known without reading the text."""

    def build(self, model: ModelConfig, tokenizer: TokenizerSpec) -> AttentionReachEvaluator:
        return AttentionReachEvaluator(self, model, tokenizer)


class AttentionReachEvaluator:
    """`AttentionReach` built for one model and tokenizer."""

    def __init__(self, spec: AttentionReach, model: ModelConfig, tokenizer: TokenizerSpec):
        self.spec, self.name, self._model, self._tokenizer = spec, spec.name, model, tokenizer
        for length in spec.lengths:  # too little text is said before a run, not in the middle of it
            try:
                eval_text(spec.source, tokenizer, length, spec.windows)
            except ConfigError as error:
                if error.field != "count":
                    raise
                raise ConfigError(f"config.evals.{spec.name}.windows", spec.windows, error.fix) from None

    def run(self, params: Any) -> Iterator[Measurement]:
        spec = self.spec
        with ProgressBar(self.name, spec.windows * len(spec.lengths), quiet=not is_main_process()) as bar:
            for length in spec.lengths:
                buckets = position_buckets(length, spec.bucket)
                observe, totals, left = observing(self._model, spec, buckets), None, spec.windows
                rows = rows_per_batch(spec.batch_tokens, length)
                for batch in eval_text(spec.source, self._tokenizer, length, spec.windows, batch_size=rows):
                    found = [jax.tree.map(_exactly, sums) for sums in observe(params, on_mesh(batch))]
                    totals = found if totals is None else jax.tree.map(np.add, totals, found)
                    bar.advance(min(rows, left), length=f"{length:,}")
                    left -= rows
                yield from self._measurements(length, buckets, totals)

    def _measurements(self, length: int, buckets: list[tuple[int, int]], totals: list[Sums]) -> Iterator[Measurement]:
        period, by_heads = self._model.period, self.spec.by_position == "heads"
        for number, layer in enumerate(self._model.layers):
            value_MNP, even_EP, count_MP = (x[number // len(period)] for x in totals[number % len(period)])
            about = {"length": length, "layer": number, "mask": layer.mask.kind, "position": layer.position.kind}
            heads = range(value_MNP.shape[1])
            for m, measure in enumerate(MEASURES):
                count = count_MP[m].sum()
                if m < len(even_EP):
                    yield from _mean(f"even_{measure}", even_EP[m].sum(), count, about)
                for head in heads:
                    yield from _mean(measure, value_MNP[m, head].sum(), count, about | {"head": head})
                for whose in ((head,) for head in heads) if by_heads else (heads,):
                    which = about | ({"head": whose[0]} if by_heads else {})
                    for p, (low, high) in enumerate(buckets):
                        total, count_here = value_MNP[m, list(whose), p].sum(), count_MP[m, p] * len(whose)
                        yield from _mean(f"{measure}_by_position", total, count_here, which | {"from": low, "to": high})


Sums = tuple[Any, Any, Any]
"""Of one layer, per bucket of positions P: `[M, N, P]` of each measure and head, `[E, P]` of even
attention for the first E measures, `[M, P]` numbers of queries."""


def _exactly(x: jax.Array) -> np.ndarray:
    return to_host(x).astype(np.float64)


def _mean(name: str, total: float, count: float, where: dict) -> Iterator[Measurement]:
    if count:
        yield Measurement(name, float(total / count), int(count), where)


def observing(
    model: ModelConfig, spec: AttentionReach, buckets: list[tuple[int, int]]
) -> Callable[[Any, Batch], tuple[Sums, ...]]:
    """`(params, batch) -> Sums` of each layer of the period, stacked over its repeats; jitted."""
    edges = [low for low, _ in buckets[1:]]

    def observe(of: Attending) -> Sums:
        found = attention_statistics(of, sinks=spec.sinks, recent=spec.recent, block=spec.block)
        real_BT = of.info.segments != PAD_SEGMENT
        place_BT = jnp.searchsorted(jnp.asarray(edges, jnp.int32), of.info.positions, side="right")
        place_BTP = jax.nn.one_hot(jnp.where(real_BT, place_BT, -1), len(buckets), dtype=jnp.float32)
        return sums_by_place(found, place_BTP, spec)

    def run(params: Any, batch: Batch) -> tuple[Sums, ...]:
        return observed_attention(model, params, batch.tokens, batch.info, observe)

    return jax.jit(run)


def sums_by_place(found: AttentionStatistics, place_BTP: jax.Array, spec: AttentionReach) -> Sums:
    """Sums over the queries of each place; a measure leaves out queries for which it could only be 1."""
    some, more = found.visible >= 1, found.visible > 1
    share = found.entropy / jnp.log(jnp.maximum(found.visible, 2).astype(jnp.float32))[..., None]
    values = (found.distance, found.sink_mass, found.recent_mass, found.entropy, share)
    evens = (found.even_distance, found.even_sink_mass, found.even_recent_mass)
    asked = (some, found.visible > spec.sinks, found.visible > spec.recent, some, more)
    asked_MBTP = jnp.stack([which[..., None] * place_BTP for which in asked])
    product = lambda how, *xs: jnp.einsum(how, *xs, precision="highest")
    return (
        product("MBTN,MBTP->MNP", jnp.stack(values), asked_MBTP),
        product("MBT,MBTP->MP", jnp.stack(evens), asked_MBTP[: len(evens)]),
        asked_MBTP.sum((1, 2)),
    )
