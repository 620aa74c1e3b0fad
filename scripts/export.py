"""`python scripts/export.py …` is `irope export …` from a checkout."""

import sys

from irope_jax.cli import main

sys.exit(main(["export", *sys.argv[1:]]))
