"""`python scripts/report.py …` is `irope report …` from a checkout."""

import sys

from irope_jax.cli import main

sys.exit(main(["report", *sys.argv[1:]]))
