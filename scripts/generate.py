"""`python scripts/generate.py …` is `irope generate …` from a checkout."""

import sys

from irope_jax.cli import main

sys.exit(main(["generate", *sys.argv[1:]]))
