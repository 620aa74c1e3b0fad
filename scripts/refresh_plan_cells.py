"""Compile the cells that the closed form is tested against again, and store what the compilers say.

    python scripts/refresh_plan_cells.py                      # all, about an hour on two cores
    python scripts/refresh_plan_cells.py --only='decode|fsdp'   # these, the others stay

Writes tests/plan/cells.json. Needs libtpu (extra `dev`) and, for GPUs, extra `cuda`; nothing is executed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from irope_jax.plan.job import Failure
from irope_jax.plan.measured import measure
from irope_jax.plan.targets import simulate
from tests.plan.cells import CELLS, WHOLE, job_of

STORED = Path(__file__).resolve().parent.parent / "tests" / "plan" / "cells.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME[|NAME...]", help="cells to compile (default: all)")
    names = (parser.parse_args().only or "|".join([*CELLS, *WHOLE])).split("|")
    simulate([cell[0] for cell in CELLS.values()])
    stored = json.loads(STORED.read_text()) if STORED.is_file() else {}
    for name in names:
        target, job = job_of(name)
        found = measure(job, target)
        if isinstance(found, Failure):
            print(f"{name}: {found.why}", file=sys.stderr)
            return 1
        stored[name] = asdict(found)
        print(f"{name}: {found.total / 1e9:.2f} GB on {target}, compiled in {found.seconds[1]:.0f} s", flush=True)
        STORED.write_text(json.dumps({key: stored[key] for key in [*CELLS, *WHOLE] if key in stored}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
