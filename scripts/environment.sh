# Sourced by the other scripts: makes .venv with the tested versions if it is missing or out of date, and activates it.
# PYTHON names the interpreter to make it with (default: the first of python3, python3.13, python3.12, python3.11 that is new enough).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "irope_jax needs Python 3.11 to 3.13; none found (set PYTHON=/path/to/python)" >&2
  return 1
}

stamp="$(cat setup.py constraints.txt | cksum)"
if [ "$(cat .venv/irope-stamp 2>/dev/null)" != "$stamp" ]; then
  python="$(find_python)"
  echo "making .venv with $("$python" --version)" >&2
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --upgrade pip
  .venv/bin/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
  echo "$stamp" > .venv/irope-stamp
fi
# shellcheck disable=SC1091
source .venv/bin/activate
