"""lm-evaluation-harness asks our model, and transformers' class with the same weights: are the answers the same?

    pip install lm_eval torch transformers accelerate
    python scripts/parity_lm_eval.py --checkpoint=assets/smollm2-135m

The run is exported as a Hugging Face folder, in float32. Three tasks over local files, one for each thing that library
asks of a model: `gaps` (multiple choice: which word stood in the gap of a sentence of *Moby-Dick*; loglikelihood),
`passages` (perplexity of its passages; loglikelihood_rolling) and `sentences` (the rest of a sentence, up to its end;
generate_until). Compared is every answer, not only the scores. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import jax
import lm_eval
import numpy as np
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from irope_jax import cli
from irope_jax.data.text_tasks.questions import GAP, Gaps
from irope_jax.harness import harness_model

LIKELIHOOD_GATE, WORST = 1e-3, 5e-3
"""Nats: of the mean and of the largest difference of a log-likelihood, which sums up to some hundred tokens."""

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
metadata: {{version: 1.0}}
"""


def write_tasks(folder: Path, count: int) -> None:
    """YAML and JSON lines as that library reads them."""
    found = Gaps().load()
    questions = found.questions[:: len(found.questions) // count][:count]
    words = [question.answers[0] for question in questions]
    gaps, sentences = [], []
    for i, question in enumerate(questions):
        sentence = question.query.split('"')[1]
        before, after = sentence.split(GAP, 1)
        choices = [words[i], *(words[(i + step) % count] for step in (1, 2, 3))]
        order = np.random.default_rng(i).permutation(4)
        gaps.append({
            "before": before.strip() or "Then",
            "choices": [f"{choices[n]}{after}" for n in order],
            "answer": int(np.argmin(order)),
        })  # fmt: skip
        sentences.append({"text": before.strip() or "Then", "rest": words[i] + after})
    passages = [{"text": found.documents[question.gold[0]]} for question in questions]
    tasks = {
        "gaps": ("multiple_choice", "{{before}}", "answer", 'doc_to_choice: "choices"', gaps),
        "passages": (
            "loglikelihood_rolling", "", "{{text}}",
            "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]", passages,
        ),
        "sentences": (
            "generate_until", "{{text}}", "{{rest}}",
            'generation_kwargs: {until: ["."], max_gen_toks: 24, do_sample: false}\n'
            "metric_list: [{metric: exact_match}]",
            sentences,
        ),
    }  # fmt: skip
    for name, (kind, text, target, more, rows) in tasks.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        written = TASK.format(name=name, kind=kind, text=text, target=target, more=more, file=folder / f"{name}.jsonl")
        (folder / f"{name}.yaml").write_text(written, encoding="utf-8")


def answers(found: dict, name: str) -> list:
    """What a model said, request by request, in the order of the documents."""
    rows = sorted(found["samples"][name], key=lambda row: row["doc_id"])
    return [answer for row in rows for answer in row["filtered_resps"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="assets/smollm2-135m", help="run directory that can be exported")
    parser.add_argument("--count", type=int, default=32, help="documents of each task (default: 32)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        tasks, exported = Path(work) / "tasks", Path(work) / "exported"
        tasks.mkdir()
        write_tasks(tasks, args.count)
        if cli.main(["export", args.checkpoint, str(exported), "--dtype=float32"]):
            return 1
        names = ["gaps", "passages", "sentences"]
        ask = {"tasks": names, "task_manager": TaskManager(include_path=str(tasks)), "bootstrap_iters": 0}
        theirs = lm_eval.simple_evaluate(
            model=HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=4, max_length=512), **ask
        )
        with harness_model(args.checkpoint, max_length=512, cache="float32") as model:
            ours = lm_eval.simple_evaluate(model=model, **ask)
    for who, found in (("transformers", theirs), ("ours", ours)):
        print(f"{who}:\n{make_table(found)}")
    likelihoods = [
        np.abs(np.subtract(*([_value(x) for x in answers(found, name)] for found in (theirs, ours))))
        for name in names[:2]
    ]
    different = np.concatenate(likelihoods)
    texts = [a == b for a, b in zip(answers(theirs, "sentences"), answers(ours, "sentences"), strict=True)]
    result = {
        "likelihoods": len(different),
        "mean_difference": float(different.mean()),
        "largest_difference": float(different.max()),
        "equal_texts": f"{sum(texts)} of {len(texts)}",
        "pass": bool(different.mean() < LIKELIHOOD_GATE and different.max() < WORST and all(texts)),
    }
    print(json.dumps(result))
    return 0 if result["pass"] else 1


def _value(answer) -> float:
    return float(answer[0] if isinstance(answer, (list, tuple)) else answer)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    raise SystemExit(main())
