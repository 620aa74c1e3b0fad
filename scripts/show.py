"""`python scripts/show.py …` is `irope show …` from a checkout."""

import sys

from irope_jax.cli import main

sys.exit(main(["show", *sys.argv[1:]]))
