"""Each algorithm against its formula in float64; a small model trained by each of them on one device and on eight."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax import show
from irope_jax.checkpoint.native import Checkpoints
from irope_jax.core.numerics import assert_close, assert_equal_trees
from irope_jax.core.types import Batch, TokenInfo
from irope_jax.model.cost import abstract_params
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.sharding.rules import batch_sharding
from irope_jax.train.algorithms import Adafactor, Lion, Muon, ScheduleFreeAdamW, matrix_axes
from irope_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from irope_jax.train.patterns import by_path
from irope_jax.train.schedules import ConstantRate
from irope_jax.train.state import init_state, state_shardings
from irope_jax.train.step import make_train_step
from tests import tiny
from tests.quickly import keep

RATE, DECAY = 0.1, 0.5
QUERY = {"periods": {"layer_0": {"attention": {"query": 0}}}}


def tree(array):
    return jax.tree.map(lambda _: array, QUERY)


def only(tree):
    (leaf,) = jax.tree.leaves(tree)
    return np.asarray(leaf)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def after(algorithm, params, gradients):
    """Parameters after one update per gradient, and the optimizer state; all decayed, nothing clipped."""
    config = OptimizerConfig(
        learning_rate=RATE,
        schedule=ConstantRate(),
        algorithm=algorithm,
        weight_decay=DECAY,
        no_decay=(),
        clip_norm=None,
    )
    optimizer = make_optimizer(config, 10)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
    return params, state, optimizer


def wide(*arrays):
    return [array.astype(np.float64) for array in arrays]


# ---- formulas -------------------------------------------------------------------------------------------------------


def test_lion_steps_by_the_sign_of_its_momentum():
    w, *g = draw(0, 5, 4), draw(1, 5, 4), draw(2, 5, 4)
    found, _, _ = after(Lion(b1=0.8, b2=0.9), {"w": w}, [{"w": x} for x in g])
    w, *g = wide(w, *g)
    momentum = np.zeros_like(w)
    for x in g:
        w = w - RATE * (np.sign(0.8 * momentum + 0.2 * x) + DECAY * w)
        momentum = 0.9 * momentum + 0.1 * x
    np.testing.assert_allclose(found["w"], w, rtol=1e-5, atol=1e-6)


def adafactor_matrix(w, gradients, factored):
    """Two-dimensional, relative, clipped at 1."""
    rows, columns, whole = np.zeros(w.shape[0]), np.zeros(w.shape[1]), np.zeros(w.shape)
    for step, x in enumerate(gradients):
        forget = 1 - (step + 1.0) ** -0.8
        square = x**2 + 1e-30
        rows = forget * rows + (1 - forget) * square.mean(1)
        columns = forget * columns + (1 - forget) * square.mean(0)
        whole = forget * whole + (1 - forget) * square
        second = np.outer(rows, columns) / rows.mean() if factored else whole
        update = x / np.sqrt(second)
        update = update / max(1.0, np.sqrt((update**2).mean()))
        w = w - RATE * max(np.sqrt((w**2).mean()), 1e-3) * update - RATE * DECAY * w
    return w


@pytest.mark.parametrize("min_factored", [4, 128])
def test_adafactor_factors_each_layer_of_a_stack_by_itself(min_factored):
    """Of six repeats: with 4 x 5 matrices the longest axis is that of the layers."""
    w, *g = draw(0, 6, 4, 5), draw(1, 6, 4, 5), 3 * draw(2, 6, 4, 5)
    found, _, _ = after(Adafactor(min_factored=min_factored), tree(w), [tree(x) for x in g])
    expected = [adafactor_matrix(*wide(w[i]), wide(*(x[i] for x in g)), min_factored == 4) for i in range(6)]
    np.testing.assert_allclose(only(found), np.stack(expected), rtol=1e-5, atol=1e-6)


def test_schedule_free_evaluates_the_running_average():
    """The recursion of Defazio et al. 2024, equation (3) and algorithm 1, with its three sequences."""
    w, *g = draw(0, 5), draw(1, 5), draw(2, 5), draw(3, 5)
    found, state, optimizer = after(ScheduleFreeAdamW(b2=0.9), {"w": w}, [{"w": x} for x in g])
    w, *g = wide(w, *g)
    z = x = y = w
    second = np.zeros(5)
    for step, gradient in enumerate(g, 1):
        second = 0.9 * second + 0.1 * gradient**2
        z = z - RATE * (gradient / (np.sqrt(second / (1 - 0.9**step)) + 1e-8) + DECAY * y)
        x = (1 - 1 / step) * x + z / step
        y = 0.9 * x + 0.1 * z
    np.testing.assert_allclose(found["w"], y, rtol=1e-5, atol=1e-6)
    averaged = optimizer.average({"w": w}, found, state, jnp.asarray(2))
    np.testing.assert_allclose(averaged["w"], x, rtol=1e-5, atol=1e-6)


def newton_schulz(matrix):
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan 2024
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


AS_MATRIX = {  # of one layer or expert: rows are what a product sums over
    "attention/query": ((3, 8, 2, 5), lambda w: w.reshape(8, 10)),
    "attention/out": ((3, 2, 5, 8), lambda w: w.reshape(10, 8)),
    "feed_forward/up": ((3, 4, 8, 6), None),  # [R, E, D, F]
}


@pytest.mark.parametrize("name", AS_MATRIX)
def test_muon_makes_each_layer_and_each_expert_orthogonal_by_itself(name):
    shape, flat = AS_MATRIX[name]
    w, *g = draw(0, *shape), draw(1, *shape), 100 * draw(2, *shape)
    g[0][1] *= 1e3  # of one layer: another layer must not see it
    room, leaf = name.split("/")
    place = lambda array: {"periods": {"layer_0": {room: {leaf: array}}}}
    found, _, _ = after(Muon(), place(w), [place(x) for x in g])
    w, *g = wide(w, *g)
    momentum = np.zeros_like(w)
    for step, x in enumerate(g, 1):
        momentum = 0.95 * momentum + 0.05 * x
        ahead = 0.95 * momentum / (1 - 0.95 ** (step + 1)) + 0.05 * x / (1 - 0.95**step)
        update = np.empty_like(w)
        for index in np.ndindex(*shape[:1] if flat else shape[:2]):
            matrix = flat(ahead[index]) if flat else ahead[index]
            made = newton_schulz(matrix)
            sizes = np.linalg.svd(made, compute_uv=False)
            assert sizes.min() > 0.3 and sizes.max() < 1.3  # nearly orthogonal
            update[index] = 0.2 * np.sqrt(max(matrix.shape)) * made.reshape(ahead[index].shape)
        w = w - RATE * (update + DECAY * w)
    np.testing.assert_allclose(only(found), w, rtol=1e-4, atol=1e-4)


def test_muon_takes_the_matrices_inside_layers_and_nothing_else():
    ffn = dict(kind="moe", num_experts=4, hidden_dim=8, top_k=2, shared=dict(kind="swiglu", hidden_dim=8))
    ffn |= dict(router=dict(kind="softmax"), balance=dict(bias_rate=0.01))
    mixed = dict(position=dict(kind="nope"), mask=dict(kind="global"), qk_norm="learned", ffn=ffn)
    plain = mixed | dict(ffn=dict(kind="swiglu", hidden_dim=8), temperature=dict(kind="ssmax", train_length=16))
    model = tiny.experiment(
        ("model.pattern", str((mixed, plain))), ("model.attention_bias", "all"), ("model.output_head", "untied")
    ).model
    found = {}
    by_path(lambda path: found.update({path: matrix_axes(path)}), abstract_params(model))
    matrices = {path for path, axes in found.items() if axes is not None}
    attention = [f"periods/layer_{i}/attention/{name}" for i in (0, 1) for name in ("query", "key", "value", "out")]
    places = ("layer_0/feed_forward", "layer_0/feed_forward/shared", "layer_1/feed_forward")
    assert matrices == {*attention, *(f"periods/{p}/{name}" for p in places for name in ("gate", "up", "down"))}
    assert {"embedding", "head", "periods/layer_0/feed_forward/router"} <= found.keys() - matrices


# ---- training -------------------------------------------------------------------------------------------------------

LAYER = dict(position=dict(kind="rope"), mask=dict(kind="global"), ffn=dict(kind="swiglu", hidden_dim=16))
ALGORITHMS = {
    "adafactor": (5e-2, dict(min_factored=4, momentum=0.5)),
    "lion": (3e-3, {}),
    # a large eps: Adam's quotient makes much of gradients that are nothing but rounding
    "muon": (1e-2, dict(eps=1e-4)),
    "schedule_free_adamw": (2e-2, dict(eps=1e-4)),
}
QUICKLY = {"xla_backend_optimization_level": 0}  # compiled in half the time; it runs a few steps only
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def experiment(kind):
    rate, fields = ALGORITHMS[kind]
    optimizer = dict(learning_rate=rate, schedule=dict(kind="constant"), algorithm=dict(kind=kind, **fields))
    if kind != "schedule_free_adamw":
        optimizer["ema_decay"] = 0.9
    changes = {"model.num_layers": 2, "model.pattern": (LAYER,), "train.optimizer": optimizer}
    return tiny.experiment(*((path, str(value)) for path, value in changes.items()))


def trainer(kind, mesh_config, count):
    """`(state shapes, shardings, step)` of a small model on some devices; the step does not donate."""
    config, mesh = experiment(kind), make_mesh(mesh_config, jax.devices()[:count])
    optimizer = make_optimizer(config.train.optimizer, 10)
    abstract, shardings = state_shardings(config.model, optimizer, mesh)
    take = jax.jit(
        make_train_step(config.model, optimizer, learning_rate(config.train.optimizer, 10)),
        out_shardings=(shardings, None),
        compiler_options=QUICKLY,
    )

    def step(state, weight=1.0):
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (8, 16), np.int32)
        weights = np.full(tokens.shape, weight, np.float32)
        batch = Batch(tokens, np.roll(tokens, -1, 1), weights, TokenInfo.single(*tokens.shape))
        batch = jax.tree.map(lambda x: jax.device_put(np.asarray(x), batch_sharding(mesh)), batch)
        with jax.set_mesh(mesh):
            state, scalars = take(state, batch)
        return state, float(scalars["loss"])

    return abstract, shardings, step


@pytest.mark.parametrize("kind", keep("muon", "schedule_free_adamw", of=ALGORITHMS))
def test_each_algorithm_trains_on_every_mesh_skips_bad_steps_and_resumes(kind, tmp_path):
    abstract, one, step = trainer(kind, MeshConfig(), 1)
    _, cut, sharded_step = trainer(kind, MESH, 8)
    config = experiment(kind)
    optimizer = make_optimizer(config.train.optimizer, 10)
    sharded = init_state(config.model, optimizer, make_mesh(MESH, jax.devices()), 0)
    state = jax.device_put(jax.device_get(sharded), one)
    # eight devices hold what `irope show` says
    lines = show.layout_lines(dataclasses.replace(config, mesh=MESH), 8)
    told = {
        name: int(here.replace(",", ""))
        for name, here in re.findall(r"^  (\w+ \w+) +([\d,]+) ", "\n".join(lines), re.M)
    }
    held = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
    assert told["optimizer state"] == held(sharded.opt_state)
    assert told["averaged weights"] == held(sharded.averaged) == held(sharded.params)

    losses = []
    for leaf, place in zip(jax.tree.leaves(sharded), jax.tree.leaves(cut), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    for _ in range(4):
        state, loss = step(state)
        sharded, sharded_loss = sharded_step(sharded)
        losses.append(loss)
        assert sharded_loss == pytest.approx(loss, rel=1e-5)
    assert losses[-1] < losses[0] - 0.05, losses
    assert_close(jax.device_get(sharded.params), jax.device_get(state.params), rtol=1e-4, atol=2e-5)
    assert_close(jax.device_get(sharded.averaged), jax.device_get(state.averaged), rtol=1e-4, atol=2e-5)

    bad, _ = step(state, np.inf)
    assert int(bad.skipped) == 1
    for name in ("params", "opt_state", "averaged"):
        assert_equal_trees(getattr(bad, name), getattr(state, name), what=name)

    with Checkpoints(tmp_path, create=True) as checkpoints:
        checkpoints.save(4, state, {}, {})
    with Checkpoints(tmp_path) as checkpoints:
        resumed, _, _ = checkpoints.restore(abstract, one)
    assert_equal_trees(step(resumed)[0], step(state)[0])
