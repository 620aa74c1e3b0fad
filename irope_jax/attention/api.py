"""The one door to attention on one device: picks an implementation or obeys, says which, never falls back silently."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from irope_jax.attention import blockwise
from irope_jax.attention.kernels import cudnn, splash
from irope_jax.attention.kernels.chunks import run_length
from irope_jax.attention.mask import Chunked, Global, MaskSpec, Sliding
from irope_jax.attention.panels import Pieces, Relation
from irope_jax.attention.reference import attend_reference
from irope_jax.core.config import ConfigError, nearest
from irope_jax.core.types import Array, TokenInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """What is known of a call while tracing; implementations say by it what they cannot do.

    Attributes:
      slopes: whether ALiBi is asked for.
      offset: row of the first query minus row of the first key, both in row order; `None` if that is not promised.
      platform: `cpu`, `tpu` or `gpu`: of the mesh in force, else the default one.
      shared: some mesh axis of several devices is left to the compiler (not inside a `shard_map` over it).
      runs: places per chunk where chunks fold into the batch (`kernels.chunks.run_length`).
      single: each row, or each chunk that folds, is promised to be one document and padding after it.
      relations: of the panels, if pieces are asked for (`choose_pieces`); `offset` is then unknown.
    """

    batch: int
    q_length: int
    k_length: int
    query_heads: int
    key_heads: int
    width: int
    dtype: str
    mask: MaskSpec
    slopes: bool
    offset: int | None = None
    platform: str = "cpu"
    shared: bool = False
    runs: int | None = None
    single: bool = False
    relations: tuple[Relation, ...] = ()


@dataclass(frozen=True)
class Implementation:
    """A row of the table.

    Attributes:
      run: the function; arguments of `attend` without `impl`, `scale` given.
      refuses: why a case cannot be done, or `None` if it can.
      chosen: whether to take it when nobody asks for one; the first row that says yes and does not refuse wins.
      pieces: how it folds over pieces of keys, if it can.
    """

    run: Callable[..., Array]
    refuses: Callable[[Case], str | None]
    chosen: Callable[[Case], bool]
    pieces: Pieces | None = None


def _splash_refuses(case: Case) -> str | None:
    return splash.refuses(
        platform=case.platform, width=case.width, mask=case.mask, slopes=case.slopes, shared=case.shared,
        offset=case.offset, lengths=(case.q_length, case.k_length), relations=case.relations,
    )  # fmt: skip


def _cudnn_refuses(case: Case) -> str | None:
    return cudnn.refuses(
        platform=case.platform, dtype=case.dtype, width=case.width, mask=case.mask, slopes=case.slopes,
        offset=case.offset, lengths=(case.q_length, case.k_length), runs=case.runs, single=case.single,
    )  # fmt: skip


IMPLEMENTATIONS: dict[str, Implementation] = {
    "splash": Implementation(
        splash.attend_splash, _splash_refuses, chosen=lambda case: case.platform == "tpu", pieces=splash.PIECES
    ),
    "cudnn": Implementation(cudnn.attend_cudnn, _cudnn_refuses, chosen=lambda case: case.platform == "gpu"),
    "blockwise": Implementation(
        blockwise.attend_blockwise, refuses=lambda case: None, chosen=lambda case: True, pieces=blockwise.PIECES
    ),
    "reference": Implementation(attend_reference, refuses=lambda case: None, chosen=lambda case: False),
}


def attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    mask: MaskSpec,
    *,
    scale: float | None = None,
    slopes: Array | None = None,
    impl: str | None = None,
) -> Array:
    """Attention of queries to the keys that `mask` lets them see.

    A query that sees nothing (padding, for one) gets exactly 0. Softmax and sums are float32 whatever the inputs are.

    Args:
      q_BTNH: queries `[B, T, N, H]`, already rotated.
      k_BSKH, v_BSKH: keys and values `[B, S, K, H]`; N is a multiple of K, query head `n` reads key head `n // (N/K)`.
      q_info, k_info: coordinates `[B, T]` and `[B, S]`. Their static promises (`first_row`, `document_multiple`) let
        invisible blocks be left out while tracing; without them they are skipped at run time.
      mask: `Global`, `Chunked` or `Sliding`.
      scale: factor on the scores; `None` means `H ** -0.5`.
      slopes: float32 `[N]`, ALiBi: adds `-slope * (row_q - row_k)`. Constants: no gradient flows to them.
      impl: name of a row of `IMPLEMENTATIONS`; `None` chooses the first that is meant for the case.

    Returns:
      `[B, T, N, H]` in the type of `q_BTNH`. Differentiable in q, k and v.

    Raises:
      ConfigError: shapes that do not fit, or an implementation that does not exist or cannot do the case.
    """
    case = _case(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, mask, slopes)
    name = _choose(case, impl)
    scale = case.width**-0.5 if scale is None else float(scale)
    return IMPLEMENTATIONS[name].run(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, mask, scale=scale, slopes=slopes)


def choose_pieces(
    q_BTNH: Array,
    k_BSKH: Array,
    mask: MaskSpec,
    relations: Iterable[Relation],
    *,
    slopes: Array | None = None,
    impl: str | None = None,
) -> tuple[str, Pieces]:
    """Name and functions of the implementation that is to fold panels (`attention.panels`) of such relations.

    Args:
      q_BTNH, k_BSKH: shapes and types of what is folded at a time (arrays or `ShapeDtypeStruct`s), per device; in this
        order whatever order the kernel wants.
      relations: of all panels that will be folded with what is returned.
      impl: name of a row of `IMPLEMENTATIONS`; `None` chooses the first that is meant for the case.

    Raises:
      ConfigError: an implementation that does not exist, folds no pieces, or cannot do these.
    """
    (b, t, n, h), (_, s, kv, _) = q_BTNH.shape, k_BSKH.shape
    platform, shared = _surroundings()
    case = Case(
        b, t, s, n, kv, h, str(q_BTNH.dtype), mask, slopes is not None, platform=platform, shared=shared,
        relations=tuple(sorted(set(relations))),
    )  # fmt: skip
    name = _choose(case, impl)
    return name, IMPLEMENTATIONS[name].pieces


def _surroundings() -> tuple[str, bool]:
    """Platform that is traced for, and whether some mesh axis of several devices is left to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_sizes, mesh.axis_types)
    return splash.platform(), any(size > 1 and kind != AxisType.Manual for size, kind in axes)


