"""`python scripts/train.py …` is `irope train …` from a checkout."""

import sys

from irope_jax.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
