"""Checkpoints: what comes back, into any mesh, and what is said when it cannot."""

import jax
import numpy as np
import pytest

from irope_jax.checkpoint.native import CheckpointConfig, CheckpointError, Checkpoints
from irope_jax.core.config import ConfigError
from irope_jax.core.numerics import assert_equal_trees
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.optimizer import make_optimizer
from irope_jax.train.state import init_state, state_shardings
from tests import tiny

PLACE = {"taken": 17, "open": [[1, 2], []]}


def mesh_of(count, **axes):
    return make_mesh(MeshConfig(**axes), jax.devices()[:count])


@pytest.fixture(scope="module")
def parts():
    experiment = tiny.experiment()
    return experiment.model, make_optimizer(experiment.train.optimizer, experiment.train.steps)


@pytest.fixture(scope="module")
def state(parts):
    """A state on one device whose every leaf is different from its neighbours, moments and counters too."""
    fresh = init_state(*parts, mesh_of(1, data=1), seed=3)
    leaves, tree = jax.tree.flatten(fresh)
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape) if x.dtype == np.float32 else rng.integers(1000, size=x.shape)
    return jax.tree.unflatten(tree, [jax.device_put(draw(x).astype(x.dtype), x.sharding) for x in leaves])


@pytest.fixture(scope="module")
def run(tmp_path_factory, state):
    directory = tmp_path_factory.mktemp("run")
    with Checkpoints(directory, create=True) as checkpoints:
        checkpoints.save(5, state, PLACE, {"fingerprint": "abc"})
    return directory


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2), dict(data=8)])
def test_what_one_device_saved_is_read_into_any_mesh(run, parts, state, axes):
    mesh = mesh_of(8, **axes)
    abstract, shardings = state_shardings(*parts, mesh)
    with Checkpoints(run) as checkpoints:
        found, place, meta = checkpoints.restore(abstract, shardings)
        params = checkpoints.restore_params(abstract.params, shardings.params)
    assert_equal_trees(jax.device_get(found), jax.device_get(state))
    assert_equal_trees(jax.device_get(params), jax.device_get(state.params))
    assert (place, meta) == (PLACE, {"fingerprint": "abc"})
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    if axes.get("fsdp"):
        embedding = found.params["embedding"]
        assert embedding.addressable_shards[0].data.size == embedding.size // axes["fsdp"] // axes.get("tensor", 1)


def test_what_many_devices_saved_is_read_on_one(tmp_path, parts, state):
    abstract, shardings = state_shardings(*parts, mesh_of(8, data=2, fsdp=4))
    with Checkpoints(tmp_path, create=True) as checkpoints:
        checkpoints.save(1, jax.device_put(state, shardings), PLACE, {})
    abstract, shardings = state_shardings(*parts, mesh_of(1, data=1))
    with Checkpoints(tmp_path) as checkpoints:
        found, _, _ = checkpoints.restore(abstract, shardings)
    assert_equal_trees(found, state)


def test_reading_without_a_model_gives_the_same_arrays(run, state):
    with Checkpoints(run) as checkpoints:
        found, place, meta = checkpoints.read()
    assert_equal_trees(found["params"], jax.device_get(state.params))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert (place, meta) == (PLACE, {"fingerprint": "abc"})


def test_a_saved_array_may_be_donated_at_once(tmp_path):
    """Saving goes on in the background; what the next step writes over must not end up in the file."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.device_put(np.zeros((256, 1024), np.float32))
    with Checkpoints(tmp_path, CheckpointConfig(keep=9), create=True) as checkpoints:
        for number in range(1, 5):
            x = step(x)
            checkpoints.save(number, {"x": x}, {}, {})
    with Checkpoints(tmp_path) as checkpoints:
        for number in range(1, 5):
            found = checkpoints.read(number)[0]["x"]
            assert (found == number).all()


def test_a_checkpoint_of_another_shape_names_the_directory(run, parts):
    mesh = mesh_of(1, data=1)
    other = tiny.experiment(("model.num_layers", "4")).model
    abstract, shardings = state_shardings(other, parts[1], mesh)
    unreadable = pytest.raises(CheckpointError, match=r"checkpoints/5: cannot be read as this model")
    with Checkpoints(run) as checkpoints, unreadable as error:
        checkpoints.restore(abstract, shardings)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_not_there_is_said(run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoints here"):
        Checkpoints(tmp_path / "nothing")
    absent = pytest.raises(CheckpointError, match=r"no checkpoint of step 4; there are \[5\]")
    with Checkpoints(run) as checkpoints, absent:
        checkpoints.meta(4)
    with Checkpoints(tmp_path, create=True) as checkpoints:
        assert checkpoints.latest is None
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            checkpoints.read()


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path, create=True) as checkpoints:
        checkpoints.save(1, {"x": np.arange(4)}, {}, {})
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:  # reading beside a run that writes removes nothing
        assert checkpoints.latest == 1 and half.exists()
    with Checkpoints(tmp_path, create=True) as checkpoints:
        assert checkpoints.latest == 1
        checkpoints.save(2, {"x": np.arange(4)}, {}, {})
    assert not half.exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 2


@pytest.mark.parametrize("field", ["every", "keep", "keep_every"])
def test_impossible_schedules(field):
    with pytest.raises(ConfigError, match=f"{field}=0: must be at least 1"):
        CheckpointConfig(**{field: 0})
