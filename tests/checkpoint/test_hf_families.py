"""Every family through the importer against logits, loss and gradients of transformers; then on eight devices."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from irope_jax.attention.mask import Sliding
from irope_jax.checkpoint.hf_config import model_from_hf
from irope_jax.checkpoint.hf_families import FAMILIES
from irope_jax.checkpoint.hf_places import layout_of, wanted_tensors
from irope_jax.core.config import ConfigError
from irope_jax.core.numerics import assert_equal_trees
from irope_jax.core.types import TokenInfo
from irope_jax.model.cost import abstract_params
from irope_jax.model.decoder import logits
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.sharding.rules import tree_shardings
from irope_jax.transfer import read_source
from tests.quickly import EVERYTHING

GOLDEN = Path(__file__).parent.parent / "golden" / "families"
NAMES = (
    "llama4_dense", "llama4_moe", "llama4_moe_interleave2", "cohere2", "smollm3",
    "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "olmo2", "olmo3",
)  # fmt: skip
SPREAD = MeshConfig(data=1, fsdp=2, context=2, expert=2)
ON_EIGHT = NAMES if EVERYTHING else ("llama4_moe_interleave2",)
"""All goldens on eight devices take a quarter of an hour; else one has everything: chunks that devices cut, experts
over two of them, dense layers between."""


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "golden.npz") as found:
        return dict(found)


def weights_of(name: str) -> Path:
    return GOLDEN / name.removesuffix("_packed_leftpad_notemp") / "model.safetensors"


def imported(name: str, tmp_path: Path):
    shutil.copyfile(weights_of(name), tmp_path / "model.safetensors")
    shutil.copyfile(GOLDEN / name / "config.json", tmp_path / "config.json")
    return read_source(tmp_path)


def mean_loss(model, params, tokens):
    scores = logits(model, params, tokens, TokenInfo.single(*tokens.shape))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(scores[:, :-1]), tokens[:, 1:, None], axis=-1)
    return -chosen.mean(), scores


def gradient_norms(model, grads, config) -> dict[str, float]:
    """L2 norms by the names of a model in memory, where transformers has experts fused."""
    found: dict[str, float] = {}
    tables = FAMILIES[config["model_type"]].tables
    table = next((rows for rows in tables if any(row.part is not None for row in rows)), tables[0])
    for name, places in wanted_tensors(table, model).items():
        squares = 0.0
        for row, layer, _ in places:
            node = grads["periods"][f"layer_{layer % len(model.period)}"] if row.per_layer else grads
            for key in row.path:
                node = node[key]
            squares += float(jnp.square(node[layer // len(model.period)] if row.per_layer else node).sum())
        found[name] = squares**0.5
    return found


def check(name, found, value, scores, grads):
    want = golden(name)
    assert np.abs(scores - want["main/logits"]).max() < 2e-4  # the original's own noise is 6e-5
    assert float(value) == pytest.approx(float(want["main/loss"]), abs=1e-5)
    config = json.loads((GOLDEN / name / "config.json").read_text())
    norms = gradient_norms(found.model, grads, config)
    theirs = {key.removeprefix("grad_l2/"): float(n) for key, n in want.items() if key.startswith("grad_l2/")}
    assert norms.keys() == theirs.keys()
    for key, norm in norms.items():
        assert norm == pytest.approx(theirs[key], rel=1e-3, abs=1e-8), key


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_gradients_are_those_of_the_original(name, tmp_path):
    found, tokens = imported(name, tmp_path), golden(name)["main/input_ids"]
    step = jax.jit(jax.value_and_grad(lambda p: mean_loss(found.model, p, tokens), has_aux=True))
    (value, scores), grads = step(found.params)
    check(name, found, value, scores, grads)


@pytest.mark.parametrize("name", ON_EIGHT)
def test_eight_devices_say_the_same(name, tmp_path):
    found, tokens = imported(name, tmp_path), golden(name)["main/input_ids"]
    whole, tokens = len(tokens), np.concatenate([tokens] * (4 // len(tokens)))  # fsdp 2 x expert 2 cut the batch
    mesh = make_mesh(SPREAD)
    with jax.set_mesh(mesh):
        params = jax.device_put(found.params, tree_shardings(abstract_params(found.model), mesh))
        step = jax.jit(jax.value_and_grad(lambda p: mean_loss(found.model, p, tokens), has_aux=True))
        (value, scores), grads = step(params)
    check(name, found, value, np.asarray(scores)[:whole], jax.device_get(grads))


@pytest.mark.parametrize("spread", [False, True] if EVERYTHING else [False])
def test_packed_and_left_padded_rows(spread, tmp_path):
    name = "llama4_dense_packed_leftpad_notemp"
    found, want = imported(name, tmp_path), golden(name)
    params, mesh = found.params, make_mesh(SPREAD) if spread else make_mesh(MeshConfig(), jax.devices()[:1])
    for case in ("packed", "leftpad"):
        tokens, positions = want[f"{case}/input_ids"], want[f"{case}/position_ids"].astype(np.int32)
        real = want.get(f"{case}/attention_mask", np.ones_like(tokens)).astype(bool)
        tokens, positions, real = (np.concatenate([it] * (4 if spread else 1)) for it in (tokens, positions, real))
        starts = (positions == 0) & real
        segments = np.where(real, np.cumsum(starts, axis=1), 0).astype(np.int32)
        rows = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        info = TokenInfo(np.where(real, positions, 0), segments, rows, first_row=0)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, tree_shardings(abstract_params(found.model), mesh))
            scores = jax.jit(lambda p, t, i: logits(found.model, p, t, i))(placed, tokens, info)
        one = want[f"{case}/logits"]
        assert np.abs(np.asarray(scores)[: len(one)] - one)[real[: len(one)]].max() < 1e-4


def test_other_layouts_of_experts_and_names_give_the_same(tmp_path):
    whole = imported("llama4_moe", tmp_path)
    tensors, apart = load_file(weights_of("llama4_moe")), {}
    for name, value in tensors.items():
        if name.endswith("gate_up_proj"):
            for e, both in enumerate(value):
                gate, up = np.split(both.T, 2)
                stem = name.replace("gate_up_proj", f"{e}.")
                apart |= {f"{stem}gate_proj.weight": gate.copy(), f"{stem}up_proj.weight": up.copy()}
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(value):
                apart[name.replace("down_proj", f"{e}.down_proj.weight")] = down.T.copy()
        else:
            apart[name] = value
    seen = {f"language_model.{name}": value for name, value in tensors.items()}
    seen["vision_model.class_embedding"] = np.zeros(3, np.float32)
    text = json.loads((tmp_path / "config.json").read_text())
    cases = ((apart, text), (seen, text), (seen, {"model_type": "llama4", "vision_config": {}, "text_config": text}))
    for i, (names, config) in enumerate(cases):
        path = tmp_path / str(i)
        path.mkdir()
        save_file(names, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config))
        other = read_source(path)
        assert other.model == whole.model
        assert_equal_trees(other.params, whole.params)


def config_of(name: str, **changes) -> dict:
    return json.loads((GOLDEN / name / "config.json").read_text()) | changes


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama4_moe", {"moe_layers": [9]}, "moe_layers"),
        ("llama4_moe", {"no_rope_layers": [1]}, "no_rope_layers.*8 entries"),
        ("llama4_moe", {"attention_chunk_size": None}, "attention_chunk_size=None"),
        ("llama4_moe", {"num_experts_per_tok": 5}, "top_k=5"),
        ("llama4_moe", {"attn_scale": float("nan")}, "attn_scale=nan"),
        ("llama4_moe", {"sliding_window": 8}, "sliding_window=8"),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 4}, "use_sliding_window"),
        ("qwen3_moe", {"mlp_only_layers": "x"}, "mlp_only_layers"),
        ("olmo3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("cohere2", {"logit_scale": 0}, "logit_scale=0"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias=True"),
    ],
)
def test_what_a_family_cannot_mean_is_named(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        model_from_hf(config_of(name, **changes))


def test_defaults_of_keys_that_are_not_there():
    short = {key: value for key, value in config_of("llama4_moe").items() if key not in ("moe_layers", "layer_types")}
    assert model_from_hf(short | {"no_rope_layers": []}) == model_from_hf(config_of("llama4_moe"))
    window = {key: value for key, value in config_of("mistral").items() if key != "sliding_window"}
    assert model_from_hf(window).pattern[0].mask == Sliding(4096)
    tables = FAMILIES["mixtral"].tables
    model = model_from_hf(config_of("mixtral"))
    assert layout_of(tables, model, wanted_tensors(tables[1], model)) is tables[1]
