#!/usr/bin/env bash
# LongRoPE from end to end: search, tune, search, tune, search eight times as far, search again for short texts.
#
#     bash scripts/recipes/longrope.sh           # a tiny model that is trained first, some minutes on a CPU
#     bash scripts/recipes/longrope.sh full      # runs/llama2-7b (`irope import`), 64 chips, books in data/held_out
#
# Everything goes to runs/recipes/longrope_SIZE. Started again, it goes on where it stopped: a finished run is left as it
# is, a search reads its scores.jsonl.
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

SIZE="${1:-tiny}"
OUT="runs/recipes/longrope_$SIZE"
RECIPE="configs/recipes/longrope.py"
SEARCH=(--config.attention_policy=none)

case "$SIZE" in
  tiny) # every length 512 times shorter, and a few dozen candidates in place of some 1,300
    CONFIG="$SIZE" BASE="$OUT/base" UNIT=2
    SEARCH+=(--config="configs/search_rope.py:tiny" --config.objective.documents=2 --config.batch_tokens=8192)
    SEARCH+=(--config.method.population=8 --config.method.parents=4 --config.method.mutations=4)
    SEARCH+=(--config.method.crossovers=2 --config.method.iterations=3)
    TRAIN=(--config.stages.0.steps=20)
    ;;
  full)
    CONFIG=imported BASE="runs/llama2-7b" UNIT=1024
    SEARCH+=(--config="configs/search_rope.py:paper" --config.objective.documents=5)
    SEARCH+=(--config.objective.source="{'kind': 'jsonl', 'path': 'data/held_out/*.jsonl.zst'}")
    TRAIN=()
    ;;
  *)
    echo "unknown size $SIZE; choose tiny or full" >&2
    exit 2
    ;;
esac

search() { # RUN, thousands of tokens it was trained at, thousands it is to read, folder
  irope search-rope --checkpoint="$1" "${SEARCH[@]}" --config.original_length=$(($2 * UNIT)) \
    --config.length=$(($3 * UNIT)) --out="$OUT/$4"
}

tune() { # stage, folder of its factors, run to start from
  irope train --config="$RECIPE:$CONFIG,$1,$OUT/$2/factors.json" --config.train.init_from="$3" --run-dir="$OUT/run_$1" \
    "${TRAIN[@]}"
}

if [ "$SIZE" = tiny ]; then
  echo "== 0/6  a model of 8 tokens to start from" >&2
  irope train --config="$RECIPE:tiny,base" --run-dir="$BASE" --config.stages.0.steps=100
fi
echo "== 1/6  search, 4k to 128k" >&2
search "$BASE" 4 128 factors_128k
echo "== 2/6  tune at 128k" >&2
tune 128k factors_128k "$BASE"
echo "== 3/6  search, 4k to 256k, and tune on" >&2
search "$OUT/run_128k" 4 256 factors_256k
tune 256k factors_256k "$OUT/run_128k"
# From here on nothing is trained.
echo "== 4/6  search, 4k to 2048k" >&2
search "$OUT/run_256k" 4 2048 factors_2048k
echo "== 5/6  search for short texts, 4k to 8k: factors between 1 and 2.5" >&2
search "$OUT/run_256k" 4 8 factors_8k

# Texts up to 8k turn by the last factors, longer ones by those of 2048k.
python - "$OUT" "$((8 * UNIT))" <<'PYTHON'
import json
import sys
from pathlib import Path

out, short_length = Path(sys.argv[1]), int(sys.argv[2])
read = lambda name: json.loads((out / name / "factors.json").read_text())
long, short = read("factors_2048k"), read("factors_8k")
scaling = long | {"original_length": short_length, "short_factor": short["long_factor"]}
(out / "scaling.json").write_text(json.dumps(scaling) + "\n")
PYTHON

echo "== 6/6  short and long, before and after" >&2
for scaling in "$OUT/factors_256k/factors.json" "$OUT/scaling.json"; do
  echo "$scaling"
  irope eval "$OUT/run_256k" --only=short --config.evals.0.lengths="($((4 * UNIT)), $((256 * UNIT)), $((2048 * UNIT)))" \
    --config.model.pattern.0.position.scaling="$(cat "$scaling")"
done
echo "scaling for configs: $OUT/scaling.json"
