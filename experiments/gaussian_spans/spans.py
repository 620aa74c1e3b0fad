"""How well does one entry at an uncertain position stand for the tokens of a span? Pooled spans in a pretrained model.

    python scripts/fetch_assets.py smollm2
    python experiments/gaussian_spans/spans.py                 # some minutes; goes on where it was cut
    python experiments/gaussian_spans/spans.py --report-only   # report.md and the picture alone

Texts of 512 tokens of *Moby-Dick*. The first 4 tokens (where heads park their attention) and the last 124 stay; the 384
between them become spans of w tokens, each one entry whose embedding is the mean of theirs. What the model then says of
the last tokens is compared with what it says when it reads all. Ways to place an entry are rows of WAYS.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from irope_jax.core.types import TokenInfo
from irope_jax.data.sources import Corpus, open_source
from irope_jax.experiment import resolve, run_config
from irope_jax.model.decoder import hidden_states
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.study import plots
from irope_jax.study.rows import add_row, read_rows
from irope_jax.train.state import load_params

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
FIRST, MIDDLE, LAST = 4, 384, 124
WIDTHS = (2, 4, 8, 16, 32)
WAYS = {
    "gaussian": "mean, at its centre, blurred by the normal distribution",
    "span": "mean, at its centre, blurred by the span's own distribution",
    "centre": "mean, at its centre",
    "copies": "mean, at every place of the span (as many entries as tokens)",
    "middle": "its middle token alone",
    "nothing": "nothing: spans are left out",
}


def entries(way: str, width: int, tokens: np.ndarray, table: jax.Array) -> tuple[jax.Array, np.ndarray, TokenInfo]:
    """An embedding table with means of spans behind its own rows, and entries that name them with their coordinates."""
    texts, (size, _) = len(tokens), table.shape
    middle = tokens[:, FIRST : FIRST + MIDDLE].reshape(texts, -1, width)
    spans = middle.shape[1]
    begins, last = FIRST + width * np.arange(spans), FIRST + MIDDLE + np.arange(LAST)
    means = table[middle].astype(jnp.float32).mean(axis=2).astype(table.dtype)
    names = size + np.arange(texts * spans).reshape(texts, spans)
    starts, widths = begins, np.full(spans, width)
    match way:
        case "copies":
            names, starts, widths = (np.repeat(x, width, axis=-1) for x in (names, begins, widths))
            starts, widths = starts + np.tile(np.arange(width), spans), np.ones_like(widths)
        case "middle":
            names, starts, widths = middle[:, :, width // 2], begins + width // 2, np.ones_like(widths)
        case "nothing":
            names, starts, widths = names[:, :0], starts[:0], widths[:0]
    ids = np.concatenate([tokens[:, :FIRST], names, tokens[:, -LAST:]], axis=1).astype(np.int32)
    starts = np.concatenate([np.arange(FIRST), starts, last])
    widths = np.concatenate([np.ones(FIRST, int), widths, np.ones(LAST, int)])
    info = TokenInfo.spans(np.tile(starts, (texts, 1)), np.tile(widths, (texts, 1)))
    if way == "centre":
        info = info.replace(spreads=None)
    return jnp.concatenate([table, means.reshape(texts * spans, -1)]), ids, info


def says(model, params, table, ids, info, size: int) -> np.ndarray:
    """Log-probabilities `[texts, LAST, V]` after each of the last tokens."""
    model = dataclasses.replace(model, vocab_size=table.shape[0])

    @jax.jit
    def run(params, table, ids, info):
        hidden, head = hidden_states(model, {**params, "embedding": table}, ids, info)
        return jax.nn.log_softmax((hidden[:, -LAST:] @ head[:, :size]).astype(jnp.float32))

    pieces = [slice(i, i + 4) for i in range(0, len(ids), 4)]
    found = [run(params, table, ids[piece], jax.tree.map(lambda x, p=piece: x[p], info)) for piece in pieces]
    return np.concatenate(jax.device_get(found))


def blurred(model, blur: str):
    layers = [dataclasses.replace(one, position=dataclasses.replace(one.position, blur=blur)) for one in model.pattern]
    return dataclasses.replace(model, pattern=tuple(layers))


def measure(args: argparse.Namespace) -> None:
    run = Path(args.checkpoint)
    experiment = resolve(run_config(run))
    model, tokenizer = experiment.model, experiment.data.tokenizer
    ids = np.asarray(tokenizer.encode(next(iter(open_source(Corpus("test"))))))
    tokens = ids[: args.texts * 512 * 8].reshape(args.texts, 8, 512)[:, 0]  # from all over the book's first chapters
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params, _ = load_params(run, model, mesh)
        table, size = params["embedding"], model.vocab_size
        whole = says(model, params, table, tokens, TokenInfo.single(len(tokens), 512), size)
        target = tokens[:, -LAST + 1 :, None]
        loss = lambda logp: -np.take_along_axis(logp[:, :-1], target, axis=2).mean()
        done = {(row["way"], row["width"]) for row in read_rows(RESULTS)}
        for width in WIDTHS:
            for way in WAYS:
                if (way, width) in done:
                    continue
                longer, names, info = entries(way, width, tokens, table)
                chosen = blurred(model, way) if way in ("gaussian", "span") else model
                found = says(chosen, params, longer, names, info, size)
                divergence = (np.exp(whole) * (whole - found)).sum(axis=2).mean(axis=1)
                row = {
                    "way": way,
                    "width": width,
                    "texts": len(tokens),
                    "kl": round(float(divergence.mean()), 4),
                    "kl_error": round(float(divergence.std(ddof=1) / len(tokens) ** 0.5), 4),
                    "loss": round(float(loss(found)), 4),
                    "loss_of_all": round(float(loss(whole)), 4),
                }
                add_row(RESULTS, row)
                print(row, flush=True)


def report() -> None:
    """report.md and the picture."""
    rows = {(row["way"], row["width"]): row for row in read_rows(RESULTS)}
    widths = sorted({width for _, width in rows})
    some = next(iter(rows.values()))
    lines = [
        "# One entry for a span of tokens",
        "",
        f"SmolLM2-135M-Instruct, {some['texts']} texts of 512 tokens of *Moby-Dick*, of which 384 are spans. Made by",
        "`python experiments/gaussian_spans/spans.py`. Reading every token, the loss of the last tokens is",
        f"{some['loss_of_all']:.3f} nats.",
    ]
    for key, title in (
        ("kl", "Divergence from what it says when it reads every token (nats a token, with its standard error)"),
        ("loss", "Loss of the last tokens (nats)"),
    ):
        lines += ["", f"**{title}**", "", f"| a span of w tokens is | {' | '.join(f'w = {w}' for w in widths)} |"]
        lines.append("|---|" + "---:|" * len(widths))
        for way, text in WAYS.items():
            cells = []
            for width in widths:
                row = rows[way, width]
                cells.append(f"{row[key]:.3f}" + (f" ± {row['kl_error']:.3f}" if key == "kl" else ""))
            lines.append(f"| {text} | {' | '.join(cells)} |")
    lines += ["", "![Divergence by span length](divergence.png)"]
    (HERE / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plt = plots.pyplot()
    figure, axis = plt.subplots(figsize=(plots.WIDTH * 0.8, 3.8), layout="constrained")
    for i, (way, text) in enumerate(WAYS.items()):
        axis.plot(
            widths, [rows[way, w]["kl"] for w in widths], marker=plots.MARKERS[i], color=plots.COLOURS[i], label=text
        )
    axis.set(xscale="log", xlabel="tokens a span", ylabel="divergence from reading all (nats a token)", ylim=(0, None))
    axis.set_xticks(widths, map(str, widths))
    axis.minorticks_off()
    axis.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    plots.save_figure(figure, HERE / "divergence.png")
    print(f"report: {HERE / 'report.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="assets/smollm2-135m", help="run directory of a RoPE model")
    parser.add_argument("--texts", type=int, default=8, help="how many texts (default: 8)")
    parser.add_argument("--report-only", action="store_true", help="make report.md and the picture from results.jsonl")
    args = parser.parse_args()
    if not args.report_only:
        measure(args)
    report()


if __name__ == "__main__":
    main()
