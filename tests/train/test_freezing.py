"""What is trained by pattern, and the biases that routers choose by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.core.numerics import assert_equal_trees
from irope_jax.core.types import Batch, TokenInfo
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from irope_jax.train.state import init_state, state_shardings
from irope_jax.train.step import make_train_step
from tests import tiny

MIXED = dict(
    kind="moe", num_experts=4, hidden_dim=8, top_k=2, router=dict(kind="softmax"), balance=dict(bias_rate=0.01)
)
LAYER = dict(position=dict(kind="rope"), mask=dict(kind="global"), ffn=MIXED)
ONE = (("model.num_layers", "1"), ("model.pattern", str((LAYER,))))


def stepped(optimizer: OptimizerConfig, *, accumulate: int = 1):
    model = tiny.experiment(*ONE).model
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    transform = make_optimizer(optimizer, 4)
    state = init_state(model, transform, mesh, 0)
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, model.vocab_size)
    batch = Batch(tokens, jnp.roll(tokens, -1, 1), jnp.ones(tokens.shape), TokenInfo.single(*tokens.shape))
    step = make_train_step(model, transform, learning_rate(optimizer, 4), accumulate=accumulate)
    after, scalars = jax.jit(step)(state, batch)
    _, shardings = state_shardings(model, transform, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(after)
    return state, after, scalars


def test_only_what_a_pattern_names_moves():
    before, after, _ = stepped(OptimizerConfig(trainable=("*norm/scale", "embedding"), frozen=("final_norm/*",)))
    for path, old in jax.tree_util.tree_leaves_with_path(before.params):
        name = "/".join(key.key for key in path)
        new = after.params
        for key in path:
            new = new[key.key]
        moves = (name.endswith("_norm/scale") and not name.startswith("final")) or name == "embedding"
        assert bool((new != old).any()) == (moves or name.endswith("balance_bias")), name
    trained = sum(x.size for x in jax.tree.leaves(before.params["embedding"])) + 2 * 16
    assert sum(x.size for x in jax.tree.leaves(after.opt_state)) == pytest.approx(2 * trained, abs=3)  # and counters


def test_patterns_that_match_nothing_are_named():
    for field, value in (("trainable", ("*nrom*",)), ("frozen", ("head",)), ("frozen", ("*",))):
        with pytest.raises(ConfigError, match=r"train\.optimizer"):
            stepped(OptimizerConfig(**{field: value}))


def test_biases_of_routers_move_by_their_rule_alone():
    before, after, scalars = stepped(OptimizerConfig(weight_decay=10.0))
    bias = lambda state: np.asarray(state.params["periods"]["layer_0"]["feed_forward"]["balance_bias"])
    moved = bias(after) - bias(before)
    assert set(np.round(np.abs(moved), 6).ravel()) <= {0.0, np.float32(0.01)} and moved.any()
    assert float(scalars["router_dropped"]) == 0 and float(scalars["router_max_load"]) >= 1
    _, in_parts, _ = stepped(OptimizerConfig(), accumulate=2)
    assert_equal_trees(bias(in_parts), bias(after))  # the loads of parts are those of the whole
