"""`irope generate` on the smallest run: what is printed, what is shared, what is refused."""

import contextlib
import io

import jax
import numpy as np
import pytest

from irope_jax import cli
from irope_jax.core.types import TokenInfo
from irope_jax.experiment import resolve, run_config
from irope_jax.model.decoder import logits
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.state import load_params
from tests import tiny

EXTENDED = "{'kind': 'self_extend', 'window': 4, 'group': 2}"


def irope(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(arguments))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("generate")
    code, _, err = irope(
        "train", f"--config={tiny.config_file(directory)}", f"--run-dir={directory / 'run'}", "--config.evals=()",
        "--config.train.steps=1", "--config.train.eval_every=1", "--config.model.init_std=0.5",
    )  # fmt: skip
    assert code == 0, err
    return directory / "run"


def test_the_text_is_what_forward_passes_say_on_all_devices(run):
    """Eight devices share the text by default."""
    code, out, err = irope("generate", f"--checkpoint={run}", "--prompt=Emma", "--tokens=9", "--ignore-eos")
    assert code == 0, err
    assert "read 5 tokens" in err and "wrote 9" in err and "8 steps" in err
    experiment = resolve(run_config(run))
    tokenizer = experiment.data.tokenizer
    params, _ = load_params(run, experiment.model, make_mesh(MeshConfig(), jax.devices()[:1]))
    text = [tokenizer.bos_id, *tokenizer.encode("Emma").tolist()]
    for _ in range(9):
        tokens = np.asarray([text + [0] * (14 - len(text))], np.int32)
        scores = logits(experiment.model, params, tokens, TokenInfo.single(1, 14))
        text.append(int(scores[0, len(text) - 1].argmax()))
    assert out == tokenizer.decode(np.asarray(text[5:])) + "\n"


def test_a_file_is_read_once_for_all_prompts_and_samples(run, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("It was a dark and stormy night; " * 3)
    flags = (f"--checkpoint={run}", f"--prompt-file={book}", "--prompt=A", "--prompt=Bc", "--tokens=5", "--piece=32")
    code, out, err = irope("generate", *flags, "--temperature=1", "--top-k=40", "--samples=2", "--cache=int8")
    assert code == 0, err
    assert [line for line in out.splitlines() if line.startswith("--- ")] == [
        f"--- prompt {prompt}, sample {sample}" for prompt in (1, 2) for sample in (1, 2)
    ]
    assert f"read {1 + 96 + 3} tokens" in err and "wrote 20" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--prompt: give the model something to go on from"),
        (("--prompt=a", "--top-p=2"), "top_p=2.0"),
        (("--prompt=a", "--min-p=0.1"), "min_p=0.1: filters draws"),
        (("--prompt=a", "--guesses=2", "--temperature=1"), "guesses=2"),
        (("--prompt-file=nowhere.txt",), "--prompt-file='nowhere.txt': cannot be read"),
        (
            ("--prompt=a", f"--config.model.pattern.1.position={EXTENDED}"),
            "config.model.pattern.1.position.kind='self_extend'",
        ),
    ],
)
def test_mistakes_are_one_line(run, flags, message):
    code, out, err = irope("generate", f"--checkpoint={run}", *flags)
    line = err.splitlines()[-1]
    assert code == 2 and out == "" and line.startswith("irope: error: ") and message in line, err
