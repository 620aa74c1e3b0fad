"""Hugging Face folders, whole and broken: every source is read exactly or refused with one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from irope_jax.checkpoint.hf_config import context_length, model_from_hf
from irope_jax.checkpoint.hf_names import LLAMA
from irope_jax.checkpoint.native import CheckpointError
from irope_jax.core.config import ConfigError
from irope_jax.core.numerics import assert_equal_trees
from irope_jax.transfer import read_source

CONFIG = {
    "model_type": "llama",
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MODEL = model_from_hf(CONFIG)
ABSENT = object()


def tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    rng, found = np.random.default_rng(0), {}
    for row in LLAMA:
        for i in range(2) if row.per_layer else (0,):
            found[row.name.format(i=i)] = rng.standard_normal(row.source_shape(MODEL)).astype(dtype)
    return found


def folder(path: Path, weights=None, config=CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors() if weights is None else weights, path / "model.safetensors")
    return path


def sharded(path: Path) -> Path:
    """The same in two files and an index."""
    weights, names = tensors(), {}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    for number, part in enumerate((list(weights)[::2], list(weights)[1::2])):
        save_file({name: weights[name] for name in part}, path / f"part-{number}.safetensors")
        names |= dict.fromkeys(part, f"part-{number}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return path


def read(path: Path):
    found = read_source(path)
    assert found.params  # what only the weights show is found when they are read
    return found


def test_axes_of_every_tensor_end_up_where_they_belong(tmp_path):
    """Written out by hand, against the table."""
    w, params = tensors(), read(folder(tmp_path / "m")).params
    layer = params["periods"]["layer_0"]
    for i in range(2):
        name = f"model.layers.{i}."
        for ours, theirs, heads in (("query", "q", 3), ("key", "k", 1), ("value", "v", 1)):
            want = w[f"{name}self_attn.{theirs}_proj.weight"].reshape(heads, 8, 12).transpose(2, 0, 1)
            np.testing.assert_array_equal(layer["attention"][ours][i], want)
        out = w[f"{name}self_attn.o_proj.weight"].reshape(12, 3, 8).transpose(1, 2, 0)
        np.testing.assert_array_equal(layer["attention"]["out"][i], out)
        for part in ("gate", "up", "down"):
            np.testing.assert_array_equal(layer["feed_forward"][part][i], w[f"{name}mlp.{part}_proj.weight"].T)
        np.testing.assert_array_equal(layer["attention_norm"]["scale"][i], w[f"{name}input_layernorm.weight"])
    np.testing.assert_array_equal(params["head"], w["lm_head.weight"].T)
    for row in LLAMA:
        some = w[row.name.format(i=0)]
        np.testing.assert_array_equal(row.write([row.read(some, MODEL)], MODEL), some)


def test_shards_and_number_formats_give_the_same(tmp_path):
    whole = read(folder(tmp_path / "whole")).params
    assert_equal_trees(read(sharded(tmp_path / "sharded")).params, whole)
    import ml_dtypes

    for dtype in (np.float16, ml_dtypes.bfloat16):
        low = read(folder(tmp_path / "low", tensors(dtype))).params
        want = tensors(dtype)["model.norm.weight"].astype(np.float32)
        np.testing.assert_array_equal(low["final_norm"]["scale"], want)


def test_tied_heads_and_idle_buffers(tmp_path):
    tied = CONFIG | {"tie_word_embeddings": True}
    weights = tensors() | {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    refused(folder(tmp_path / "two", weights, tied), r"lm_head.weight is not model.embed_tokens.weight")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    for path in (folder(tmp_path / "twice", weights, tied), tmp_path / "once"):
        found = read(path if path.exists() else folder(path, {n: w for n, w in weights.items() if "lm" not in n}, tied))
        assert "head" not in found.params and found.model.output_head == "tied" and found.context == 64


def refused(path: Path, message: str, kind=CheckpointError):
    with pytest.raises(kind, match=message) as error:
        read(path)
    assert "\n" not in str(error.value)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    more = tensors() | {"model.layers.0.self_attn.q_proj.bias": np.ones(24, np.float32)}
    refused(folder(tmp_path / "a", more), r"does not have: model.layers.0.self_attn.q_proj.bias")
    fewer = tensors()
    del fewer["model.layers.1.mlp.up_proj.weight"]
    refused(folder(tmp_path / "b", fewer), r"missing: model.layers.1.mlp.up_proj.weight")
    other = tensors() | {"model.norm.weight": np.ones(13, np.float32)}
    refused(folder(tmp_path / "c", other), r"model.norm.weight has shape \[13\].*\[12\]")
    whole = tensors() | {"model.norm.weight": np.ones(12, np.int8)}
    refused(folder(tmp_path / "e", whole), r"model.norm.weight holds int8 numbers; quantised")
    broken = tensors() | {"model.norm.weight": np.full(12, np.nan, np.float32)}
    refused(folder(tmp_path / "d", broken), r"model.norm.weight holds values that are not finite")


def test_damaged_and_hostile_files_are_one_line(tmp_path):
    path = folder(tmp_path / "cut")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(path, r"model.safetensors: not a whole safetensors file")
    (path / "model.safetensors").write_bytes(b"\xff" * 64)
    refused(path, r"not a whole safetensors file")

    path = sharded(tmp_path / "climbing")
    index = path / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": names | {"lm_head.weight": "../../etc/passwd"}}))
    refused(path, r"'../../etc/passwd', which is not a file of this folder")
    index.write_text(json.dumps({"weight_map": names | {"lm_head.bias": "part-0.safetensors"}}))
    refused(path, r"part-0.safetensors: lacks 'lm_head.bias'")
    index.write_text(json.dumps({"weight_map": [1]}))
    refused(path, r"no weight_map")
    (path / "part-1.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": names}))
    refused(path, r"part-1.safetensors: not a whole")

    path = tmp_path / "pickle"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "pytorch_model.bin").write_bytes(b"x")
    refused(path, r"pytorch_model.bin is a pickle, which is not read")
    (path / "config.json").write_text('{"model_type": ')
    refused(path, r"config.json: not a readable JSON file")
    refused(tmp_path / "nothing", r"no such file or folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type='gpt2'.*llama"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'"),
        ({"attention_bias": True}, r"attention_bias=True"),
        ({"sliding_window": 4096}, r"sliding_window=4096"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config"),
        ({"num_local_experts": 8}, r"num_local_experts=8.*not a key"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, r"layer_types.*full_attention"),
        ({"layer_types": 5}, r"layer_types=5"),
        ({"model_type": "mistral", "sliding_window": None, "num_key_value_heads": ABSENT}, r"num_kv_heads=8"),
        ({"partial_rotary_factor": 0.5}, r"^\S*config.json.partial_rotary_factor=0.5"),
        ({"hidden_size": -1}, r"hidden_size=-1"),
        ({"hidden_size": 1.5}, r"hidden_size=1.5"),
        ({"rms_norm_eps": "x"}, r"rms_norm_eps='x'"),
        ({"num_key_value_heads": 2}, r"num_kv_heads=2.*num_heads=3"),
        ({"head_dim": 7}, r"head_dim=7.*even"),
    ],
)
def test_configs_that_are_not_supported_name_the_key(tmp_path, change, message):
    config = {key: value for key, value in (CONFIG | change).items() if value is not ABSENT}
    refused(folder(tmp_path / "m", config=config), message, ConfigError)


def test_keys_that_are_not_there_are_what_transformers_takes():
    absent = ("num_key_value_heads", "max_position_embeddings")
    short = {key: value for key, value in CONFIG.items() if key not in absent}
    assert model_from_hf(short).num_kv_heads == 3 and context_length(short) == 2048
    assert context_length(short | {"model_type": "mistral"}) == 131_072
    assert model_from_hf(CONFIG | {"model_type": "mistral", "sliding_window": None}) == MODEL
