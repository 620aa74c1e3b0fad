"""`python scripts/import.py …` is `irope import …` from a checkout."""

import sys

from irope_jax.cli import main

sys.exit(main(["import", *sys.argv[1:]]))
