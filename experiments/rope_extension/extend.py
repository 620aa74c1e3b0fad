"""How far a pretrained RoPE model reads when only its frequencies change: perplexity by position, method by method.

    python scripts/fetch_assets.py smollm2
    irope search-rope --checkpoint=assets/smollm2-135m --config=configs/search_rope.py:smollm2
    python experiments/rope_extension/extend.py                          # x2: 16,384 tokens, a few minutes a method
    python experiments/rope_extension/extend.py --times=4 --factors=...  # x4

One pass over the first `times x 8,192` tokens of *Moby-Dick*, which neither the search nor this project's training ever
reads. Each method is appended to results.jsonl as it is done and is not run again; report.md and the picture are made
from that file (`--report-only` makes just them).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import jax

from irope_jax.core.config import from_dict
from irope_jax.core.hosts import configure_logging
from irope_jax.data.sources import Corpus
from irope_jax.evals.perplexity import Perplexity
from irope_jax.evals.rotations import with_scaling
from irope_jax.experiment import resolve, run_config
from irope_jax.position.scaling import NTK, DynamicNTK, Linear, LongRoPE, Unscaled, YaRN
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.study import plots
from irope_jax.study.rows import add_row, read_rows
from irope_jax.train.state import load_params

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
BUCKET = 2048
NAMES = {
    "none": "unscaled",
    "pi": "PI",
    "ntk": "NTK",
    "dynamic_ntk": "dynamic NTK",
    "yarn": "YaRN",
    "longrope": "LongRoPE, searched",
}


def scaling_of(method: str, times: int, original: int, factors: Path):
    if method == "longrope":
        found = from_dict(LongRoPE, json.loads(factors.read_text(encoding="utf-8")), str(factors))
        if (found.factor, found.original_length) != (times, original):
            raise SystemExit(f"{factors}: found for x{found.factor:g} of {found.original_length}, not for x{times}")
        return found
    return {
        "none": Unscaled(),
        "pi": Linear(times),
        "ntk": NTK(times),
        "dynamic_ntk": DynamicNTK(times, original),
        "yarn": YaRN(times, original),
    }[method]


def measure(args: argparse.Namespace) -> None:
    run = Path(args.checkpoint)
    experiment = resolve(run_config(run))
    length = args.times * args.original_length
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    done = {(row["method"], row["times"]) for row in read_rows(RESULTS)}
    spec = Perplexity(source=Corpus("test"), lengths=(length,), tokens=length, batch_tokens=length, bucket=BUCKET)
    with jax.set_mesh(mesh):
        params, _ = load_params(run, experiment.model, mesh)
        for method in args.methods:
            if (method, args.times) in done:
                continue
            model = with_scaling(experiment.model, scaling_of(method, args.times, args.original_length, args.factors))
            found = [m for m in spec.build(model, experiment.data.tokenizer).run(params) if m.name == "nll_by_position"]
            buckets = [{"from": m.where["from"], "to": m.where["to"], "nll": m.value, "count": m.count} for m in found]
            row = {"method": method, "times": args.times, "length": length, "buckets": buckets}
            add_row(RESULTS, row)
            print(method, *(f"{math.exp(b['nll']):.2f}" for b in buckets), flush=True)


def report() -> None:
    """report.md, and a picture per factor."""
    lines = [
        "# Reading beyond the trained length by changing frequencies only",
        "",
        "SmolLM2-135M-Instruct (trained at 8,192 tokens, 4-bit weights dequantised), no fine-tuning. Perplexity by",
        "position of one pass over *Moby-Dick*: compare along a column, which is the same text for every method;",
        "columns differ in text. Made by `python experiments/rope_extension/extend.py`.",
    ]
    rows = read_rows(RESULTS)
    for times in sorted({row["times"] for row in rows}):
        here = sorted((r for r in rows if r["times"] == times), key=lambda r: list(NAMES).index(r["method"]))
        heads = [f"{b['from'] // 1024}k-{b['to'] // 1024}k" for b in here[0]["buckets"]]
        total = sum(b["count"] for b in here[0]["buckets"])
        lines += ["", f"## x{times}: {here[0]['length']:,} tokens", "", f"| method | {' | '.join(heads)} | all |"]
        lines.append("|---|" + "---|" * (len(heads) + 1))
        for row in here:
            cells = [f"{math.exp(b['nll']):.1f}" for b in row["buckets"]]
            mean = math.exp(sum(b["nll"] * b["count"] for b in row["buckets"]) / total)
            lines.append(f"| {NAMES[row['method']]} | {' | '.join(cells)} | {mean:.1f} |")
        picture = HERE / f"perplexity_x{times}.png"
        draw(here, picture)
        lines += ["", f"![Perplexity by position, x{times}]({picture.name})"]
    (HERE / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"report: {HERE / 'report.md'}")


def draw(rows: list[dict], path: Path) -> None:
    plt = plots.pyplot()
    figure, axis = plt.subplots(figsize=(plots.WIDTH * 0.8, 3.6), layout="constrained")
    for i, row in enumerate(rows):
        middle = [(b["from"] + b["to"]) / 2048 for b in row["buckets"]]
        values = [math.exp(b["nll"]) for b in row["buckets"]]
        last = row["method"] == "longrope"
        axis.plot(
            middle, values, color=plots.COLOURS[i], marker=plots.MARKERS[i], markersize=4,
            linewidth=2.2 if last else 1.3, label=NAMES[row["method"]],
        )  # fmt: skip
    axis.axvline(8, color=plots.GREY, linestyle="--", linewidth=0.8)
    axis.annotate("trained length", (8, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                  textcoords="offset points", color=plots.GREY, fontsize=8.5)  # fmt: skip
    axis.set_yscale("log")
    axis.set_yticks([30, 50, 100, 200, 500], ["30", "50", "100", "200", "500"])
    axis.minorticks_off()
    axis.set_xlabel("position, thousands of tokens (1,024)")
    axis.set_ylabel("perplexity")
    axis.set_title("Perplexity on Moby-Dick by position")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="assets/smollm2-135m", metavar="RUN", help="run directory of the model")
    parser.add_argument("--times", type=int, default=2, help="how many times its trained length to read (default 2)")
    parser.add_argument("--original-length", type=int, default=8192, help="tokens it was trained at")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES), help="default: all")
    parser.add_argument("--factors", type=Path, metavar="FILE", help="factors.json of a search, for longrope")
    parser.add_argument("--report-only", action="store_true", help="make report and pictures of what was measured")
    args = parser.parse_args()
    search = f"rope_search_{args.times * args.original_length}"
    args.factors = args.factors or Path(args.checkpoint) / search / "factors.json"
    configure_logging()
    if not args.report_only:
        measure(args)
    report()


if __name__ == "__main__":
    main()
