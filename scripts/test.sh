#!/usr/bin/env bash
# Run the tests; makes the environment if it is missing. Arguments go to pytest: bash scripts/test.sh tests/attention -x
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check .
exec python -m pytest -n 2 --dist loadfile "$@"
