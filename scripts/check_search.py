"""Do searched factors beat PI, NTK and YaRN? A tiny model, three seeds, stretched eight times without training.

    python scripts/check_search.py [--seeds 0 1 2]

For each seed: trains `configs/extend_tiny.py` (256 tokens) if `runs/` does not hold it yet, searches factors for 2,048
tokens on *Persuasion* (`configs/search_rope.py:tiny`), and measures all methods on *Moby-Dick*, which nothing was
trained or searched on. Some 15 minutes a seed on two CPU cores; what was done is not done again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from irope_jax.cli import main as irope
from irope_jax.core.config import from_dict
from irope_jax.data.sources import Corpus
from irope_jax.evals.perplexity import Perplexity
from irope_jax.evals.rotations import with_scaling
from irope_jax.experiment import resolve, run_config
from irope_jax.position.scaling import NTK, Linear, LongRoPE, Unscaled, YaRN
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.state import load_params

ROOT = Path(__file__).resolve().parent.parent
TRAINED, LENGTH = 256, 2048


def done(command: list[str]) -> None:
    if code := irope(command):
        sys.exit(code)


def measure(run: Path, tokens: int) -> dict[str, float]:
    """Nats per byte on Moby-Dick at `LENGTH` tokens, by method."""
    experiment = resolve(run_config(run))
    factors = json.loads((run / f"rope_search_{LENGTH}" / "factors.json").read_text(encoding="utf-8"))
    times = LENGTH / TRAINED
    methods = {
        "unscaled": Unscaled(),
        "PI": Linear(times),
        "NTK": NTK(times),
        "YaRN": YaRN(times, TRAINED),
        "searched": from_dict(LongRoPE, factors),
    }
    spec = Perplexity(source=Corpus("test"), lengths=(LENGTH,), tokens=tokens)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        params, _ = load_params(run, experiment.model, jax.sharding.get_mesh())
        found = {}
        for name, scaling in methods.items():
            evaluator = spec.build(with_scaling(experiment.model, scaling), experiment.data.tokenizer)
            found[name] = next(iter(evaluator.run(params))).value
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=262_144, help="tokens of Moby-Dick to measure on")
    args = parser.parse_args()
    rows = {}
    for seed in args.seeds:
        run = ROOT / "runs" / ("extend_tiny" if seed == 0 else f"extend_tiny_{seed}")
        done(["train", f"--config={ROOT}/configs/extend_tiny.py:{seed}", f"--run-dir={run}"])
        done(["search-rope", f"--checkpoint={run}", f"--config={ROOT}/configs/search_rope.py:tiny"])
        rows[seed] = measure(run, args.tokens)
    table = Table(title=f"Moby-Dick at {LENGTH:,} tokens, trained at {TRAINED}: nats a byte")
    for heading in ("seed", *next(iter(rows.values()))):
        table.add_column(heading, justify="right")
    for seed, row in rows.items():
        table.add_row(str(seed), *(f"{value:.4f}" for value in row.values()))
    Console().print(table)
    good = all(row["searched"] < min(v for name, v in row.items() if name != "searched") for row in rows.values())
    print(json.dumps({"pass": good and all(map(math.isfinite, rows[args.seeds[0]].values())), "nats": rows}))
    sys.exit(not good)


if __name__ == "__main__":
    main()
