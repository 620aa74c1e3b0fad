"""Which way a layer's attention spans devices, and what it sends: one pure decision from mask, shape and promises.

The mask decides: one that never looks across the border of what a device holds costs nothing, one that looks a little
way costs a halo, one that sees everything costs a ring or an exchange of heads. Byte formulas are written here once;
logging, the planner and tables read them from `Decision`. Nothing here touches an array or a mesh.

    K V bytes per token: kappa = 2 K H e      tokens per device: s = T / P      gradients: kappa' = 2 K H (4 or e)

    way              forward                                        backward
    local            0                                              0
    halo of L        L kappa per run                                L kappa per run
    ring             (P-1) s kappa                                  (P-1) s (kappa + kappa')
    direct           3/4 of a ring in zigzag, 1/2 in contiguous     the same share
    all_to_all u     (2N + 2K) H e s (u-1)/u + (P/u - 1) s kappa    the same, with kappa + kappa'
    gather           (P-1) s kappa                                  (P-1) s kappa
    split_keys       2 (P-1)/P N (H+2) 4 per query                  -
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

from irope_jax.attention.mask import Chunked, MaskSpec
from irope_jax.context.layout import ContextLayout
from irope_jax.core.config import ConfigError
from irope_jax.core.types import TokenInfo

Kind = Literal["local", "halo", "ring", "direct", "all_to_all", "gather", "split_keys"]
Order = Literal["zigzag", "contiguous"]
Far = Literal["auto", "ring", "direct", "all_to_all", "gather"]
Near = Literal["auto", "local", "halo", "ring", "all_to_all", "gather"]
Gradients = Literal["float32", "keys"]

NO_ORDER = "needs the order of the tokens, which the coordinates do not promise; place the batch, or set this to auto"


@dataclass(frozen=True)
class ContextConfig:
    """How attention spans the devices of the context axis.

    Attributes:
      layout: order of tokens on devices; `zigzag` gives layers that see everything equal work on every device.
      far: way of the layers that see their whole document; `auto` sends the fewest bytes of the ways that every network
        likes: `direct`, a ring that sends only what is needed, has to be asked for.
      near: way of the layers with a reach (chunks, windows); `auto` sends the fewest bytes, nothing where it can.
      gradients: number format in which a ring sends gradients of keys and values home; `keys` is that of the keys: half
        the bytes in bfloat16, and a rounding per hop, so that their error grows with the ring (to 2.7 times at 16
        devices, `scripts/check_ring_error.py --gradients keys`). Every other way sends them in the format of the keys.
    """

    layout: Order = "zigzag"
    far: Far = "auto"
    near: Near = "auto"
    gradients: Gradients = "float32"

    def __post_init__(self):
        for field, choices in (("layout", Order), ("far", Far), ("near", Near), ("gradients", Gradients)):
            if (value := getattr(self, field)) not in get_args(choices):
                raise ConfigError(field, value, f"choose one of: {', '.join(get_args(choices))}")


@dataclass(frozen=True)
class CallShape:
    """Sizes of one call, known while tracing.

    Attributes:
      parts: devices along the context axis.
      q_length, k_length: queries and keys of the whole sequence. Equal: every token is both, and both are cut.
        Different: decoding, queries are whole on every device and keys are cut.
      query_heads, key_heads: heads that one device computes, after the tensor axis has taken its share.
      width: of a head.
      itemsize: bytes per number of queries, keys and values.
      batch: rows that one device holds.
    """

    parts: int
    q_length: int
    k_length: int
    query_heads: int
    key_heads: int
    width: int
    itemsize: int
    batch: int = 1

    @property
    def decoding(self) -> bool:
        return self.q_length != self.k_length

    @property
    def piece(self) -> int:
        """Tokens per device, over all its rows."""
        return self.batch * self.k_length // self.parts

    @property
    def kappa(self) -> int:
        """Bytes of keys and values per token."""
        return 2 * self.key_heads * self.width * self.itemsize


@dataclass(frozen=True)
class Promises:
    """What `TokenInfo` promises of the coordinates, whatever their order."""

    document_multiple: int = 1
    unbroken: bool = False

    @classmethod
    def of(cls, *infos: TokenInfo) -> Promises:
        """What all of `infos` promise."""
        return cls(math.gcd(*(info.document_multiple for info in infos)), all(info.unbroken for info in infos))


@dataclass(frozen=True)
class Decision:
    """The way of one layer, and what it sends.

    Attributes:
      kind: the way. `all_to_all` with `group < parts` is its product with a ring over `parts / group` groups.
      mask: of the layer.
      layout: order of the tokens; `None` if unknown.
      halo: rows that each run of a device needs before its own.
      group: neighbouring devices that exchange heads for sequence; 1 elsewhere.
      hops: transfers to a neighbour that follow one another.
      forward_bytes, backward_bytes: queries, keys, values, outputs and their gradients that one device sends.
      coordinate_bytes: segments and positions that one device sends forward; rows are computed if the order is known.
      gather_forward_bytes, gather_backward_bytes: what an all-gather of keys and values would send instead.
      contiguous_bytes: what the same halo would send forward if pieces were contiguous.
      why: a sentence.
      fell_back: why the cheap way of such a mask is not taken; `None` if it is, or if the config asked for another.
    """

    kind: Kind
    mask: MaskSpec
    layout: ContextLayout | None
    why: str
    halo: int = 0
    group: int = 1
    hops: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    coordinate_bytes: int = 0
    gather_forward_bytes: int = 0
    gather_backward_bytes: int = 0
    contiguous_bytes: int = 0
    fell_back: str | None = None

    @property
    def total_bytes(self) -> int:
        return self.forward_bytes + self.backward_bytes

    def describe(self) -> str:
        """One line: what the layer does and what it sends."""
        parts = self.hops + 1 if self.layout is None else self.layout.parts
        way = {
            "local": "local",
            "halo": f"halo of {self.halo} tokens",
            "ring": f"ring over {parts} devices",
            "direct": f"keys straight to those of {parts} devices that see them",
            "all_to_all": f"all-to-all over {self.group} devices",
            "gather": "all-gather of keys",
            "split_keys": "keys stay, partial results merge",
        }[self.kind]
        if self.kind == "all_to_all" and self.hops:
            way += f" x ring over {self.hops + 1} groups"
        sent = "nothing is sent"
        if self.total_bytes:
            sent = f"{megabytes(self.forward_bytes)} per layer forward"
            if self.backward_bytes == self.forward_bytes:
                sent += ", as much backward"
            elif self.backward_bytes:
                sent += f", {megabytes(self.backward_bytes)} backward"
        aside = ""
        if self.kind == "halo" and self.layout.runs_per_piece == 2:
            less = "half" if 2 * self.contiguous_bytes == self.forward_bytes else megabytes(self.contiguous_bytes)
            aside = f" (zigzag; contiguous would send {less if self.contiguous_bytes else 'nothing'})"
        return f"{mask_name(self.mask)}: {way}, {sent}{aside}"


def mask_name(mask: MaskSpec) -> str:
    """`global`, `chunked 8192`, `sliding 4096`."""
    return mask.kind if mask.reach is None else f"{mask.kind} {mask.size}"


def megabytes(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def halo_length(mask: MaskSpec, length: int, run: int, document_multiple: int) -> int:
    """Rows before its own that some run of `run` rows may see: 0 if no query sees across the border of its run.

    Args:
      mask: of the layer.
      length: rows of the whole sequence, a multiple of `run`.
      document_multiple: promise of `TokenInfo`.
    """
    if mask.reach is None:
        return length - run
    aligned = mask.borders_known(document_multiple)
    return max((first - max(mask.lowest_row(first, aligned), 0) for first in range(run, length, run)), default=0)


def decide(
    mask: MaskSpec, shape: CallShape, layout: ContextLayout | None, promises: Promises, config: ContextConfig
) -> Decision:
    """The way of a layer with this mask.

    Args:
      layout: order in which the sequence lies on the devices; `None` if the coordinates promise none.
      promises: what is known of documents.
      config: may force a way.

    Raises:
      ConfigError: the sequence cannot be cut so, or the config forces a way that is impossible here.
    """
    if shape.parts == 1:
        return Decision("local", mask, layout, "one device holds the whole sequence")
    if shape.decoding:
        return _decide_decoding(mask, shape, layout)
    if layout is not None:
        layout.check(shape.k_length)
    ways = _Ways(mask, shape, layout, promises, config)
    return _far(ways, config.far) if mask.reach is None else _near(ways, config.near)


def _decide_decoding(mask, shape, layout) -> Decision:
    gathered = _share(shape.batch * shape.k_length * shape.kappa, shape.parts)
    if mask.reach is not None and shape.k_length <= mask.reach:
        why = f"the cache holds no more than the reach of {mask.reach}, whole on every device"
        return Decision("local", mask, layout, why, gather_forward_bytes=gathered)
    partials = shape.batch * shape.q_length * shape.query_heads * (shape.width + 2) * 4
    why = "queries are few: every device attends to the keys it holds, and what they find is merged"
    return Decision(
        "split_keys", mask, layout, why, hops=1, forward_bytes=2 * _share(partials, shape.parts),
        gather_forward_bytes=gathered,
    )  # fmt: skip


def _far(ways: _Ways, wish: str) -> Decision:
    if wish != "auto":
        return ways.forced("far", wish)
    if ways.layout is None:
        return ways.unknown_order()
    options = [ways.ring("fewest bytes"), *ways.all_to_all("fewest bytes")]
    if ways.keys_are_small:
        options.append(ways.gather("the gathered keys are no bigger than a device's queries, and travel once"))
    return min(options, key=lambda d: d.total_bytes)


def _near(ways: _Ways, wish: str) -> Decision:
    mask, layout = ways.mask, ways.layout
    if wish not in ("auto", "local", "halo"):
        return ways.forced("near", wish)
    if layout is None:
        if wish != "auto":
            raise ConfigError("context.near", wish, NO_ORDER)
        return ways.unknown_order()
    if ways.halo_rows == 0:
        return ways.make("local", f"no query looks across the border of a run of {ways.run} rows")
    reason, fix = ways.not_local()
    if wish == "local":
        raise ConfigError("context.near", wish, f"impossible: {reason}; set context.near to auto or halo, or {fix}")
    why = f"queries look up to {ways.halo_rows} rows across the border of a run"
    halo = ways.halo(why, reason if isinstance(mask, Chunked) else None)
    if wish == "halo":
        return halo
    held = layout.runs_per_piece * (ways.halo_rows + ways.run)
    if held >= ways.shape.k_length:
        reason = f"runs with their halo of {ways.halo_rows} rows are {held} keys, as many as the whole sequence"
        halos = []
    else:
        reason, halos = f"a halo of {ways.halo_rows} rows sends {megabytes(halo.total_bytes)}, more than this", [halo]
    others = [ways.ring(reason, reason), *ways.all_to_all(reason, reason)]
    return min([*halos, *others], key=lambda d: d.total_bytes)


@dataclass(frozen=True)
class _Ways:
    """What each way would send."""

    mask: MaskSpec
    shape: CallShape
    layout: ContextLayout | None
    promises: Promises
    config: ContextConfig

    @property
    def run(self) -> int:
        return self.shape.k_length // self.layout.multiple

    @property
    def halo_rows(self) -> int:
        return halo_length(self.mask, self.shape.k_length, self.run, self.promises.document_multiple)

    @property
    def home(self) -> int:
        """Bytes of the gradients of keys and values per token."""
        size = 4 if self.config.gradients == "float32" else self.shape.itemsize
        return 2 * self.shape.key_heads * self.shape.width * size

    @property
    def keys_are_small(self) -> bool:
        return 2 * self.shape.parts * self.shape.key_heads <= self.shape.query_heads

    @property
    def coordinates(self) -> int:
        """Bytes of coordinates per token that must travel."""
        if self.layout is None:
            return 12
        if self.promises.unbroken:
            return 0
        return 8 if getattr(self.mask, "by", None) == "document" else 4

    def make(self, kind: Kind, why: str, fell_back: str | None = None, **sizes) -> Decision:
        gathered = self.around * self.shape.kappa
        return Decision(
            kind, self.mask, self.layout, why, fell_back=fell_back,
            gather_forward_bytes=gathered, gather_backward_bytes=gathered, **sizes,
        )  # fmt: skip

    @property
    def around(self) -> int:
        """Tokens that a device sends so that its piece has been everywhere."""
        return (self.shape.parts - 1) * self.shape.piece

    def ring(self, why: str, fell_back: str | None = None) -> Decision:
        sent = self.around
        return self.make(
            "ring", why, fell_back, hops=self.shape.parts - 1, forward_bytes=sent * self.shape.kappa,
            backward_bytes=sent * (self.shape.kappa + self.home), coordinate_bytes=sent * self.coordinates,
        )  # fmt: skip

    def direct(self, why: str, fell_back: str | None = None) -> Decision:
        """Of the pairs of devices half need a whole piece; the others need its low half in zigzag, else nothing."""
        whole = self.ring(why, fell_back)
        share = Fraction(1) if self.layout is None else Fraction(3 if self.layout.runs_per_piece == 2 else 2, 4)
        needed = {f: int(share * getattr(whole, f)) for f in ("forward_bytes", "backward_bytes", "coordinate_bytes")}
        return replace(whole, kind="direct", **needed)

    def gather(self, why: str, fell_back: str | None = None) -> Decision:
        sent, cargo = self.around * self.shape.kappa, self.around * self.coordinates
        return self.make("gather", why, fell_back, forward_bytes=sent, backward_bytes=sent, coordinate_bytes=cargo)

    def halo(self, why: str, fell_back: str | None = None) -> Decision:
        s = self.shape
        tokens = s.batch * self.layout.runs_per_piece * self.halo_rows
        contiguous = halo_length(self.mask, s.k_length, s.k_length // s.parts, self.promises.document_multiple)
        return self.make(
            "halo", why, fell_back, halo=self.halo_rows, hops=-(-self.halo_rows // self.run),
            forward_bytes=tokens * s.kappa, backward_bytes=tokens * s.kappa,
            coordinate_bytes=tokens * self.coordinates, contiguous_bytes=s.batch * contiguous * s.kappa,
        )  # fmt: skip

    def all_to_all(self, why: str, fell_back: str | None = None) -> list[Decision]:
        """One for each group of devices that divides both the parts and the key heads."""
        s, options = self.shape, []
        for group in (u for u in range(2, s.parts + 1) if math.gcd(s.parts, s.key_heads) % u == 0):
            exchange = _share((2 * s.query_heads + 2 * s.key_heads) * s.width * s.itemsize * s.piece, group)
            hops = s.parts // group - 1
            options.append(
                self.make(
                    "all_to_all", why, fell_back, group=group, hops=hops,
                    forward_bytes=exchange + hops * s.piece * s.kappa,
                    backward_bytes=exchange + hops * s.piece * (s.kappa + self.home),
                    coordinate_bytes=(group - 1 + hops * group) * s.piece * self.coordinates,
                )
            )  # fmt: skip
        return options

    def forced(self, field: str, wish: str) -> Decision:
        why = f"context.{field} asks for it"
        if wish != "all_to_all":
            return {"ring": self.ring, "direct": self.direct, "gather": self.gather}[wish](why)
        if self.layout is None:
            raise ConfigError(f"context.{field}", wish, NO_ORDER)
        options = self.all_to_all(why)
        if not options:
            s = self.shape
            fix = f"context={s.parts} and the {s.key_heads} key heads of a device have no common divisor above 1"
            raise ConfigError(f"context.{field}", wish, f"{fix}; set context.{field} to auto or ring")
        return min(options, key=lambda d: d.total_bytes)

    def unknown_order(self) -> Decision:
        why = "the coordinates promise no order of rows, so any key may be visible to any query"
        return self.ring(why, why)

    def not_local(self) -> tuple[str, str]:
        """Why queries look across borders of runs, and what to change so that they do not."""
        mask, run, multiple = self.mask, self.run, self.promises.document_multiple
        if not isinstance(mask, Chunked):
            return f"a window of {mask.size} looks across the border of a run of {run} rows", "use chunks"
        if not mask.borders_known(multiple):
            reason = f"chunks of {mask.size} are counted by document and documents start at multiples of {multiple}"
            return f"{reason}, so that borders are not known", f"let documents start at multiples of {mask.size}"
        if mask.shift:
            reason = f"chunks of {mask.size} are shifted by {mask.shift}, so they cross borders of runs"
            return reason, "use chunks without a shift"
        fix = f"use a length that is a multiple of {self.layout.multiple * mask.size}"
        if self.layout.runs_per_piece == 2 and 2 * run % mask.size == 0:
            fix = "set context.layout to contiguous"
        return f"chunk {mask.size} does not divide the run of {run} rows a device holds", fix


def _share(count: int, parts: int) -> int:
    """`count * (parts - 1) / parts`: what leaves a device of what all together hold or exchange."""
    return count * (parts - 1) // parts
