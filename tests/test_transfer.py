"""`irope import` end to end: a run directory like any other, and nothing half-made."""

import json
import shutil
from pathlib import Path

import numpy as np

from irope_jax import cli
from irope_jax.core.numerics import assert_equal_trees
from irope_jax.experiment import resolve, run_config
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.optimizer import make_optimizer
from irope_jax.train.state import load_params, params_from, state_shardings
from irope_jax.transfer import read_source
from tests.checkpoint.test_gguf import TOKENS, write
from tests.checkpoint.test_hf_weights import CONFIG, folder, tensors

VOCABULARY = 288


def source(path: Path) -> Path:
    """A folder with room for bytes."""
    config = CONFIG | {"vocab_size": VOCABULARY}
    weights = tensors()
    rng = np.random.default_rng(2)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = rng.standard_normal((VOCABULARY, 12)).astype(np.float32)
    return folder(path, weights, config)


def test_an_imported_model_is_a_run_directory(tmp_path, capfd, monkeypatch):
    src, dst = source(tmp_path / "hf"), tmp_path / "runs" / "model"
    assert cli.main(["import", str(src), str(dst), "--config.evals.0.tokens=64"]) == 0
    assert "parameters" in capfd.readouterr().out
    assert [p.name for p in dst.parent.iterdir()] == ["model"]  # no temporary folder stays
    experiment = resolve(run_config(dst))
    mesh = make_mesh(MeshConfig())
    params, step = load_params(dst, experiment.model, mesh)
    assert step == 0
    assert_equal_trees(params, read_source(src, quiet=True).params)
    _, shardings = state_shardings(experiment.model, make_optimizer(experiment.train.optimizer, 1), mesh)
    started, _ = params_from(str(dst), experiment.model, mesh, shardings.params)
    assert_equal_trees(started, params)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", str(dst)]) == 0
    assert "nll_by_length" in capfd.readouterr().out


def test_a_gguf_model_brings_its_tokenizer(tmp_path, capfd):
    weights, rng = tensors(), np.random.default_rng(2)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = rng.standard_normal((len(TOKENS), 12)).astype(np.float32)
    dst = tmp_path / "model"
    change = "--config.model.pattern.0.position.scaling={'kind': 'ntk', 'factor': 2.0}"
    # the pad token, which the header does not name, gets an id past the vocabulary: one more than the model has
    assert cli.main(["import", str(write(tmp_path / "m.gguf", weights)), str(dst)]) == 2
    assert "vocab_size=" in capfd.readouterr().err and not dst.exists()
    path = write(tmp_path / "n.gguf", weights, extra=[("add_pad_token_id", 1)])
    assert cli.main(["import", str(path), str(dst), change]) == 0
    experiment = resolve(run_config(dst))
    assert experiment.model.pattern[0].position.scaling.kind == "ntk"
    assert experiment.data.tokenizer.path == str(dst.absolute() / "tokenizer.json")
    assert experiment.data.tokenizer.encode("the 4").tolist() == [TOKENS.index(t) for t in ("the", "Ġ", "4")]
    assert (experiment.data.tokenizer.bos_id, experiment.data.tokenizer.eos_id) == (0, 1)


def test_what_fails_leaves_nothing(tmp_path, capfd):
    src = source(tmp_path / "hf")
    broken = shutil.copytree(src, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x00" * 10)
    small = folder(tmp_path / "small")
    other = shutil.copytree(src, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    dst = tmp_path / "out" / "model"
    for path, code, message in (
        (broken, 1, "not a whole safetensors file"),
        (small, 2, "vocab_size=32: without a tokenizer.json, text as bytes needs 267 tokens"),
        (other, 2, "config.json.model_type='mamba'"),
        (tmp_path / "nothing", 1, "no such file or folder"),
        (src / "config.json", 1, "not a model"),
    ):
        capfd.readouterr()
        assert cli.main(["import", str(path), str(dst)]) == code
        assert message in capfd.readouterr().err.strip().splitlines()[-1]
        assert not dst.exists() and not (dst.parent.exists() and list(dst.parent.iterdir()))
    dst.mkdir(parents=True)
    assert cli.main(["import", str(src), str(dst)]) == 2
    assert "is there already" in capfd.readouterr().err
