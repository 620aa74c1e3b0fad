"""The training state: where optimizer state lies, and which weights of a checkpoint are used."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from irope_jax.checkpoint.native import CheckpointError, Checkpoints
from irope_jax.core.config import to_dict
from irope_jax.core.numerics import assert_equal_trees
from irope_jax.position import temperature
from irope_jax.sharding.mesh import MeshConfig, abstract_mesh, make_mesh
from irope_jax.train.algorithms import Adafactor
from irope_jax.train.optimizer import OptimizerConfig, make_optimizer
from irope_jax.train.state import (
    evaluation_params,
    fresh_params,
    init_state,
    load_params,
    params_for,
    params_from,
    start_from,
    state_shardings,
)  # fmt: skip
from tests import tiny

AVERAGING = OptimizerConfig(ema_decay=0.9)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def state(mesh):
    fresh = init_state(tiny.experiment().model, make_optimizer(AVERAGING, 10), mesh, 0)
    return fresh.replace(averaged=jax.tree.map(lambda a: a + 1, fresh.averaged))


def test_factored_moments_are_cut_as_the_axes_that_are_left():
    """[R, D, N, H] = [1, 16, 2, 8] without its longest axis, and without its second; a square feed-forward as well."""
    model = tiny.experiment().model
    optimizer = make_optimizer(OptimizerConfig(algorithm=Adafactor(min_factored=4)), 10)
    abstract, shardings = state_shardings(model, optimizer, abstract_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    found = {}
    for (path, leaf), place in zip(
        jax.tree_util.tree_leaves_with_path(abstract.opt_state), jax.tree.leaves(shardings.opt_state), strict=True
    ):
        found[jax.tree_util.keystr(path, simple=True, separator="/").split("inner_state/0/")[-1]] = leaf.shape, place
    cut = ("fsdp", "context")
    query, up = "periods/layer_0/attention/query", "periods/layer_0/feed_forward/up"
    assert (found[f"v_row/{query}"][0], found[f"v_row/{query}"][1].spec) == ((1, 2, 8), P(None, "tensor", None))
    assert (found[f"v_col/{query}"][0], found[f"v_col/{query}"][1].spec) == ((1, 16, 2), P(None, cut, "tensor"))
    assert found[f"v_row/{up}"][0] == (1, 16) and len(found[f"v_row/{up}"][1].spec) == 2
    assert found["v_row/embedding"][1].spec == P(cut) and found["v_col/embedding"][1].spec == P("tensor")
    assert found["v/embedding"][0] == (1,) and found["v/embedding"][1].spec == P()


def test_evaluations_use_the_averaged_weights_in_the_types_of_the_trained(state):
    assert_equal_trees(evaluation_params(state), state.averaged)
    halves = state.replace(params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.params))
    assert {leaf.dtype for leaf in jax.tree.leaves(evaluation_params(halves))} == {jnp.dtype(jnp.bfloat16)}
    assert evaluation_params(state.replace(averaged=None)) is state.params


def test_a_checkpoint_gives_its_averaged_weights_unless_asked_for_the_others(tmp_path, state, mesh):
    model = tiny.experiment().model
    with Checkpoints(tmp_path, create=True) as checkpoints:
        checkpoints.save(1, state, {}, {"model": to_dict(model)})
    assert_equal_trees(load_params(tmp_path, model, mesh)[0], state.averaged)
    assert_equal_trees(params_from(str(tmp_path), model, mesh)[0], state.averaged)
    assert_equal_trees(params_from(str(tmp_path), model, mesh, "params")[0], state.params)
    with Checkpoints(tmp_path) as checkpoints:
        read = lambda weights: checkpoints.arrays(weights=weights)["final_norm", "scale"].read().result()
        np.testing.assert_array_equal(read(None), state.averaged["final_norm"]["scale"])
        np.testing.assert_array_equal(read("params"), state.params["final_norm"]["scale"])
    halves = dataclasses.replace(model, precision=dataclasses.replace(model.precision, params="bfloat16"))
    (dtype,) = {leaf.dtype for leaf in jax.tree.leaves(load_params(tmp_path, halves, mesh)[0])}
    assert dtype == jnp.bfloat16


def test_a_checkpoint_without_averaged_weights_gives_what_was_trained(tmp_path, state, mesh):
    model = tiny.experiment().model
    with Checkpoints(tmp_path, create=True) as checkpoints:
        checkpoints.save(1, state.replace(averaged=None), {}, {})
    assert_equal_trees(load_params(tmp_path, model, mesh)[0], state.params)
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load_params(tmp_path, model, mesh, weights="averaged")


def test_a_start_from_other_weights_forgets_moments_and_averages(state, mesh):
    model, optimizer = tiny.experiment().model, make_optimizer(AVERAGING, 10)
    used = state.replace(opt_state=jax.tree.map(lambda x: x + 1, state.opt_state))
    params = jax.tree.map(lambda p: p + 3, state.params)
    _, shardings = state_shardings(model, optimizer, mesh)
    found = start_from(used, params, optimizer, shardings)
    assert_equal_trees(found.params, params)
    assert_equal_trees(found.averaged, params)
    assert_equal_trees(found.opt_state, optimizer.init(nn.meta.unbox(params)))
    places = lambda tree: {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}
    assert not places(found.params) & places(found.averaged)  # both are donated


def layers_of(*learned):
    """A model of four layers, by whether each layer of its period learns its temperature."""
    temper = {True: temperature.SSMax(16), False: temperature.LogN(16)}
    layer = tiny.experiment().model.pattern[0]
    pattern = tuple(dataclasses.replace(layer, temperature=temper[one]) for one in learned)
    return dataclasses.replace(tiny.experiment().model, num_layers=4, pattern=pattern)


@pytest.mark.parametrize("before, after", [((False,), (True,)), ((False, True), (True,)), ((True,), (False, True))])
def test_a_learned_temperature_begins_as_in_a_fresh_model_and_goes_with_its_layer(tmp_path, mesh, before, after):
    source, target = layers_of(*before), layers_of(*after)
    with Checkpoints(tmp_path, create=True) as checkpoints:
        saved = init_state(source, make_optimizer(OptimizerConfig(), 10), mesh, 0)
        moved = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf + 1 if "temperature" in jax.tree_util.keystr(path) else leaf, saved.params
        )
        checkpoints.save(1, saved.replace(params=moved), {}, {"model": to_dict(source)})
    params, _ = params_from(str(tmp_path), target, mesh)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh_params(target, mesh, 0))
    begun = temperature.SSMax(16).initial
    for i in range(4):
        attention = params["periods"][f"layer_{i % len(after)}"]["attention"]
        was = moved["periods"][f"layer_{i % len(before)}"]["attention"]
        np.testing.assert_array_equal(attention["query"][i // len(after)], was["query"][i // len(before)])
        if after[i % len(after)]:
            expected = begun + 1 if before[i % len(before)] else begun
            np.testing.assert_allclose(attention["temperature"][i // len(after)], expected, rtol=1e-6)
        else:
            assert "temperature" not in attention
    with pytest.raises(CheckpointError, match=r"attention/temperature of layers .*init_from"):  # evaluated, decoded
        params_for(tmp_path, source, target, mesh)
