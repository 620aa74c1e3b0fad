"""`python scripts/eval.py …` is `irope eval …` from a checkout."""

import sys

from irope_jax.cli import main

sys.exit(main(["eval", *sys.argv[1:]]))
