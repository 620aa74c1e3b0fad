"""Flags and help of `irope plan`, apart from its work so that help does not wait for jax."""

from __future__ import annotations

import argparse
from collections.abc import Callable

CANDIDATES = 3
"""Meshes that `--mesh=auto` compiles."""


def add_plan(verb: Callable[..., argparse.ArgumentParser], epilog: str) -> None:
    plan = verb(
        "plan",
        "what a step costs on accelerators that are not here",
        """\
Compile the very step that would run, for chips that are only described, and print what it holds, computes and sends on
each of them, beside the same figures by hand. Nothing is executed and nothing is allocated.

  v5e:2x2, v5p:4x4x4, v6e:8x8   TPUs, by libtpu (extras `tpu`, `dev`; Linux on x86-64)
  h100:8, h200:8, b200:8, a100:8  GPUs of one host, by jax's CUDA plugin (extra `cuda`)
  cpu:8                         simulated devices, which needs nothing

Parameters and optimizer state are what the step is given, activations kept what waits for the backward pass, and other
temporaries what the compiler needs besides. FLOPs inside kernels are those they say of themselves, and of splash
attention the products of visible pairs. The time is a roofline: each kind of work alone, at the data sheet's rate.

examples:
  irope plan --config=configs/debug.py --target=cpu:8 --config.mesh.data=8
  irope plan --config=configs/llama4_scout.py:1m --target=v5p:4x4x4
  irope plan --config=configs/llama4_scout.py:1m --target=v5p:4x4x4,v5p:4x4x8 --seq-len=524288,1048576 --closed-form
  irope plan --config=configs/llama3_8b.py --target=v5e:16x16 --mesh=auto
  irope plan --config=configs/llama3_8b.py --target=h100:8 --mode=decode --max-context --closed-form

A compiler's answers are kept (~/.cache/irope_jax/plan) and asked for again only when the config, the target, a version
or this package's source has changed. --closed-form asks no compiler: it answers at once, for any number of chips.
""",
        epilog,
    )
    plan.add_argument("--config", required=True, metavar="FILE[:ARG]", help="config file, see below")
    plan.add_argument("--target", required=True, metavar="T[,T...]", help="chips and how many, such as v5p:4x4x4")
    plan.add_argument("--seq-len", metavar="N[,N...]", help="tokens of a row (default: that of the config)")
    plan.add_argument(
        "--mode",
        choices=("train", "prefill", "decode"),
        default="train",
        help="a training step (default), a piece of a prompt read into a cache, or a token chosen behind one",
    )
    plan.add_argument(
        "--mesh", choices=("config", "auto"), default="config", help="that of the config (default), or the best found"
    )
    plan.add_argument(
        "--candidates",
        type=int,
        default=CANDIDATES,
        metavar="N",
        help=f"meshes that --mesh=auto compiles (default: {CANDIDATES})",
    )
    plan.add_argument("--max-context", action="store_true", help="the longest power of two of tokens that fits")
    plan.add_argument(
        "--rows", type=int, metavar="N", help="rows of prefill and decode (default: one a part of the batch)"
    )
    plan.add_argument(
        "--cache",
        choices=("float32", "bfloat16", "int8", "int4"),
        default="bfloat16",
        help="numbers of the cache of prefill and decode (default: bfloat16)",
    )
    plan.add_argument("--closed-form", action="store_true", help="by hand only; no compiler is asked")
    plan.add_argument("--no-cache", action="store_true", help="compile again what is known already")
    plan.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    plan.add_argument("--plot", metavar="FILE", help="picture of memory by target and length, a stacked bar each")
