"""`python scripts/plan.py …` is `irope plan …` from a checkout."""

import sys

from irope_jax.cli import main

sys.exit(main(["plan", *sys.argv[1:]]))
