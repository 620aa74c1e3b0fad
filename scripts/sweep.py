"""`python scripts/sweep.py …` is `irope sweep …` from a checkout."""

import sys

from irope_jax.cli import main

sys.exit(main(["sweep", *sys.argv[1:]]))
