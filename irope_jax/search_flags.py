"""Flags and help of `irope search-rope`, apart from its work so that help does not wait for jax."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_search(verb: Callable[..., argparse.ArgumentParser], config_help: str) -> None:
    search = verb(
        "search-rope",
        "find factors that stretch a trained RoPE model",
        """\
Search factors for the frequencies of a trained model, one per rotating pair, under which it reads longer text without
training (LongRoPE): by evolution from PI, NTK and YaRN, or by gradient. The model is frozen; candidates are scored by
its loss on held-out documents. Writes factors.json (a `scaling` for configs), factors.png and scores.jsonl.

examples:
  irope search-rope --checkpoint=runs/extend_tiny --config=configs/search_rope.py:tiny
  irope search-rope --checkpoint=RUN --config=configs/search_rope.py --config.length=32768 --out=runs/x4
  irope search-rope --checkpoint=RUN --config=configs/search_rope.py --config.objective.kind=needle
  irope search-rope --checkpoint=RUN --config=configs/search_rope.py --config.method.kind=gradient --out=runs/trained \\
      --compare=RUN/rope_search_16384/factors.json
  irope eval RUN --config.model.pattern.0.position.scaling="$(cat RUN/rope_search_16384/factors.json)"

Killed and started again with the same command, it goes on from scores.jsonl and gives the same answer.
""",
        config_help,
    )
    search.add_argument("--checkpoint", required=True, metavar="RUN", help="run directory of the trained model")
    search.add_argument("--config", required=True, metavar="FILE[:ARG]", help="config file of the search")
    search.add_argument("--step", type=int, metavar="N", help="checkpoint to read (default: the newest)")
    search.add_argument("--out", metavar="DIR", help="where to write (default: RUN/rope_search_LENGTH)")
    search.add_argument(
        "--compare", metavar="FILE", action="append", help="factors.json of another search to draw beside; may repeat"
    )
