"""One step: golden numbers, accumulation, bad steps, and every mesh the same."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.core.numerics import assert_close, assert_equal_trees
from irope_jax.core.types import Batch
from irope_jax.data.pipeline import make_iterator
from irope_jax.experiment import load_config, resolve
from irope_jax.model.decoder import logits
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.sharding.rules import batch_sharding
from irope_jax.train.optimizer import learning_rate, make_optimizer
from irope_jax.train.state import init_state, state_shardings
from irope_jax.train.step import make_train_step
from tests.quickly import keep

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "debug_steps.json"


@pytest.fixture(scope="module")
def debug():
    return resolve(load_config(str(ROOT / "configs" / "debug.py")))


@pytest.fixture(scope="module")
def small(debug):
    """Two of its four layers, one of each kind, and the attention that compiles fastest."""
    model = dataclasses.replace(debug.model, num_layers=2, pattern=debug.model.pattern[2:], attention="reference")
    return dataclasses.replace(debug, model=model)


@pytest.fixture(scope="module")
def batches(debug):
    source = make_iterator(debug.data)
    return [next(source) for _ in range(3)]


@cache
def prepared(experiment, mesh, **step_options):
    """A first state and the compiled step."""
    config = experiment.train
    optimizer = make_optimizer(config.optimizer, config.steps)
    _, shardings = state_shardings(experiment.model, optimizer, mesh)
    step = make_train_step(experiment.model, optimizer, learning_rate(config.optimizer, config.steps), **step_options)
    return init_state(experiment.model, optimizer, mesh, experiment.seed), jax.jit(
        step, out_shardings=(shardings, None)
    )


def run(experiment, batches, mesh: MeshConfig, devices=None, **step_options):
    """Parameters and scalars after one step per batch."""
    mesh = make_mesh(mesh, devices)
    state, step = prepared(experiment, mesh, **step_options)
    with jax.set_mesh(mesh):
        scalars = []
        for batch in batches:
            batch = jax.tree.map(lambda x: jax.device_put(np.asarray(x), batch_sharding(mesh)), batch)
            state, found = step(state, batch)
            scalars.append({name: float(value) for name, value in found.items()})
    return state, scalars


@pytest.fixture(scope="module")
def single(small, batches):
    return run(small, batches, MeshConfig(), jax.devices()[:1])


def test_three_steps_of_the_debug_config_give_the_recorded_numbers(debug, batches):
    """Made by `python -m tests.train.test_step`; a change here is a change of what training computes."""
    golden = json.loads(GOLDEN.read_text())
    _, scalars = run(debug, batches, MeshConfig(), jax.devices()[:1])
    for found, wanted in zip(scalars, golden, strict=True):
        assert_close({name: found[name] for name in wanted}, wanted, rtol=2e-4, atol=1e-6, what="scalars of a step")


MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(fsdp=2, context=2, tensor=2),
]


@pytest.mark.parametrize(
    "mesh", keep(MESHES[-1], of=MESHES), ids=lambda m: "-".join(f"{k}{v}" for k, v in m.sizes.items() if v != 1)
)
def test_every_mesh_trains_as_one_device_does(small, batches, single, mesh):
    attention = "reference" if mesh.context == 1 else "blockwise"
    model = dataclasses.replace(small.model, attention=attention)
    state, scalars = run(dataclasses.replace(small, model=model), batches, mesh.fill(8))
    assert_close([s["loss"] for s in scalars], [s["loss"] for s in single[1]], rtol=1e-5, atol=1e-5, what="losses")
    assert_close(
        jax.device_get(state.params), jax.device_get(single[0].params), rtol=1e-4, atol=2e-5, what="parameters"
    )


def test_accumulated_parts_give_the_gradient_of_the_whole(small, batches, single):
    state, scalars = run(small, batches, MeshConfig(), jax.devices()[:1], accumulate=4)
    assert_close([s["loss"] for s in scalars], [s["loss"] for s in single[1]], rtol=1e-5, atol=1e-5, what="losses")
    assert_close(state.params, single[0].params, rtol=1e-4, atol=2e-5, what="parameters")


def test_a_step_that_is_not_finite_changes_only_its_counters(small, batches):
    poisoned = dataclasses.replace(batches[1], weights=np.full_like(batches[1].weights, np.inf))
    before, _ = run(small, batches[:1], MeshConfig(), jax.devices()[:1])
    after, scalars = run(small, [batches[0], poisoned, poisoned], MeshConfig(), jax.devices()[:1])
    assert_equal_trees(after.params, before.params, what="parameters")
    assert_equal_trees(after.opt_state, before.opt_state, what="optimizer state")
    assert [s["skipped"] for s in scalars] == [0, 1, 2] and scalars[-1]["skipped_in_a_row"] == 2
    assert int(after.step) == 3
    recovered, scalars = run(small, [batches[0], poisoned, batches[1]], MeshConfig(), jax.devices()[:1])
    assert scalars[-1]["skipped"] == 1 and scalars[-1]["skipped_in_a_row"] == 0
    assert float(jnp.abs(recovered.params["embedding"] - before.params["embedding"]).max()) > 0


def test_z_loss_pulls_the_partition_function_towards_one(small, batches):
    plain, _ = run(small, batches * 3, MeshConfig(), jax.devices()[:1])
    pulled, _ = run(small, batches * 3, MeshConfig(), jax.devices()[:1], z_loss=10.0)

    @jax.jit
    def z(state, batch: Batch):
        return jnp.square(jax.nn.logsumexp(logits(small.model, state.params, batch.tokens, batch.info), -1)).mean()

    assert z(pulled, batches[0]) < 0.9 * z(plain, batches[0])


if __name__ == "__main__":
    experiment = resolve(load_config(str(ROOT / "configs" / "debug.py")))
    source = make_iterator(experiment.data)
    _, found = run(experiment, [next(source) for _ in range(3)], MeshConfig(), jax.devices()[:1])
    keep = ("loss", "accuracy", "grad_norm", "update_norm", "param_norm", "learning_rate", "weight")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps([{name: s[name] for name in keep} for s in found], indent=1) + "\n")
