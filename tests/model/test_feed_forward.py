"""SwiGLU and its chunked form against float64 numpy, gradients too; the module's parameters and their axes."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.core.types import Precision
from irope_jax.model.config import FfnSpec
from irope_jax.model.feed_forward import FeedForward, SwiGLU, swiglu
from irope_jax.plan import hlo

D, F = 6, 10


def case(batch=2, length=13, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (batch, length, D), (D, F), (D, F), (F, D), (batch, length, D)
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)


def definition(x, w_gate, w_up, w_down, d_out):
    """Output and the four gradients in float64."""
    x, w_gate, w_up, w_down, d_out = (np.asarray(a, np.float64) for a in (x, w_gate, w_up, w_down, d_out))
    gate, up = x @ w_gate, x @ w_up
    sigmoid = 1 / (1 + np.exp(-gate))
    hidden = gate * sigmoid * up
    d_hidden = d_out @ w_down.T
    d_gate, d_up = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid)), d_hidden * gate * sigmoid
    outer = partial(np.einsum, "bti,btj->ij")
    return hidden @ w_down, d_gate @ w_gate.T + d_up @ w_up.T, outer(x, d_gate), outer(x, d_up), outer(hidden, d_out)


def both(x, w_gate, w_up, w_down, d_out, **how):
    out, pull = jax.vjp(partial(swiglu, **how), x, w_gate, w_up, w_down)
    return out, *pull(d_out)


@pytest.mark.parametrize("how", [{}, {"chunk": 1}, {"chunk": 8}, {"chunk": 100}, {"chunk": 5, "shards": (2, 1)}])
def test_output_and_gradients(how):
    args = case()
    for ours, exact in zip(jax.jit(partial(both, **how))(*args), definition(*args)):
        np.testing.assert_allclose(ours, exact, rtol=2e-6, atol=2e-5)


def test_low_precision_gradients_sum_in_float32():
    args = case(length=256, dtype=jnp.bfloat16)
    ours = jax.jit(partial(both, chunk=16))(*args)
    for value, exact in zip(ours, definition(*(a.astype(jnp.float32) for a in args))):
        assert value.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(value, np.float32), exact, atol=0.02 * np.abs(exact).max())


def test_chunks_bound_memory_and_add_two_products_of_nine():
    width, hidden, length = 32, 128, 2048
    shapes = (1, length, width), (width, hidden), (width, hidden), (hidden, width), (1, length, width)
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    whole, chunked = (jax.jit(partial(both, chunk=c)).lower(*args).compile() for c in (None, 64))
    product = 2 * length * width * hidden
    assert hlo.matmul_flops(whole.as_text()) == 9 * product
    assert hlo.matmul_flops(chunked.as_text()) == 11 * product
    temp = [c.memory_analysis().temp_size_in_bytes for c in (whole, chunked)]
    assert temp[1] < 0.15 * temp[0]


def test_split_over_devices_under_plain_jit():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "rest"))
    x, *weights, d_out = case(batch=8, length=16)
    tokens, whole = NamedSharding(mesh, P("data", "rest")), NamedSharding(mesh, P())
    args = [jax.device_put(x, tokens), *(jax.device_put(w, whole) for w in weights), jax.device_put(d_out, tokens)]
    step = jax.jit(partial(both, chunk=4, shards=(4, 2)))
    for ours, exact in zip(step(*args), definition(x, *weights, d_out)):
        np.testing.assert_allclose(ours, exact, rtol=2e-6, atol=2e-5)
    cost = hlo.analyse(step.lower(*args).compile().as_text())
    assert cost.matmul_flops_max == 22 * x.shape[0] * x.shape[1] * D * F // 8
    assert set(cost.collective_bytes) == {"all-reduce"} and cost.total_bytes < 2 * 2 * 3 * D * F * 4


@pytest.mark.parametrize("chunk", [None, 8])
def test_module_is_the_function_with_named_parameters(chunk):
    x, *_ = case()
    module = FeedForward(SwiGLU(F, chunk=chunk), Precision("float32", "bfloat16"), init_std=0.5, out_std=0.1)
    boxed = module.init(jax.random.key(0), x)["params"]
    assert {k: v.names for k, v in boxed.items()} == {
        "gate": ("embed", "mlp"),
        "up": ("embed", "mlp"),
        "down": ("mlp", "embed"),
    }
    params = nn.unbox(boxed)
    assert {k: (v.shape, v.dtype.name) for k, v in params.items()} == {
        "gate": ((D, F), "float32"),
        "up": ((D, F), "float32"),
        "down": ((F, D), "float32"),
    }
    assert 0.3 < params["gate"].std() < 0.7 and params["down"].std() < 0.2
    out = module.apply({"params": params}, x)
    low = [a.astype(jnp.bfloat16) for a in (x, params["gate"], params["up"], params["down"])]
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), np.float32(swiglu(*low)), atol=1e-2)
    exact = definition(x, *(params[k] for k in ("gate", "up", "down")), x)[0]
    np.testing.assert_allclose(np.float32(out), exact, atol=0.03 * np.abs(exact).max())


def test_spec_is_configuration():
    spec = SwiGLU(hidden_dim=128, chunk=4096)
    assert to_dict(spec) == {"kind": "swiglu", "hidden_dim": 128, "chunk": 4096}
    assert from_dict(FfnSpec, to_dict(spec)) == spec
    for wrong, field in (({"hidden_dim": 0}, "hidden_dim"), ({"hidden_dim": 8, "chunk": 0}, "chunk")):
        with pytest.raises(ConfigError, match=field):
            from_dict(FfnSpec, {"kind": "swiglu"} | wrong)
