"""Cost of one execution of a compiled program on one device: totals, and each piece with the place it came from.

The walk follows fusions, calls, loops and conditionals from the entry computation and multiplies loop bodies by their
rounds. Counted are matrix products (`products.py`), collectives (`collectives.py`) and calls of kernels whose inside is
unknown, such as Pallas kernels on TPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from irope_jax.plan.hlo.collectives import Operand, Scope, collective_sent, made_by
from irope_jax.plan.hlo.loops import rounds
from irope_jax.plan.hlo.products import product_flops
from irope_jax.plan.hlo.text import Computation, Instruction, Program, parse

_LAYER = re.compile(r"\blayer_\d+")
_SAID = re.compile(r'"?cost_estimate"?:\{"flops":"(\d+)"')
_CALLERS = ("fusion", "call", "async", "custom-call")
_BOOKKEEPING = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
    "PrepareAsyncCallDone",
    "PrepareAsyncCallStart",
)
"""Custom calls of the TPU compiler that neither compute nor send."""


@dataclass(frozen=True)
class Work:
    """Something a program does, and where in the traced program it came from.

    Attributes:
      scope: path of names in the traced program, such as
        `jit(train_step)/transpose(jvp(Decoder))/while/body/closed_call/periods/layer_3/attention/attend/shard_map/…`.
      times: executions, loops multiplied out; of equal work under one scope, together.
    """

    scope: str
    times: int

    @property
    def layer(self) -> str:
        """`layer_0`, `layer_1`, …: the layer of the period, all of its repeats; "" outside the layers."""
        found = _LAYER.search(self.scope)
        return found[0] if found else ""

    @property
    def phase(self) -> str:
        """`backward` (of a gradient), `recomputed` (by rematerialisation) or `forward` (anything else)."""
        if "rematted_computation" in self.scope:
            return "recomputed"
        return "backward" if "transpose(" in self.scope else "forward"


@dataclass(frozen=True)
class Sent(Work):
    """A collective: its kind, and the bytes a device sends each time."""

    kind: str
    bytes: float

    @property
    def total(self) -> float:
        return self.times * self.bytes


@dataclass(frozen=True)
class Product(Work):
    """A matrix product: FLOPs of a device each time."""

    flops: int

    @property
    def total(self) -> int:
        return self.times * self.flops


@dataclass(frozen=True)
class OpaqueCall(Work):
    """A call of a kernel whose inside is unknown, by target name; `flops` is what it says of itself, if it does."""

    target: str
    flops: int = 0

    @property
    def total(self) -> int:
        return self.times


@dataclass(frozen=True)
class HloCost:
    """Cost of one execution of a program on one device.

    Attributes:
      matmul_flops_max: two per multiply-add, each conditional taking its most expensive branch: what devices in
        lockstep pay.
      matmul_flops_min: the same with the cheapest branches. Equal to `matmul_flops_max` without conditionals.
      collective_bytes: bytes a device sends, by kind of collective, ring algorithms assumed: with n devices in a group
        and an operand of b bytes, all-reduce 2 b (n-1)/n, all-gather b (n-1), reduce-scatter and all-to-all
        b (n-1)/n, collective-permute b times the share of devices that send to another one. Of a conditional the
        largest branch counts, kind by kind. XLA:CPU sends bfloat16 as float32; XLA:TPU sends it as it is.
      unknown_trips: loops whose number of rounds is not static; their bodies were counted once.
      instructions: instructions in the text, those inside fusions included.
      opaque_calls: executions of custom calls whose inside is unknown, by target name; their FLOPs are in no total.
      collectives, products, kernels: the same piece by piece, sums of `total` being the totals above (products:
        `matmul_flops_max`).
    """

    matmul_flops_max: int
    matmul_flops_min: int
    collective_bytes: dict[str, float]
    unknown_trips: int
    instructions: int
    opaque_calls: dict[str, int] = field(default_factory=dict)
    collectives: tuple[Sent, ...] = field(default=(), repr=False)
    products: tuple[Product, ...] = field(default=(), repr=False)
    kernels: tuple[OpaqueCall, ...] = field(default=(), repr=False)

    @property
    def total_bytes(self) -> float:
        """Bytes a device sends, all kinds together."""
        return sum(self.collective_bytes.values())

    def bytes_by(self, *names: str) -> dict:
        """Bytes sent by attributes of `Sent`: `bytes_by("layer", "phase")[("layer_3", "forward")]`.

        With one name the keys are its values, with several they are tuples. Nothing sent, no key.
        """
        return _totals(self.collectives, names)

    def flops_by(self, *names: str) -> dict:
        """The same for `matmul_flops_max`, by attributes of `Product`."""
        return _totals(self.products, names)

    def table(self) -> str:
        """What is sent, a line per layer, phase and kind, largest first."""
        found = sorted(self.bytes_by("layer", "phase", "kind").items(), key=lambda item: (-item[1], item[0]))
        times = _totals(self.collectives, ("layer", "phase", "kind"), lambda sent: sent.times)
        lines = [f"{'layer':<10} {'phase':<11} {'collective':<19} {'times':>8} {'bytes a device':>18}"]
        for key, count in found:
            layer, phase, kind = key
            lines.append(f"{layer or '-':<10} {phase:<11} {kind:<19} {times[key]:>8,} {count:>18,.0f}")
        return "\n".join([*lines, f"{'all':<50} {self.total_bytes:>19,.0f}"])


def analyse(text: str) -> HloCost:
    """Cost of the program whose optimized HLO is `text` (`jax.jit(f).lower(...).compile().as_text()`).

    Raises:
      ValueError: the text has no entry computation, or an instruction that matters is written in an unknown form.
    """
    program = parse(text)
    walk = _Walk(program)
    cost = walk.cost(program.entry)
    collectives = [
        Sent(_path(scope), n, kind, float(size)) for (kind, scope, size), n in cost.sent.items() if size and n
    ]
    products = [Product(scope, n, flops) for (scope, flops), n in cost.products.items() if n]
    kernels = [OpaqueCall(scope, n, target, flops) for (target, scope, flops), n in cost.opaque.items() if n]
    most_first = lambda work: (-work.total, work.scope)
    return HloCost(
        matmul_flops_max=cost.most,
        matmul_flops_min=cost.least,
        collective_bytes=dict(sorted(_totals(collectives, ("kind",)).items())),
        unknown_trips=len(walk.unknown_loops),
        instructions=sum(len(c.instructions) for c in program.computations.values()),
        opaque_calls=dict(sorted(_totals(kernels, ("target",)).items())),
        collectives=tuple(sorted(collectives, key=most_first)),
        products=tuple(sorted(products, key=most_first)),
        kernels=tuple(sorted(kernels, key=most_first)),
    )


def matmul_flops(text: str) -> int:
    """Matrix-product FLOPs of a program whose loops are all static.

    Raises:
      ValueError: a loop has an unknown number of rounds, or a conditional has branches of unequal cost; `analyse`
        reports such programs.
    """
    cost = analyse(text)
    if cost.unknown_trips:
        raise ValueError(f"{cost.unknown_trips} loops have no static trip count; analyse() counts their bodies once")
    if cost.matmul_flops_max != cost.matmul_flops_min:
        raise ValueError("branches of a conditional cost differently; read the minimum and maximum from analyse()")
    return cost.matmul_flops_max


def _path(scope: Scope) -> str:
    return scope[1] if isinstance(scope, tuple) else scope


def _totals(works: Iterable[Work], names: tuple[str, ...], amount=lambda work: work.total) -> dict:
    sums: Counter = Counter()
    for work in works:
        key = tuple(getattr(work, name) for name in names)
        sums[key[0] if len(names) == 1 else key] += amount(work)
    return dict(sums)


# --- the walk ---------------------------------------------------------------------------------------------------------


@dataclass
class _Cost:
    """Executions of each piece of work: `sent` by (kind, scope, bytes), `products` by (scope, flops), `opaque` by
    (target, scope, FLOPs that it says it takes); and the FLOPs of the cheapest way through the conditionals."""

    least: int = 0
    sent: Counter = field(default_factory=Counter)
    products: Counter = field(default_factory=Counter)
    opaque: Counter = field(default_factory=Counter)

    @property
    def most(self) -> int:
        return sum(flops * times for (_, flops), times in self.products.items())

    def add(self, other: _Cost, times: int = 1, scope_of=lambda scope: scope) -> None:
        self.least += times * other.least
        for (kind, scope, size), count in other.sent.items():
            self.sent[kind, scope_of(scope), size] += times * count
        for (scope, flops), count in other.products.items():
            self.products[scope_of(scope), flops] += times * count
        for (target, scope, flops), count in other.opaque.items():
            self.opaque[target, scope_of(scope), flops] += times * count


class _Walk:
    """The memoized cost of each computation of a program."""

    def __init__(self, program: Program):
        self.program = program
        self.unknown_loops: set[str] = set()
        self._costs: dict[str, _Cost] = {}

    def cost(self, name: str) -> _Cost:
        if name not in self._costs:
            total = _Cost()
            computation = self.program.computations[name]
            for instruction in computation.instructions.values():
                if found := self._instruction(instruction, computation):
                    total.add(found)
            self._costs[name] = total
        return self._costs[name]

    def _instruction(self, op: Instruction, inside: Computation) -> _Cost | None:
        if op.opcode == "while":
            return self._loop(op, inside)
        if op.opcode == "conditional":
            return self._conditional(op)
        total = _Cost()
        if op.opcode.removesuffix("-start") in _CALLERS:
            for name in op.called("calls", "to_apply", "called_computations"):
                self._call(total, name, op, inside)
        if op.opcode in ("dot", "convolution", "custom-call") and not (total.products or total.sent):
            flops = product_flops(op, inside.operand_arrays(op))
            if flops:
                total.products[op.scope, flops] += 1
                total.least += flops
            elif flops is None and op.target not in _BOOKKEEPING:
                said = _SAID.search(op.attributes)
                total.opaque[op.target, op.scope, int(said[1]) if said else 0] += 1
        elif found := collective_sent(op, inside, self.program):
            kind, sent = found
            for scope, size in sent.items():
                total.sent[kind, scope, size] += 1
        return total if total.products or total.sent or total.opaque else None

    def _call(self, total: _Cost, name: str, op: Instruction, inside: Computation, times: int = 1) -> None:
        """Add what `op` runs; what carries no scope of its own is done for that of `op`, or of its operands."""

        def scope_of(scope: Scope) -> Scope:
            if isinstance(scope, tuple):
                operand, otherwise = scope
                made = made_by(inside.instructions[op.operands[operand.place]], inside, self.program)
                otherwise = otherwise or op.scope
                return (made, otherwise) if isinstance(made, Operand) else made or otherwise
            return scope or op.scope

        total.add(self.cost(name), times, scope_of)

    def _loop(self, op: Instruction, inside: Computation) -> _Cost:
        times = rounds(op, inside, self.program)
        if times is None:
            self.unknown_loops.add(op.name)
            times = 1
        total = _Cost()
        for name in op.called("body", "condition"):
            self._call(total, name, op, inside, times)
        return total

    def _conditional(self, op: Instruction) -> _Cost:
        branches = [
            self.cost(name) for name in op.called("branch_computations", "true_computation", "false_computation")
        ]
        total = _Cost(min(branch.least for branch in branches))
        total.products.update(max(branches, key=lambda branch: branch.most).products)
        # Kind by kind and target by target, the branch with the most of it.
        for kind in {kind for branch in branches for kind, _, _ in branch.sent}:
            only = [Counter({key: n for key, n in b.sent.items() if key[0] == kind}) for b in branches]
            total.sent.update(max(only, key=lambda sent: sum(size * n for (_, _, size), n in sent.items())))
        for target in {target for branch in branches for target, *_ in branch.opaque}:
            only = [Counter({key: n for key, n in b.opaque.items() if key[0] == target}) for b in branches]
            total.opaque.update(max(only, key=lambda calls: calls.total()))
        return total
