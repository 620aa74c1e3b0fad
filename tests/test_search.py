"""`irope search-rope` end to end: files, going on after a kill, the gradient arm, refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from irope_jax import cli
from irope_jax.core.config import from_dict
from irope_jax.experiment import resolve, run_config
from irope_jax.position.scaling import LongRoPE
from tests import tiny

SEARCH = {
    "original_length": 32,
    "length": 64,
    "objective": {"kind": "text", "documents": 2},
    "method": {
        "kind": "evolution",
        "population": 6,
        "parents": 3,
        "mutations": 2,
        "crossovers": 2,
        "iterations": 3,
        "first_tokens": [0, 4],
    },
    "batch_tokens": 128,
    "at_once": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A trained run of RoPE over a global mask, and a search config."""
    place = tmp_path_factory.mktemp("search")
    overrides = [("model.pattern.1.position.kind", "rope"), ("evals", "()"), ("train.eval_every", "None")]
    (place / "tiny.json").write_text(json.dumps(tiny.values(*overrides)))
    assert cli.main(["train", f"--config={place / 'tiny.json'}", f"--run-dir={place / 'run'}"]) == 0
    (place / "search.json").write_text(json.dumps(SEARCH))
    return place


def arguments(place, out, *more):
    return [
        "search-rope", f"--checkpoint={place / 'run'}", f"--config={place / 'search.json'}", f"--out={out}", *more
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(place):
    assert cli.main(arguments(place, place / "whole")) == 0
    return place / "whole"


def test_a_search_leaves_factors_that_a_config_takes_a_picture_and_its_scores(place, whole, capfd):
    values = json.loads((whole / "factors.json").read_text())
    scaling = from_dict(LongRoPE, values)
    assert scaling.factor == 2.0 and scaling.original_length == 32 and len(scaling.long_factor) == 4
    lines = (whole / "scores.jsonl").read_text().splitlines()
    scores = [json.loads(line)["score"] for line in lines[1:]]
    best = min(scores)
    assert 6 <= len(scores) <= 6 + 3 * 4
    assert (whole / "factors.png").stat().st_size > 10_000
    # the winner, put into the config as the file stands, is the model whose loss was its score
    experiment = resolve(run_config(place / "run"), [("model.pattern.1.position.scaling", json.dumps(values))])
    assert experiment.model.pattern[1].position.scaling == scaling
    (place / "scaled.json").write_text(json.dumps(tiny.values()))
    capfd.readouterr()
    evaluation = json.dumps([{"kind": "perplexity", "lengths": [64], "tokens": 128, "batch_tokens": 128}])
    code = cli.main(
        [
            "eval", str(place / "run"), f"--config.model.pattern.1.position.scaling={json.dumps(values)}",
            f"--config.evals={evaluation}",
        ]
    )  # fmt: skip
    out = capfd.readouterr().out
    assert code == 0 and f"nll_by_length  {best:.4f}" in out


def test_killed_and_started_again_it_gives_the_same_answer(place, whole, tmp_path):
    """A process that dies by SIGKILL between two scores; then the same command."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "irope_jax.cli", *arguments(place, out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    log = out / "scores.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = log.read_text().count("\n")
    assert 4 < before < (whole / "scores.jsonl").read_text().count("\n")
    assert cli.main(arguments(place, out)) == 0
    assert (out / "factors.json").read_bytes() == (whole / "factors.json").read_bytes()
    scored = lambda path: [json.loads(line) for line in (path / "scores.jsonl").read_text().splitlines()[1:]]
    assert [(c["steps"], c["first_tokens"]) for c in scored(out)] == [
        (c["steps"], c["first_tokens"]) for c in scored(whole)
    ]


def test_factors_may_be_trained_and_compared(place, whole, tmp_path, capfd):
    more = [
        "--config.method.kind=gradient", "--config.method.steps=4", f"--compare={whole / 'factors.json'}",
        "--config.attention_policy=none",
    ]  # fmt: skip
    capfd.readouterr()
    assert cli.main(arguments(place, tmp_path / "out", *more)) == 0
    assert "trained" in capfd.readouterr().out
    values = json.loads((tmp_path / "out" / "factors.json").read_text())
    assert values["attention_policy"] == "none" and values["long_factor"] == sorted(values["long_factor"])


def test_needles_score_too(place, tmp_path):
    more = [
        "--config.objective.kind=needle", "--config.objective.documents=2", "--config.method.iterations=0",
        "--config.method.population=3", "--config.length=256", "--config.batch_tokens=512",
    ]  # fmt: skip
    assert cli.main(arguments(place, tmp_path / "out", *more)) == 0
    assert (tmp_path / "out" / "factors.json").exists()


def test_mistakes_are_one_line(place, whole, tmp_path, capfd):
    for more, code, message in (
        (["--config.length=32"], 2, "config.length=32: must be above original_length=32"),
        (["--config.method.populatoin=3"], 2, "did you mean 'population'"),
        (["--config.objective.documents=100000"], 2, "config.objective.documents=100000"),
        (["--config.objective.first_position=64"], 2, "config.objective.first_position=64"),
        ([f"--compare={place / 'search.json'}"], 2, "--compare"),
        ([f"--out={whole}", "--config.method.seed=1"], 1, "scores of another search"),
        ([f"--checkpoint={tmp_path}"], 1, "not a run directory"),
        ([f"--checkpoint={place / 'run'}", "--step=5"], 1, "no checkpoint of step 5"),
    ):
        capfd.readouterr()
        assert cli.main(arguments(place, tmp_path / "out", *more)) == code, more
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("irope: error: ") and message in error, error
    (place / "local.json").write_text(json.dumps(tiny.values(("evals", "()"), ("train.eval_every", "None"))))
    assert cli.main(["train", f"--config={place / 'local.json'}", f"--run-dir={tmp_path / 'local'}"]) == 0
    capfd.readouterr()
    assert cli.main(arguments(place, tmp_path / "out", f"--checkpoint={tmp_path / 'local'}")) == 2
    assert "no layer rotates over a global mask" in capfd.readouterr().err
