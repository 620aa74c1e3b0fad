"""Compile every mesh of a long shortlist: does `irope plan --mesh=auto`, which compiles a few, pick a good one?

    python scripts/exhaustive_meshes.py             # the ten best by hand of the 8B at 131,072 tokens on v5e:16x16
    python scripts/exhaustive_meshes.py --count=20

Writes tests/plan/meshes.json, against which the pick is tested. Needs libtpu (extra `dev`); nothing is executed. What
`irope plan --mesh=auto --candidates=10` compiled with the same source is not compiled again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from irope_jax import planning
from irope_jax.experiment import Experiment, load_config, resolve
from irope_jax.plan.analytic import closed_form
from irope_jax.plan.job import Figures, Job, chip_of_target, target_size
from irope_jax.plan.meshes import candidates
from irope_jax.plan.stored import ask, recall

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "tests" / "plan" / "meshes.json"
CONFIG, TARGET = ROOT / "configs" / "llama3_8b.py", "v5e:16x16"


def job_of(experiment: Experiment, devices: int = target_size(TARGET)) -> Job:
    """As `irope plan` makes it."""
    return planning.job_of(experiment, argparse.Namespace(mode="train"), devices, experiment.data.seq_len)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10, help="of the best by hand (default: 10)")
    count = parser.parse_args().count
    experiment = resolve(load_config(str(CONFIG)))
    rows = []
    options = candidates(experiment, job_of, closed_form, target_size(TARGET), chip_of_target(TARGET), "train")
    for one in options[:count]:
        result = recall(one.job, TARGET) or ask(one.job, TARGET)
        rows.append(
            {
                "label": one.label,
                "mesh": one.job.mesh.sizes,
                "layout": one.job.model.context.layout,
                "remat": one.job.model.remat,
                "by_hand": {"seconds": one.seconds, "total": one.by_hand.total},
                "compiled": asdict(result) if isinstance(result, Figures) else None,
                "why": None if isinstance(result, Figures) else result.why,
            }
        )
        said = f"{result.total / 1e9:.1f} GB" if isinstance(result, Figures) else result.why
        print(f"{one.label}: {one.seconds:.2f} s and {one.by_hand.total / 1e9:.1f} GB by hand; {said}", flush=True)
        STORED.write_text(json.dumps({"target": TARGET, "candidates": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
