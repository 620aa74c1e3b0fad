"""Six kinds of RoPE through the importer against the logits and gradients of transformers' Llama."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.checkpoint.hf_names import LLAMA
from irope_jax.core.types import TokenInfo
from irope_jax.model.cost import abstract_params
from irope_jax.model.decoder import logits
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.sharding.rules import tree_shardings
from irope_jax.transfer import read_source
from tests.quickly import EVERYTHING

GOLDEN = Path(__file__).parent.parent / "golden" / "llama_rope"
KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copyfile(GOLDEN / "model.safetensors", folder / "model.safetensors")
    shutil.copyfile(GOLDEN / f"{request.param}.json", folder / "config.json")
    with np.load(GOLDEN / f"{request.param}.npz") as golden:
        yield read_source(folder), dict(golden)


@pytest.mark.parametrize("length", ["main", "short"])
def test_logits_are_those_of_the_original(case, length):
    found, golden = case
    tokens = golden[f"{length}/input_ids"]
    ours = jax.jit(lambda p, t: logits(found.model, p, t, TokenInfo.single(*t.shape)))(found.params, tokens)
    assert np.abs(ours - golden[f"{length}/logits"]).max() < 1e-4  # the original's own noise is 8e-6


@pytest.mark.parametrize("devices", [1, 8] if EVERYTHING else [1])
def test_gradients_are_those_of_the_original(case, devices):
    found, golden = case
    tokens = golden["main/input_ids"]
    spread = MeshConfig(data=1, fsdp=2, context=2, expert=2) if devices == 8 else MeshConfig()
    mesh = make_mesh(spread, jax.devices()[:devices])
    tokens = np.concatenate([tokens] * (4 // len(tokens))) if devices == 8 else tokens  # fsdp and expert cut the batch

    def loss(params):
        scores = logits(found.model, params, tokens, TokenInfo.single(*tokens.shape))[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[:, 1:, None], axis=-1)
        return -chosen.mean()

    with jax.set_mesh(mesh):
        params = jax.device_put(found.params, tree_shardings(abstract_params(found.model), mesh))
        value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert value == pytest.approx(float(golden["main/loss"]), abs=1e-5)
    compared = 0
    for row in LLAMA:
        node = grads["periods"]["layer_0"] if row.per_layer else grads
        for name in row.path:
            node = node[name]
        for i in range(found.model.num_layers) if row.per_layer else (0,):
            wanted = float(golden[f"grad_l2/{row.name.format(i=i)}"])
            norm = float(jnp.linalg.norm(node[i] if row.per_layer else node))
            assert norm == pytest.approx(wanted, rel=1e-3), row.name.format(i=i)
            compared += 1
    assert compared == sum(name.startswith("grad_l2/") for name in golden) == 3 + 9 * found.model.num_layers


def test_a_wrong_kind_is_far_off():
    """What the tolerance tells apart."""
    with np.load(GOLDEN / "yarn.npz") as yarn, np.load(GOLDEN / "linear.npz") as linear:
        assert np.abs(yarn["main/logits"] - linear["main/logits"]).max() > 1
    assert json.loads((GOLDEN / "yarn.json").read_text())["rope_parameters"]["rope_type"] == "yarn"