def _case(q, k, v, q_info, k_info, mask, slopes) -> Case:
    if not isinstance(mask, (Global, Chunked, Sliding)):
        raise ConfigError("mask", mask, "give a mask: Global(), Chunked(size) or Sliding(size)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ConfigError(f"{name}.shape", x.shape, "expected 4 axes: batch, place, head, width")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ConfigError(f"{name}.dtype", str(x.dtype), "attention works on floating-point numbers; cast first")
    (b, t, n, h), (_, s, kv, _) = q.shape, k.shape
    if k.shape != (b, s, kv, h):
        raise ConfigError("k.shape", k.shape, f"batch {b} and head width {h} of q {q.shape} must agree")
    if v.shape != k.shape:
        raise ConfigError("v.shape", v.shape, f"must equal the shape of k, {k.shape}")
    if n % kv:
        raise ConfigError("k.shape", k.shape, f"{n} query heads cannot share {kv} key heads; make one divide the other")
    for name, info, shape in (("q_info", q_info, (b, t)), ("k_info", k_info, (b, s))):
        for part in ("positions", "segments", "rows"):
            if getattr(info, part).shape != shape:
                raise ConfigError(f"{name}.{part}.shape", getattr(info, part).shape, f"expected {shape}")
    if slopes is not None and slopes.shape != (n,):
        raise ConfigError("slopes.shape", slopes.shape, f"one slope per query head: expected ({n},)")
    if 0 in (b, t, s):
        raise ConfigError("q.shape", (b, t, n, h), f"nothing to attend: batch {b}, {t} queries, {s} keys")
    ordered = q_info.first_row is not None and k_info.first_row is not None
    offset = q_info.first_row - k_info.first_row if ordered else None
    platform, shared = _surroundings()
    return Case(
        b, t, s, n, kv, h, str(q.dtype), mask, slopes is not None, offset, platform, shared,
        run_length(mask, q_info, k_info), cudnn.one_document(mask, q_info, k_info),
    )  # fmt: skip


def _refuses(row: Implementation, case: Case) -> str | None:
    if case.relations and row.pieces is None:
        return "it does not fold over pieces of keys"
    return row.refuses(case)


@lru_cache(maxsize=1024)
def _choose(case: Case, impl: str | None) -> str:
    """Cached, so that each distinct case is logged once."""
    if impl is None:
        name = next(n for n, row in IMPLEMENTATIONS.items() if row.chosen(case) and _refuses(row, case) is None)
    elif impl not in IMPLEMENTATIONS:
        raise ConfigError("impl", impl, f"unknown implementation; {nearest(impl, IMPLEMENTATIONS)}")
    elif (reason := _refuses(IMPLEMENTATIONS[impl], case)) is not None:
        raise ConfigError("impl", impl, f"cannot do this case: {reason}")
    else:
        name = impl
    level = logging.DEBUG if impl else logging.INFO  # who asks for one knows
    log.log(level, "attention: %s (%s) for %s", name, "asked for" if impl else "chosen", case)
    return name
