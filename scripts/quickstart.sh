#!/usr/bin/env bash
# From nothing to a picture of what iRoPE buys: environment, a small iRoPE model trained on novels and facts, an all-RoPE
# twin, both evaluated far beyond their training length, and a report. Started again, it goes on where it stopped.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

echo "== 1/4  first lesson: pairs of symbols, 32 tokens" >&2
irope train --config=configs/quickstart.py:recall
echo "== 2/4  iRoPE on novels and facts, 128 tokens" >&2
irope train --config=configs/quickstart.py:irope
echo "== 3/4  the all-RoPE twin, from those weights" >&2
irope train --config=configs/quickstart.py:rope
echo "== 4/4  report" >&2
irope report runs/quickstart/irope runs/quickstart/rope --out=runs/quickstart/report
