#!/usr/bin/env bash
# From nothing to a picture of what iRoPE buys: environment, a small iRoPE model trained on novels and facts, an all-RoPE
# twin, both evaluated far beyond their training length, and a report. Started again, it goes on where it stopped.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

echo "== 1/3  iRoPE, from scratch" >&2
irope train --config=configs/quickstart.py:irope
echo "== 2/3  the all-RoPE twin, from those weights" >&2
irope train --config=configs/quickstart.py:rope
echo "== 3/3  report" >&2
irope report runs/quickstart/irope runs/quickstart/rope --out=runs/quickstart/report
