"""`irope plan`: what a step costs on accelerators that are not here. Wiring only; the work is in `plan`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from irope_jax.core.chips import Chip
from irope_jax.core.config import ConfigError
from irope_jax.core.hosts import avoid_absent_tpu
from irope_jax.experiment import Experiment, check_devices, load_config, resolve
from irope_jax.model.decodable import check_decodable, check_length
from irope_jax.plan.analytic import closed_form
from irope_jax.plan.job import Failure, Figures, Job, chip_of_target, compiler_of_target, target_size
from irope_jax.plan.longest import longest
from irope_jax.plan.meshes import candidates, ranked, ranked_lines
from irope_jax.plan.picture import draw_memory
from irope_jax.plan.stored import ask, recall
from irope_jax.plan.table import as_values, plan_lines
from irope_jax.plan.targets import TargetError, simulate, target_devices
from irope_jax.sharding.mesh import MeshConfig

Overrides = list[tuple[str, str]]


def plan_verb(args: argparse.Namespace, overrides: Overrides) -> int:
    targets = [target for target in args.target.split(",") if target]
    if not targets:
        raise ConfigError("--target", args.target, "name chips and how many, such as v5p:4x4x4")
    if args.rows is not None and args.rows < 1:
        raise ConfigError("--rows", args.rows, "rows of the cache; use 1 or more")
    if args.candidates < 1:
        raise ConfigError("--candidates", args.candidates, "meshes to compile; use 1 or more")
    avoid_absent_tpu()
    simulate(targets)
    experiment = resolve(load_config(args.config), overrides)
    if args.mode != "train" and not any(path.startswith("mesh.") for path, _ in overrides) and args.mesh == "config":
        # As `irope generate`: what devices can share is the text.
        experiment = replace(experiment, mesh=MeshConfig(data=1, context=-1))
    lengths = _lengths(args.seq_len) or [experiment.data.seq_len]
    planner, failed = _Planner(args, len(targets) * len(lengths)), False
    found = []
    for target in targets:
        chip = chip_of_target(target)
        for length in [lengths[-1]] if args.max_context else lengths:
            try:
                found += planner.plan(experiment, target, chip, length)
            except ConfigError as error:
                failed = True
                planner.say(f"{target}: {error}")
                found.append(({"target": target, "seq_len": length, "error": {"why": str(error)}}, None))
    if args.json:
        print(json.dumps([values for values, _ in found], indent=1))
    if args.plot:
        drawn = [one for _, one in found if one is not None]
        draw_memory(drawn, Path(args.plot))
        planner.say(f"picture: {args.plot}")
    return 2 if failed and all(one is None for _, one in found) else 0


def job_of(experiment: Experiment, args: argparse.Namespace, devices: int, length: int) -> Job:
    """The job on so many devices.

    Raises:
      ConfigError: something does not divide, or the model cannot be decoded.
    """
    experiment = replace(experiment, data=replace(experiment.data, seq_len=length), evals=())
    if args.mode == "train":
        mesh = check_devices(experiment, devices)
        return Job(model=experiment.model, data=experiment.data, train=experiment.train, mesh=mesh)
    mesh = experiment.mesh.fill(devices)
    check_decodable(experiment.model)
    check_length(experiment.model, length)
    rows = args.rows or mesh.batch_parts
    if rows % mesh.batch_parts:
        raise ConfigError("--rows", rows, f"a multiple of mesh.data x fsdp x expert = {mesh.batch_parts}")
    job = Job(
        model=experiment.model, data=experiment.data, train=experiment.train, mesh=mesh, mode=args.mode, rows=rows,
        numbers=args.cache,
    )  # fmt: skip
    job.cache.check(job.model)
    return job


class _Planner:
    """Asks compilers, or what they said before, and says how far it is."""

    def __init__(self, args: argparse.Namespace, total: int):
        self.args, self.total, self.done = args, total, 0

    def say(self, text: str) -> None:
        print(text, file=sys.stderr if self.args.json else sys.stdout, flush=True)

    def compiled(self, job: Job, target: str) -> Figures | Failure | None:
        """None without a compiler: by hand only, and it is said."""
        if self.args.closed_form:
            return None
        known = None if self.args.no_cache else recall(job, target)
        if known is None:
            print(
                f"[{self.done}/{self.total}] compiling {job.length:,} tokens for {target} ...",
                file=sys.stderr,
                flush=True,
            )
            known = ask(job, target)
        return known

    def devices(self, target: str) -> int:
        """How many a target has: by its name where no compiler is to be asked."""
        if self.args.closed_form and (size := target_size(target)):
            return size
        try:
            return len(target_devices(target))
        except TargetError as error:
            size, chip = target_size(target), chip_of_target(target)
            if size is None or chip is None:
                raise
            self.say(f"{error}")
            self.say("no compiler for it here: by hand only")
            self.args = argparse.Namespace(**{**vars(self.args), "closed_form": True})
            return size

    def plan(self, experiment: Experiment, target: str, chip: Chip | None, length: int) -> list:
        self.done += 1
        asked, count = self.args, self.devices(target)
        try:
            if self.args.mesh == "auto":
                return self._auto(experiment, target, chip, length, count)
            if self.args.max_context:
                return self._longest(experiment, target, chip, count)
            return [self._one(job_of(experiment, self.args, count, length), target, chip)]
        finally:
            self.args = asked

    def _one(self, job: Job, target: str, chip: Chip | None):
        by_hand = _by_hand(job, target)
        compiled = self.compiled(job, target)
        if not self.args.json:
            print("\n".join(plan_lines(job, target, chip, compiled, by_hand)), flush=True)
        best = compiled if isinstance(compiled, Figures) else by_hand
        values = as_values(job, target, chip, compiled, by_hand)
        return values, (f"{target}\n{job.length:,}", best, chip)

    def _auto(self, experiment: Experiment, target: str, chip: Chip | None, length: int, count: int) -> list:
        build = lambda changed: job_of(changed, self.args, count, length)
        by_hand = lambda job: _by_hand(job, target)
        best = candidates(experiment, build, by_hand, count, chip, self.args.mode)[: self.args.candidates]
        if not best:
            raise ConfigError("--mesh", "auto", f"no mesh of {count} devices divides batch, length and heads")
        results = [(one, self.compiled(one.job, target)) for one in best]
        best = ranked(results, chip)
        for line in ranked_lines(best, chip):
            self.say(line)
        return [
            (
                as_values(one.job, target, chip, result, one.by_hand) | {"candidate": one.label, "paste": one.lines},
                (f"{target}\n{one.label}", result, chip) if isinstance(result, Figures) else None,
            )
            for one, result in best
        ]

    def _longest(self, experiment: Experiment, target: str, chip: Chip | None, count: int) -> list:
        if chip is None:
            raise ConfigError("--max-context", target, "the memory of this target is not known; name a TPU or GPU")
        build = lambda length: job_of(experiment, self.args, count, length)
        length, tried = longest(build, chip, lambda job: self.compiled(job, target))
        for line in tried:
            self.say(f"  {line}")
        if length is None:
            self.say(f"{target}: no length fits")
            return [({"target": target, "max_context": None}, None)]
        self.say(f"{target}: the longest that fits is {length:,} tokens")
        values, drawn = self._one(build(length), target, chip)
        return [({**values, "max_context": length}, drawn)]


def _by_hand(job: Job, target: str) -> Figures:
    return closed_form(job, compiler=compiler_of_target(target))


def _lengths(text: str | None) -> list[int]:
    if not text:
        return []
    try:
        lengths = [int(part.replace("_", "")) for part in text.split(",")]
    except ValueError:
        raise ConfigError("--seq-len", text, "whole numbers of tokens, separated by commas") from None
    if min(lengths) < 1:
        raise ConfigError("--seq-len", text, "tokens of a row; use 1 or more")
    return lengths
