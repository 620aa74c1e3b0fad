"""`irope import` end to end: a run directory like any other, and nothing half-made."""

import json
import shutil
from pathlib import Path

import numpy as np

from irope_jax import cli
from irope_jax.core.numerics import assert_equal_trees
from irope_jax.experiment import resolve, run_config
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.state import load_params, params_from
from irope_jax.transfer import read_source
from tests.checkpoint.test_gguf import TOKENS, write
from tests.checkpoint.test_hf_weights import CONFIG, folder, tensors

VOCABULARY = 288
BYTES = "--config.data.tokenizer={'kind': 'bytes'}"


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
    assert cli.main(["import", str(src), str(dst), "--config.evals.0.tokens=64", BYTES]) == 0
    assert "parameters" in capfd.readouterr().out
    assert [p.name for p in dst.parent.iterdir()] == ["model"]  # no temporary folder stays
    experiment = resolve(run_config(dst))
    mesh = make_mesh(MeshConfig())
    params, step = load_params(dst, experiment.model, mesh)
    assert step == 0
    assert_equal_trees(params, read_source(src).params)
    started, _ = params_from(str(dst), experiment.model, mesh)
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
    path = write(tmp_path / "m.gguf", weights)
    assert cli.main(["import", str(path), str(dst), change]) == 0
    experiment = resolve(run_config(dst))
    assert experiment.model.pattern[0].position.scaling.kind == "ntk"
    assert experiment.data.tokenizer.path == str(dst.absolute() / "tokenizer.json")
    assert experiment.data.tokenizer.encode("the 4").tolist() == [TOKENS.index(t) for t in ("the", "Ġ", "4")]
    assert (experiment.data.tokenizer.bos_id, experiment.data.tokenizer.eos_id) == (0, 1)
    # the header names no pad: an id of its own would be one more than the model has
    assert experiment.data.tokenizer.pad_id == 1 and experiment.data.tokenizer.vocab_size == len(TOKENS)


def test_special_tokens_are_named_by_text_or_by_number(tmp_path):
    """As most of the family: no pad, and perhaps only the numbers of config.json."""
    config = CONFIG | {"bos_token_id": 0, "eos_token_id": [1, 5]}
    src = folder(tmp_path / "hf", config=config)
    added = [{"id": 0, "content": "<s>"}, {"id": 1, "content": "</s>"}, {"id": 2, "content": "<eot>"}]
    (src / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert read_source(src).special == {"bos": "<s>", "eos": "</s>"}
    named = {"bos_token": None, "eos_token": {"content": "<eot>"}, "pad_token": None}
    (src / "tokenizer_config.json").write_text(json.dumps(named))
    assert read_source(src).special == {"bos": "<s>", "eos": "<eot>"}


def test_layers_may_be_changed_on_the_way_and_widths_may_not(tmp_path, capfd):
    src, plain, dst = source(tmp_path / "hf"), tmp_path / "plain", tmp_path / "irope"
    few = "--config.evals.0.tokens=64"
    for change, message in (("d_model=24", "at embedding, the changed model needs"), ("num_layers=4", "with 2 layers")):
        capfd.readouterr()
        assert cli.main(["import", str(src), str(plain), f"--config.model.{change}"]) == 2
        assert message in capfd.readouterr().err.strip().splitlines()[-1] and not plain.exists()
    ffn = dict(kind="swiglu", hidden_dim=CONFIG["intermediate_size"])
    local = dict(position=dict(kind="rope"), mask=dict(kind="chunked", size=8), ffn=ffn)
    layers = [local, dict(position=dict(kind="nope"), mask=dict(kind="global"), ffn=ffn)]
    assert cli.main(["import", str(src), str(plain), few, BYTES]) == 0
    assert cli.main(["import", str(src), str(dst), few, BYTES, f"--config.model.pattern={layers}"]) == 0
    experiment, mesh = resolve(run_config(dst)), make_mesh(MeshConfig())
    params, _ = load_params(dst, experiment.model, mesh)
    assert set(params["periods"]) == {"layer_0", "layer_1"}
    assert_equal_trees(params, params_from(str(plain), experiment.model, mesh)[0])
    assert cli.main(["eval", str(dst)]) == 0


def test_what_fails_leaves_nothing(tmp_path, capfd):
    src = source(tmp_path / "hf")
    broken = shutil.copytree(src, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x00" * 10)
    weights = tensors() | {"model.norm.weight": np.full(12, np.nan, np.float32)}
    broken_inside = folder(tmp_path / "inside", weights)
    other = shutil.copytree(src, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    dst = tmp_path / "out" / "model"
    for path, code, message in (
        (broken, 2, "not a whole safetensors file"),
        (broken_inside, 2, "model.norm.weight holds values that are not finite"),
        (other, 2, "config.json.model_type='mamba'"),
        (tmp_path / "nothing", 2, "no such file or folder"),
        (src / "config.json", 2, "not a model"),
    ):
        capfd.readouterr()
        assert cli.main(["import", str(path), str(dst)]) == code
        assert message in capfd.readouterr().err.strip().splitlines()[-1]
        assert not dst.exists() and not (dst.parent.exists() and list(dst.parent.iterdir()))
    (src / "tokenizer.json").write_bytes(b"\xff\xfe")
    assert cli.main(["import", str(src), str(dst)]) == 2
    assert "tokenizer.json: not a readable text file" in capfd.readouterr().err
    (src / "tokenizer.json").unlink()
    assert cli.main(["import", str(src), str(src / "config.json" / "model")]) == 2
    assert "no folder can be made there" in capfd.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert cli.main(["import", str(src), str(tmp_path / "link")]) == 2
    assert "is there already" in capfd.readouterr().err
    dst.mkdir(parents=True)
    assert cli.main(["import", str(src), str(dst)]) == 2
    assert "is there already" in capfd.readouterr().err


def test_a_model_without_a_tokenizer_knows_ids_only(tmp_path, capfd):
    src = folder(tmp_path / "hf", config=CONFIG | {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 99})
    assert cli.main(["import", str(src), str(tmp_path / "run")]) == 0
    tokenizer = resolve(run_config(tmp_path / "run")).data.tokenizer
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (32, 3, 4, 0)
    capfd.readouterr()
    assert cli.main(["eval", str(tmp_path / "run")]) == 2
    assert "there is no tokenizer; give one" in capfd.readouterr().err
